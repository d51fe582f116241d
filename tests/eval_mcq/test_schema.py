import json

import pyarrow
import pyarrow.parquet
import pytest

from eval_mcq.items.parquet import HEADER
from eval_mcq.items.schema import LETTERS, MCQItem, bench_text, load_bench
from eval_mcq.items.schema import write_bench as write_any_bench
from eval_mcq.scoring.prompt import LETTER_PROMPT, render
from mgll_encoder.common.errors import BadDataError
from tests.eval_mcq.helpers import question, write_bench


def test_a_bench_survives_writing_and_reading(tmp_path):
    odd = question("ü#1", options=["a line\u2028break", "b | c"], patient="p", source="s", tags=["t"])
    bench = load_bench(
        write_bench(tmp_path / "b.jsonl", [odd, question("2", answer=2)], categories=["DR", "Cataract"])
    )
    (tmp_path / "again.jsonl").write_text(bench_text(bench.header, bench.items))
    again = load_bench(tmp_path / "again.jsonl")
    assert again.items == bench.items
    assert again.categories == ["DR", "Cataract"]
    assert [item.letter for item in again.items] == ["B", "C"]


def test_images_lie_relative_to_the_bench_file(tmp_path):
    bench = load_bench(
        write_bench(tmp_path / "b.jsonl", [question("1", "x/a.png"), question("2", "/abs/a.png")])
    )
    assert [str(bench.image_paths(item)[0]) for item in bench.items] == [
        str(tmp_path / "x/a.png"),
        "/abs/a.png",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "D"}, "answer 'D' is not among the options A-C"),
        ({"answer": 3}, "answer 'D' is not among the options A-C"),
        ({"answer": "glaucoma"}, "answer 'glaucoma' is neither an option's letter nor its index"),
        ({"options": ["Drusen", "other", " drusen"]}, "options A and C are both"),
        ({"options": ["only one"]}, "field 'options'"),
        ({"options": [str(i) for i in range(27)]}, "field 'options'"),
        ({"images": []}, "field 'images'"),
        ({"color": "red"}, "field 'color'"),
        ({"category": "Catarct"}, "did you mean 'Cataract'?"),
    ],
)
def test_a_question_that_makes_no_sense_is_named_by_line_and_id(tmp_path, change, said):
    path = write_bench(
        tmp_path / "b.jsonl", [question("good"), question("bad", **change)], categories=["Cataract"]
    )
    with pytest.raises(BadDataError) as error:
        load_bench(path)
    assert said in str(error.value)
    assert "line 3" in str(error.value)
    assert "'bad'" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_questions_with_one_id_are_refused(tmp_path):
    with pytest.raises(BadDataError, match="id 'x' is already used on line 2"):
        load_bench(write_bench(tmp_path / "b.jsonl", [question("x"), question("x")]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ('{"schema": "eval-mcq/1"}\n', "no questions"),
        (json.dumps(question("1")), 'must be the header {"schema": "eval-mcq/1"}'),
        ('{"schema": "eval-mcq/0"}\n', "has schema 'eval-mcq/0', expected 'eval-mcq/1'"),
        ("not json", "line 1 is not JSON"),
        ('{"schema": "eval-mcq/1"}\n{"id": \n', "line 2"),
    ],
)
def test_a_file_that_is_no_bench_is_refused(tmp_path, text, said):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(BadDataError) as error:
        load_bench(tmp_path / "b.jsonl")
    assert said in str(error.value)


def test_the_prompt_is_frozen():
    item = MCQItem(**question("1"))
    assert LETTER_PROMPT.version == "letters-1"
    assert render(item) == (
        "What is seen?\nA. drusen\nB. a cataract\nC. nothing\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert len(LETTERS) == 26


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'\xff{"schema": "eval-mcq/1"}\n', "is not UTF-8 text (byte 0)"),
        (b'{"schema": "eval-mcq/1", "built": {"n": ' + b"9" * 6000 + b"}}\n", "line 1 is not JSON: a number of"),
        (b'{"schema": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "line 1 is nested too deeply"),
        (b'{"schema": "eval-mcq/1"}\n' + b"9" * 6000 + b"\n", "line 2"),
        (b'{"schema": "eval-mcq/1", "categories": [1]}\n', "'categories.0': Input should be a valid string (found 1)"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_bench_are_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "b.jsonl").write_bytes(content)
    with pytest.raises(BadDataError) as error:
        load_bench(tmp_path / "b.jsonl")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_or_foreign_parquet_bench_is_refused(tmp_path):
    path = tmp_path / "b.parquet"
    bench = load_bench(write_bench(tmp_path / "b.jsonl", [question(str(i)) for i in range(300)]))
    write_any_bench(path, bench.header, bench.items)
    assert load_bench(path).items == bench.items
    whole = path.read_bytes()
    for content in (whole[:40], whole[:200] + bytes(300) + whole[500:], whole[:-300] + whole[-8:]):
        path.write_bytes(content)
        with pytest.raises(BadDataError, match=r"bench .*b\.parquet"):
            load_bench(path)
    table = pyarrow.table({"id": [b"1"]}).replace_schema_metadata(
        {HEADER: bench.header.model_dump_json(by_alias=True)}
    )
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(BadDataError, match="contains a bytes, but a bench has only text"):
        load_bench(path)
