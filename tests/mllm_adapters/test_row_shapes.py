"""Conversation rows as people publish them: all become the same conversation, or are refused by name."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.common.errors import BadDataError
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.core.processing import load_processor
from mllm_adapters.data.corpus import read_conversations, read_corpus
from mllm_adapters.data.dataset import prepare_examples
from tests import builders
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters.retraining import turns, write_json

ASKED, SAID = "What is shown?", "Glaucoma."


def chat(*contents, images=None, **more):
    """A row of the ``messages`` shape, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, **({} if images is None else {"images": images}), **more}


SAME = {
    "LLaVA": {"image": "a.png", "conversations": turns(f"<image>\n{ASKED}", SAID)},
    "LLaVA, a list": {"image": ["a.png"], "conversations": turns(f"<image>\n{ASKED}", SAID)},
    "LLaMA-Factory, sharegpt": {"images": ["a.png"], "conversations": turns(f"<image>\n{ASKED}", SAID)},
    "misspelt": {"image": "a.png", "conversatons": turns(f"<image>\n{ASKED}", SAID)},
    "ms-swift": chat(f"<image>\n{ASKED}", SAID, images=["a.png"]),
    "TRL, text": chat(ASKED, SAID, images=["a.png"]),
    "TRL, typed": chat(
        [{"type": "image"}, {"type": "text", "text": ASKED}], [{"type": "text", "text": SAID}], images=["a.png"]
    ),
    "typed, with paths": chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": ASKED}], SAID),
    "OpenAI": chat([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": ASKED}], SAID),
    "datasets": chat(f"<image>\n{ASKED}", SAID, images=[{"path": "a.png", "bytes": None}]),
    "Qwen-VL": {
        "conversations": [
            {"from": "user", "value": f"Picture 1: <img>a.png</img>\n{ASKED}"},
            {"from": "assistant", "value": SAID},
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SAME)
def test_rows_of_every_published_shape_are_the_same_conversation(tmp_path, shape):
    builders.picture(tmp_path, "a.png")
    (row,) = read_corpus(write_json(tmp_path / "train.json", [SAME[shape]]), tmp_path).rows
    assert row.images == ("a.png",)
    assert row.messages() == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]},
        {"role": "assistant", "content": [{"type": "text", "text": SAID}]},
    ]


@pytest.mark.parametrize("blank", [None, "", "  ", float("nan"), [], [""], [None, float("nan")]])
def test_a_blank_image_is_no_image(tmp_path, blank):
    rows = [
        {"id": "1", "image": blank, "conversations": turns("Hello", "Hi")},
        chat("Hello", "Hi", images=blank),
    ]
    path = write_json(tmp_path / "train.json", rows)
    assert [row.images for row in read_conversations(path)] == [(), ()]


def test_blanks_do_not_count_as_images_of_a_tag(tmp_path):
    row = {"image": ["a.png", ""], "conversations": turns("<image>\nWhich?", "x")}
    assert read_conversations(write_json(tmp_path / "a.json", [row]))[0].images == ("a.png",)
    row = {"image": "", "conversations": turns("<image>\nWhich?", "x")}
    with pytest.raises(BadDataError, match="1 <image> tags for 0 images"):
        read_conversations(write_json(tmp_path / "b.json", [row]))


SYSTEM = {
    "a turn": {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi")]},
    "a message": {"messages": [{"role": "system", "content": "Be brief."}, *chat("Hello", "Hi")["messages"]]},
    "a field": {"system": "Be brief.", "conversations": turns("Hello", "Hi")},
}


@pytest.mark.parametrize("where", SYSTEM)
def test_a_system_turn_is_read_wherever_it_stands(tmp_path, where):
    (row,) = read_conversations(write_json(tmp_path / "train.json", [SYSTEM[where]]))
    assert [message["role"] for message in row.messages()] == ["system", "user", "assistant"]
    assert row.messages()[0]["content"] == [{"type": "text", "text": "Be brief."}]


PLAIN = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""A template that takes everybody but the user for the assistant, as LLaVA's own does."""

WITH_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text + ' ' }}{% else %}"
    "{{ m.role + ': ' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def rendered(path, model, template):
    processor = load_processor(model)
    processor.chat_template = template
    examples, _ = prepare_examples(read_corpus(path), processor, 2048, text_only=True)
    return examples[0]


def test_a_system_turn_is_written_by_a_template_that_has_one_and_refused_by_another(tmp_path, tiny_llava):
    path = write_json(tmp_path / "train.json", [SYSTEM["a turn"]])
    example = rendered(path, tiny_llava, WITH_SYSTEM)
    assert example.text == "Be brief. user: Hello\nassistant: Hi\n"
    ((start, end),) = example.answers
    assert example.text[start:end] == "Hi"
    with pytest.raises(BadDataError, match="writes it as a turn of the assistant: take the system turns out"):
        rendered(path, tiny_llava, PLAIN)
    with pytest.raises(BadDataError, match="does not write it: take the system turns out"):
        rendered(path, tiny_llava, WITH_SYSTEM.replace("m.content[0].text + ' '", "''"))


def test_a_system_turn_whose_words_come_again_in_a_turn_is_written(tmp_path, tiny_llava):
    system, asked, said = SYSTEM["a turn"]["conversations"]
    turns = [system, {**asked, "value": f"{system['value']} Hello"}, said]
    path = write_json(tmp_path / "train.json", [{**SYSTEM["a turn"], "conversations": turns}])
    assert rendered(path, tiny_llava, WITH_SYSTEM).text.count("Be brief.") == 2


@pytest.mark.parametrize("keys", [("question", "answer"), ("query", "response"), ("instruction", "output")])
def test_a_question_and_its_answer_make_a_row(tmp_path, keys):
    row = {"image": "a.png", **dict(zip(keys, (ASKED, SAID), strict=True))}
    (read,) = read_conversations(write_json(tmp_path / "a.json", [row]))
    assert [turn.value for turn in read.turns] == [f"<image>\n{ASKED}", SAID]
    with pytest.raises(BadDataError, match="`import_benchmark"):
        read_conversations(write_json(tmp_path / "b.json", [{**row, "options": ["x", "y"]}]))


def embedded(folder):
    """Rows with embedded images as ``datasets`` holds them: two rows of one image, one of another, one of none."""
    data = [builders.picture(folder, f"{i}.png", (90 * i, 0, 0)).read_bytes() for i in (1, 2)]
    pictures = [
        [{"bytes": data[0], "path": "1.png"}],
        [{"bytes": data[0], "path": None}],
        [{"bytes": data[1]}],
        [],
    ]
    features = datasets.Features(
        {
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [{**chat(ASKED, f"{SAID} {i}"), "images": images} for i, images in enumerate(pictures)]
    return datasets.Dataset.from_list(rows, features=features), data


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "splits"])
def test_a_data_set_with_embedded_images_is_trained_on(tmp_path, tiny_llava, kind):
    data, pictures = embedded(tmp_path / "made")
    path = tmp_path / "data"
    if kind == "saved":
        data.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    else:
        path = path if kind == "folder" else tmp_path / "rows.parquet"
        data.to_parquet(path / "train-00000-of-00001.parquet" if kind == "folder" else path)
    corpus = read_corpus(path)
    assert [row.turns[-1].value for row in corpus.rows] == [f"{SAID} {i}" for i in range(4)]
    shown = [[Path(image).read_bytes() for image in row.images] for row in corpus.rows]
    assert shown == [[pictures[0]], [pictures[0]], [pictures[1]], []]
    _, counts = prepare_examples(corpus, load_processor(tiny_llava), 2048, text_only=True)
    assert (counts.kept, counts.images) == (4, 2)
    assert corpus.digest() == read_corpus(path).digest()


def test_embedded_images_come_back_when_the_cache_has_lost_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    data, _ = embedded(tmp_path / "made")
    data.to_parquet(tmp_path / "rows.parquet")
    read_corpus(tmp_path / "rows.parquet")
    shutil.rmtree(tmp_path / "cache" / "pictures")
    assert len(read_corpus(tmp_path / "rows.parquet").sizes) == 2


def test_archives_and_damaged_data_sets_are_refused_by_name(tmp_path):
    (tmp_path / "shard-000.tar").write_bytes(b"x")
    with pytest.raises(BadDataError, match=r"shard-000\.tar is an archive .*unpack it"):
        read_corpus(tmp_path / "shard-000.tar")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(BadDataError, match=r"rows\.parquet"):
        read_corpus(tmp_path / "rows.parquet")


BAD = {
    "both keys": ({**chat("a", "b"), "conversations": turns("a", "b")},
                  "lists of turns under 'conversations' and 'messages'"),
    "images twice": ({"image": "a.png", "images": ["a.png"], "conversations": turns("<image>", "x")},
                     "images under 'image' and 'images'"),
    "images in and out": (chat([{"type": "image", "image": "a.png"}], "x", images=["b.png"]),
                          "1 images in its turns and 1 outside them"),
    "two systems": ({**SYSTEM["a turn"], "system": "Be long."}, "a system turn and a field 'system'"),
    "a late system": ({"conversations": [*turns("a", "b"), {"from": "system", "value": "c"}]}, "turn 3|from"),
    "a tool": (chat("a", "b") | {"messages": [{"role": "tool", "content": "x"}]}, "turn 1 is from 'tool'"),
    "a video": (chat([{"type": "video", "video": "a.mp4"}], "b"), "turn 1 has content of type 'video'"),
    "embedded bytes": (chat("a", "b", images=[{"bytes": "AAAA"}]), "embedded in the row"),
    "too many tags": (chat("<image><image>", "b", images=["a.png"]), "2 <image> tags for 1 images"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_contradicts_itself_is_refused_by_name(tmp_path, what):
    record, complaint = BAD[what]
    with pytest.raises(BadDataError, match=rf"train\.json: row 1.*({complaint})"):
        read_conversations(write_json(tmp_path / "train.json", [record]))


def test_a_lab_trains_on_rows_of_several_shapes_at_once(tmp_path, tiny_llava):
    builders.picture(tmp_path / "images", "a.png", (9, 9, 9))
    rows = [SAME["LLaVA"], SAME["ms-swift"], SAME["Qwen-VL"]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = builders.invoke(
        retrain_projector, "--model", tiny_llava, "--data", tmp_path / "train.jsonl",
        "--images", tmp_path / "images", "--out", tmp_path / "out", "--dry-run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Rows: 3 of 3" in outcome.out


def test_questions_exported_as_messages_train_as_the_same_rows(tmp_path):
    bench = small_bench(tmp_path / "bench", 3)
    for format_ in ("llava", "messages"):
        outcome = builders.invoke(
            eval_mcq,
            "export",
            bench,
            "--format",
            format_,
            "--images",
            bench.parent,
            "--out",
            tmp_path / format_,
        )
        assert outcome.code == 0, outcome.err
    assert read_conversations(tmp_path / "messages") == read_conversations(tmp_path / "llava")
    assert "images" in json.loads((tmp_path / "messages").read_text())[0]
