"""Training files of every format: what becomes of their rows, and what is refused."""

import hashlib
import json
from contextlib import contextmanager

import pytest

from eval_mcq.items.schema import SCHEMA, load_bench
from eval_mcq.scoring.prompt import render
from mgll_encoder.common.errors import BadDataError, UnknownNameError
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.core.processing import load_processor
from mllm_adapters.data import arrow_cache as tables
from mllm_adapters.data import captions, training_rows
from mllm_adapters.data import image_index as image_facts
from mllm_adapters.data import mcq_rows as questions
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import prepare_examples
from mllm_adapters.data.training_rows import DataOptions
from tests import builders
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters.retraining import color_rows, turns, write_json

HEADER = {"format": "mgll-manifest", "version": 1, "granularities": ["status", "disease"], "images": "images"}

QUESTION = {"id": "q", "images": ["a"], "question": "?", "options": ["x", "y"], "answer": "C"}


def talk(i, image="0.png"):
    return {"id": i, "image": image, "conversations": turns("<image>\nWhich?", f"answer {i}")}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def manifest(folder):
    for i in range(3):
        builders.picture(folder / "images", f"{i}.png", (80 * i, 0, 0))
    return lines(
        folder / "manifest.jsonl",
        HEADER,
        {"image": "0.png", "texts": {"status": ["abnormal fundus"], "disease": ["glaucoma", "cataract."]}},
        {"image": "1.png", "texts": {"status": ["normal fundus"]}},
        {"image": "2.png", "texts": {"disease": ["myopia"]}, "split": "test"},
    )


def said(corpus):
    return [row.turns[-1].value for row in corpus.rows]


def test_a_bench_asks_what_eval_mcq_asks_and_finds_its_images(tmp_path):
    bench = load_bench(small_bench(tmp_path / "bench", 3))
    assert questions.BENCH_SCHEMA == SCHEMA
    letters = read_corpus(bench.path)
    for row, item in zip(letters.rows, bench.items, strict=True):
        assert row.turns[0].value == "<image>\n" * len(item.images) + render(item)
        assert row.turns[1].value == item.letter
        assert [str(path) for path in bench.image_paths(item)] == list(row.images)
    texts = [item.options[item.answer] for item in bench.items]
    assert said(read_corpus(bench.path, options=DataOptions(answer="text"))) == texts
    both = [f"{item.letter}. {item.options[item.answer]}" for item in bench.items]
    assert said(read_corpus(bench.path, options=DataOptions(answer="both"))) == both


def test_a_manifest_becomes_captions_of_its_training_side(tmp_path):
    path = manifest(tmp_path)
    joined = read_corpus(path)
    assert said(joined) == ["Abnormal fundus. Glaucoma, cataract.", "Normal fundus."]
    assert joined.other_split == 1
    assert said(read_corpus(path, options=DataOptions(caption="disease"))) == ["Glaucoma, cataract."]
    asked = [row.turns[0].value.removeprefix("<image>\n") for row in joined.rows]
    assert set(asked) <= set(captions.CAPTION_PROMPTS)
    assert asked == [captions.caption_prompt(f"{i}.png", 0) for i in range(2)]
    others = {captions.caption_prompt("0.png", seed) for seed in range(20)}
    assert len(others) > 3, "the seed chooses"
    with pytest.raises(UnknownNameError, match="did you mean 'disease'"):
        read_corpus(path, options=DataOptions(caption="diseases"))


def test_the_questions_that_captions_answer_are_frozen_under_their_version():
    frozen = {"captions-1": "4f403cbf23e0"}
    found = hashlib.sha256("\n".join(captions.CAPTION_PROMPTS).encode()).hexdigest()
    assert found.startswith(frozen[captions.CAPTION_PROMPTS_VERSION])


def test_files_of_all_formats_mix_in_the_order_given(tmp_path, tiny_llava):
    chat = write_json(tmp_path / "a.json", color_rows(tmp_path / "images", 2))
    bench = small_bench(tmp_path / "bench", 3)
    corpus = read_corpus([bench, chat, manifest(tmp_path / "m")], tmp_path / "images")
    assert [str(row.id) for row in corpus.rows] == [
        *(item.id for item in load_bench(bench).items), "r0", "r1", "line 2", "line 3",
    ]  # fmt: skip
    examples, counts = prepare_examples(corpus, load_processor(tiny_llava), 2048, text_only=False)
    assert (counts.rows, counts.kept, counts.other_split) == (8, 7, 1)
    assert [example.images[0] for example in examples] == [row.images[0] for row in corpus.rows]
    assert corpus.digest() != read_corpus([chat, bench], tmp_path / "images").digest()


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_in_pieces_as_it_would_be_whole(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(training_rows, "CHUNK", 7)
    rows = [talk(i, None) | {"conversations": turns('é] ,[ "{', "ü\n}")} for i in range(5)]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n")
    assert [row.id for row in training_rows.conversations(path)] == [0, 1, 2, 3, 4]
    assert [row.turns[1].value for row in training_rows.conversations(path)] == ["ü\n}"] * 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[{"id": 1}, ]', r"row 2, is not JSON"),
        ('[{"id": 1} {"id": 2}]', r"row 1, is not JSON: expected ',' or ']'"),
        ('[{"id": 1}, {"id"', r"row 2, is not JSON"),
        ('[]\n[]', "is not JSON|text after the list"),
        ('{"schema": "eval-mcq/0"}\n', "has schema 'eval-mcq/0', expected 'eval-mcq/1'"),
        ('{"schema": "eval-mcq/1"}\n', "holds no conversations"),
        (f'{{"schema": "eval-mcq/1"}}\n{json.dumps(QUESTION)}',
         r"line 2 \(id 'q'\): answer 2 is not among the 2 options"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_in_one_line(tmp_path, text, complaint):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadDataError, match=complaint):
        read_corpus(path, tmp_path)


def test_images_without_a_folder_ask_for_it(tmp_path):
    path = lines(tmp_path / "a.jsonl", talk(0))
    with pytest.raises(
        BadDataError, match=r"names images without their folder \(0\.png\): pass it as `images`"
    ):
        read_corpus(path)


def test_rows_are_parsed_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    builders.picture(tmp_path, "0.png")
    path = lines(tmp_path / "a.jsonl", talk(0), talk(1))
    first = read_corpus(path, tmp_path)
    monkeypatch.setattr(training_rows, "_write", None)
    assert list(read_corpus(path, tmp_path).rows) == list(first.rows)
    monkeypatch.undo()
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    assert said(read_corpus(lines(path, talk(2)), tmp_path)) == ["answer 2"]


def test_images_are_decoded_once_and_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    looked = []
    original = image_facts._look
    monkeypatch.setattr(image_facts, "_look", lambda path: looked.append(path.name) or original(path))
    for name in ("a.png", "b.png"):
        builders.picture(tmp_path, name)
    before = image_facts.image_facts(["a.png", "b.png"], tmp_path)
    assert before["a.png"].digest == before["b.png"].digest
    builders.picture(tmp_path, "b.png", (0, 0, 9))
    after = image_facts.image_facts(["a.png", "b.png"], tmp_path)
    assert sorted(looked) == ["a.png", "b.png", "b.png"]
    assert after["a.png"].digest == before["a.png"].digest != after["b.png"].digest


@pytest.fixture
def place(tmp_path, tiny_llava):
    write_json(tmp_path / "train.json", color_rows(tmp_path / "images", 4))
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "2.png").read_bytes()[:-30])
    return tmp_path


def command(place, tiny_llava, *more):
    return (
        retrain_projector, "--model", tiny_llava, "--out", place / "out", "--images", place / "images",
        "--data", place / "train.json", "--max-steps", 1, "--workers", 0, "--report-to", "none", *more,
    )  # fmt: skip


def test_rows_with_a_damaged_image_are_left_out_and_counted_and_strict_stops(place, tiny_llava):
    outcome = builders.invoke(*command(place, tiny_llava, "--dry-run"))
    assert outcome.code == 0, outcome.err
    assert "Rows: 3 of 4" in outcome.out
    assert "1 with unreadable images" in " ".join(outcome.out.split())
    error = builders.refused(*command(place, tiny_llava, "--strict"))
    assert "1 of 4 images cannot be read" in error
    assert "2.png" in error
    assert not (place / "out").exists()


def test_several_files_train_together_and_bad_choices_are_refused(place, tiny_llava):
    more = ("--data", small_bench(place / "bench", 3), "--data", manifest(place / "m"))
    outcome = builders.invoke(*command(place, tiny_llava, *more, "--answer", "both"))
    assert outcome.code == 0, outcome.err
    assert "Rows: 8 of 10" in outcome.out
    record = json.loads((place / "out" / "training.json").read_text())
    assert record["answer"] == "both"
    assert len(record["data"]) == 3


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--answer", "word", "unknown --answer 'word'"),
        (
            "--feature-precision",
            "float64",
            "'--feature-precision': 'float64' is not one of 'auto', 'float32'",
        ),
        ("--images", "absent", "image folder absent does not exist"),
    ],
)
def test_choices_that_do_not_exist_are_refused(place, tiny_llava, option, value, complaint):
    assert complaint in builders.refused(*command(place, tiny_llava, option, value))


def test_several_processes_render_the_same_rows_in_the_same_order(tmp_path, tiny_llava, monkeypatch):
    corpus = read_corpus(
        write_json(tmp_path / "a.json", color_rows(tmp_path / "images", 7)), tmp_path / "images"
    )
    processor = load_processor(tiny_llava)
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "one"))
    alone, _ = prepare_examples(corpus, processor, 2048, text_only=False)
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "two"))
    monkeypatch.setattr(tables, "ROWS_PER_PROCESS", 3)
    counted: list[int] = []

    @contextmanager
    def counting(description, total):
        assert (description, total) == ("Rendering conversations", 7)
        yield counted.append

    monkeypatch.setattr(tables, "counting", counting)
    together, _ = prepare_examples(corpus, processor, 2048, text_only=False)
    assert sum(counted) == 7, "all processes are followed"
    assert len(list((tmp_path / "two" / "rows").glob("*/*of*.arrow"))) == 2
    assert list(together) == list(alone)
    again, _ = prepare_examples(corpus, processor, 2048, text_only=False)
    assert list(again) == list(alone)
