"""Damaged run folders: one line that names file and field, never a wrong table."""

import json

import pytest

from eval_mcq.records.run_record import load_run, read_run_record
from mgll_encoder.common.errors import BadDataError
from tests.eval_mcq.helpers import run_of_counts, save_run


@pytest.fixture
def run(tmp_path):
    return save_run(run_of_counts({"DR": (2, 3), "AMD": (1, 2)}), tmp_path / "run")


def damage(folder, place: int, **fields) -> None:
    """Change fields of one line of the answers file."""
    path = folder / "answers.jsonl"
    lines = path.read_text().splitlines()
    lines[place] = json.dumps({**json.loads(lines[place]), **fields})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "fields",
    [
        {"gold": "E"},
        {"gold": ""},
        {"chosen": "AB"},
        {"chosen": 1},
        {"probabilities": [0.5]},
        {"probabilities": [0.25] * 27},
        {"probabilities": [0.25, 0.25, 0.25, 1.5]},
        {"probabilities": [0.25, 0.25, 0.25, -0.1]},
        {"probabilities": [0.25, 0.25, 0.25, float("nan")]},
        {"probabilities": "ABCD"},
        {"rotation": -1},
        {"rotation": 4},
        {"rotation": 10**30},
        {"shown": "ABC"},
        {"shown": "DABC"},
        {"letter_mass": float("inf")},
        {"tokens": [1]},
        {"log_likelihoods": [-1.0]},
        {"images_sha256": []},
        {"id": ""},
        {"color": "red"},
    ],
)
def test_a_row_that_makes_no_sense_is_named_by_line_and_field(run, fields):
    damage(run, 1, **fields)
    with pytest.raises(BadDataError) as error:
        load_run(run)
    assert "answers.jsonl line 2" in str(error.value)
    assert next(iter(fields)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_that_does_not_belong_to_its_run_is_named(run):
    for fields, said in (
        ({"category": "Cataract"}, "category 'Cataract', which is not in run.json"),
        ({"rotation": 1, "shown": "DABC"}, "is rotation 1, but the run has 1"),
        ({"run": "0" * 16}, "is an answer of another run"),
    ):
        before = (run / "answers.jsonl").read_text()
        damage(run, 1, **fields)
        with pytest.raises(BadDataError, match=rf"answers.jsonl line 2 \(id 'DR-1'\) .*{said}"):
            load_run(run)
        (run / "answers.jsonl").write_text(before)


def test_rotations_that_disagree_about_their_question_are_refused(tmp_path):
    whole = run_of_counts({"DR": (2, 2)})
    rows = [
        row.model_copy(update={"rotation": r, "shown": s})
        for row in whole.rows
        for r, s in ((0, "ABCD"), (1, "DABC"))
    ]
    record = whole.record.model_copy(update={"rotations": 2})
    run = save_run(type(whole)(whole.folder, record, rows), tmp_path / "run")
    assert len(load_run(run).answers) == 2
    damage(run, 1, probabilities=[0.5, 0.5], shown="BA")
    with pytest.raises(
        BadDataError, match=r"line 2 .*differs from another rotation of its question .* number of options"
    ):
        load_run(run)


@pytest.mark.parametrize(
    "fields",
    [
        {"questions": 0},
        {"rotations": 27},
        {"mode": "guess"},
        {"categories": []},
        {"shard": "3/2"},
        {"shard": "x"},
        {"versions": []},
        {"color": "red"},
    ],
)
def test_a_record_that_makes_no_sense_is_named_by_field(run, fields):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **fields}))
    with pytest.raises(BadDataError, match=rf"run .*run\.json: field '{next(iter(fields))}"):
        load_run(run)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff{}", "not UTF-8 text"),
        (b"{", "not JSON"),
        (b'{"questions": ' + b"9" * 6000 + b"}", "a number of 6000 digits"),
        (b"[" * 5000, "nested too deeply"),
        (b"[]", "format 'none'"),
    ],
)
def test_bytes_that_are_no_record_are_refused(run, content, said):
    (run / "run.json").write_bytes(content)
    with pytest.raises(BadDataError, match=said):
        read_run_record(run)


def test_a_line_that_stands_there_twice_counts_once(run):
    path = run / "answers.jsonl"
    before = load_run(run).rows
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1], lines[3]]))
    assert load_run(run).rows == before


def test_a_run_of_which_no_question_is_complete_is_no_table(tmp_path):
    whole = run_of_counts({"DR": (2, 2)})
    record = whole.record.model_copy(update={"rotations": 2})
    run = save_run(type(whole)(whole.folder, record, whole.rows), tmp_path / "run")
    with pytest.raises(BadDataError, match="answers no question in all its rotations yet"):
        load_run(run)
