import json

import pytest

from mgll_encoder.common.errors import BadDataError, NotFoundError
from mllm_adapters.data.corpus import read_conversations, read_corpus
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.data.training_rows import DataOptions
from tests import builders
from tests.mllm_adapters.retraining import turns, write_json

GOOD = {"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "A disc.")}


def row(**changes):
    return {**GOOD, **changes}


def test_a_json_list_and_json_lines_read_the_same(tmp_path):
    as_list = write_json(tmp_path / "a.json", [GOOD, row(id="b")])
    as_lines = tmp_path / "a.jsonl"
    as_lines.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row(id='b'))}\n")
    assert read_conversations(as_list) == read_conversations(as_lines)
    assert len(read_conversations(as_list)) == 2


def test_rows_may_have_no_image_or_several(tmp_path):
    rows = [
        {"id": 1, "conversations": turns("Hello", "Hi")},
        row(image=None, conversations=turns("Hello", "Hi")),
        row(image=["a.png", "b.png"], conversations=turns("<image> or <image>?", "The first.")),
    ]
    read = read_conversations(write_json(tmp_path / "a.json", rows))
    assert [r.images for r in read] == [(), (), ("a.png", "b.png")]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (row(conversations=turns("<image>", "x")[::-1]), r"turn 1 is from 'gpt', expected 'human'"),
        (row(conversations=turns("<image>", "x") * 2 + turns("y")), "the answer of 'gpt' is missing"),
        (row(conversations=[*turns("<image>"), *turns("again")]), r"turn 2 is from 'human', expected 'gpt'"),
        (row(conversations=turns("What?", "x")), "0 <image> tags for 1 images"),
        (row(conversations=turns("<image><image>", "x")), "2 <image> tags for 1 images"),
        (row(conversations=turns("<image>", "see <image>")), r"turn 2 \(gpt\) has an <image> tag"),
        (row(conversations=turns("<image>", " \n")), r"turn 2 \(gpt\) is empty"),
        (row(conversations=[]), "conversations: .*at least 2"),
        (
            row(conversations=[{"from": "narrator", "value": "x"}] * 2),
            "turn 1 is from 'narrator', expected one of human",
        ),
        (row(conversations=[{"from": "human"}] * 2), "conversations.0.value: Field required"),
        (row(image=7), "image: .*found 7"),
        ({"id": "a"}, "conversations: Field required"),
        (["not", "a", "row"], "valid dictionary"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(tmp_path, record, complaint):
    path = write_json(tmp_path / "train.json", [GOOD, record])
    with pytest.raises(BadDataError, match=rf"train\.json: row 2.*{complaint}") as caught:
        read_conversations(path)
    if isinstance(record, dict):
        assert "(id 'a')" in str(caught.value)


def test_all_bad_rows_are_counted_and_the_first_is_shown(tmp_path):
    path = write_json(tmp_path / "a.json", [GOOD, row(id="x", image=None), row(id="y", image=None)])
    with pytest.raises(
        BadDataError, match=r"row 2 \(id 'x'\): 1 <image> tags for 0 images.*and 1 more bad rows"
    ):
        read_conversations(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no conversations"),
        ("[]", "holds no conversations"),
        ('[{"id": ', "is not JSON"),
        ('{"conversations": []}\n{broken', "line 2, is not JSON"),
    ],
)
def test_an_empty_or_broken_file_is_refused(tmp_path, text, complaint):
    path = tmp_path / "a.json"
    path.write_text(text if "broken" not in text else f"{json.dumps(GOOD)}\n{{broken")
    with pytest.raises(BadDataError, match=complaint):
        read_conversations(path)


def test_a_missing_file_a_folder_and_binary_data_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        read_conversations(tmp_path / "absent.json")
    with pytest.raises(BadDataError, match="is a folder"):
        read_conversations(tmp_path)
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadDataError, match="not UTF-8"):
        read_conversations(tmp_path / "a.json")


def test_missing_images_are_counted_before_anything_else_happens(tmp_path):
    builders.picture(tmp_path, "a.png")
    rows = [GOOD, *(row(id=i, image=f"sub/{i}.png") for i in range(3))]
    path = write_json(tmp_path / "a.json", rows)
    with pytest.raises(BadDataError, match=r"3 of 4 images are missing in .*, first: sub/0\.png"):
        read_corpus(path, tmp_path)


def test_files_that_are_no_images_are_counted(tmp_path):
    builders.picture(tmp_path, "a.png")
    (tmp_path / "b.png").write_text("no picture")
    path = write_json(tmp_path / "a.json", [GOOD, row(image="b.png")])
    assert list(read_corpus(path, tmp_path).damaged) == ["b.png"]
    with pytest.raises(BadDataError, match=r"1 of 2 images cannot be read as images .*b\.png"):
        read_corpus(path, tmp_path, DataOptions(strict=True))


def test_a_missing_image_folder_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"image folder .*absent does not exist"):
        read_corpus(write_json(tmp_path / "a.json", [GOOD]), tmp_path / "absent")


def test_images_shared_by_rows_are_measured_once(tmp_path):
    builders.picture(tmp_path, "a.png", size=17)
    corpus = read_corpus(write_json(tmp_path / "a.json", [GOOD, GOOD]), tmp_path)
    assert corpus.sizes == {"a.png": (17, 17)}


def test_messages_keep_images_where_the_human_put_them():
    parts = [
        ("<image>\nWhat is it?", ["IMAGE", "What is it?"]),
        ("What is it?\n<image>", ["What is it?", "IMAGE"]),
        ("<image>", ["IMAGE"]),
        (" Plain text. ", ["Plain text."]),
    ]
    for value, expected in parts:
        images = ["a.png"] * value.count("<image>")
        conversation = Conversation.model_validate(row(image=images, conversations=turns(value, " yes ")))
        human, gpt = conversation.messages()
        assert [part.get("text", "IMAGE") for part in human["content"]] == expected
        assert (human["role"], gpt["role"]) == ("user", "assistant")
        assert gpt["content"] == [{"type": "text", "text": "yes"}]


def test_words_around_two_images_do_not_run_together():
    record = row(image=["a.png", "b.png"], conversations=turns("Compare <image> with <image> now.", "Same."))
    content = Conversation.model_validate(record).messages()[0]["content"]
    assert "".join(part.get("text", "") for part in content) == "Compare  with  now."
