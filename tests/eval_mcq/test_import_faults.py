"""Question files in use: options with their own letters, wrapped base64, and invalid rows among valid ones."""

import base64
import csv
import json
import textwrap

import pytest

from eval_mcq.items.schema import load_bench
from tests import builders

COLUMNS = ("index", "image", "question", "A", "B", "C", "D", "answer", "category")
OPTIONS = ("glaucoma", "cataract", "AMD", "normal")


@pytest.fixture
def picture(tmp_path):
    return base64.b64encode(builders.picture(tmp_path, "seen.png").read_bytes()).decode()


def tsv(path, *rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(index, picture, options=OPTIONS, answer="A", **more):
    letters = dict(zip("ABCD", options, strict=False))
    return {
        "index": index,
        "image": picture,
        "question": "What?",
        "answer": answer,
        "category": "eye",
        **letters,
        **more,
    }


def lettered(form, options=OPTIONS):
    return [form.format(letter, option) for letter, option in zip("ABCD", options, strict=True)]


@pytest.mark.parametrize("form", ["A. {1}", "{0}. {1}", " {0}.  {1} ", "({0}) {1}", "{0}) {1}", "{0}: {1}"])
def test_letters_that_options_carry_are_taken_off_and_that_is_said(eval_mcq, tmp_path, picture, form):
    options = lettered(form)
    source = tsv(tmp_path / "q.tsv", row(0, picture, options), row(1, picture, options, "B"))
    assert eval_mcq("import", source, "--format", "vlmevalkit", "--out", tmp_path / "b.jsonl") == 0, (
        eval_mcq.err
    )
    carried = form != "A. {1}"  # the same letter before every option is no enumeration
    wanted = list(OPTIONS) if carried else options
    assert [item.options for item in load_bench(tmp_path / "b.jsonl").items] == [wanted] * 2
    assert ("were removed from the options of 2 questions" in eval_mcq.err) == carried


def test_numbers_that_options_carry_are_taken_off_but_measures_are_kept(eval_mcq, tmp_path, picture):
    numbered = [f"{i}. {option}" for i, option in enumerate(OPTIONS, 1)]
    assert imported(eval_mcq, tmp_path, row(0, picture, numbered)).items[0].options == list(OPTIONS)
    measures = ["1.5 mm", "2.5 mm", "3.5 mm", "4.5 mm"]
    assert imported(eval_mcq, tmp_path, row(0, picture, measures)).items[0].options == measures


def imported(eval_mcq, folder, *rows, more=()):
    source = tsv(folder / "q.tsv", *rows)
    out = folder / "b.jsonl"
    assert eval_mcq("import", source, "--format", "vlmevalkit", "--out", out, "--force", *more) == 0, (
        eval_mcq.err
    )
    return load_bench(out)


def test_a_file_where_only_some_options_carry_letters_asks_what_to_do(eval_mcq, tmp_path, picture):
    rows = row(0, picture), row(1, picture, lettered("{0}. {1}"))
    source = tsv(tmp_path / "q.tsv", *rows)
    assert eval_mcq("import", source, "--format", "vlmevalkit", "--out", tmp_path / "b.jsonl") == 2
    assert "row 3" in eval_mcq.err
    assert "1 of 2 questions" in eval_mcq.err
    kept = imported(eval_mcq, tmp_path, *rows, more=("--option-letters", "keep"))
    assert kept.items[1].options == lettered("{0}. {1}")
    stripped = imported(eval_mcq, tmp_path, *rows, more=("--option-letters", "strip"))
    assert stripped.items[1].options == list(OPTIONS)


@pytest.mark.parametrize("answer", ["Cataract", "B. Cataract", "cataract"])
def test_an_answer_given_as_text_still_matches_options_with_letters(eval_mcq, tmp_path, answer):
    builders.picture(tmp_path, "0.png")
    entry = {
        "question_id": "q",
        "question": "What?",
        "gt_answer": answer,
        "image_path": "0.png",
        "question_type": "eye",
    }
    entry |= {f"option_{letter}": f"{letter}. {text}" for letter, text in zip("ABCD", OPTIONS, strict=True)}
    (tmp_path / "q.json").write_text(json.dumps([entry]))
    out = tmp_path / "b.jsonl"
    assert eval_mcq("import", tmp_path / "q.json", "--format", "omnimedvqa", "--out", out) == 0, eval_mcq.err
    (item,) = load_bench(out).items
    assert (item.options, item.letter) == (list(OPTIONS), "B")


def test_base64_may_be_wrapped_into_lines(eval_mcq, tmp_path, picture):
    wrapped = "\n".join(textwrap.wrap(picture, 76))
    bench = imported(eval_mcq, tmp_path, row(0, wrapped))
    assert bench.image_paths(bench.items[0])[0].read_bytes() == base64.b64decode(picture)


def bad_rows(picture):
    return {
        "options alike": row(1, picture, ("AMD", "AMD", "x", "y")),
        "blank answer": row(2, picture, answer=""),
        "answer that is not an option": row(3, picture, answer="Z"),
        "no image named": row(4, ""),
        "image unreadable": row(5, base64.b64encode(b"no picture" * 20).decode()),
        "no image file": row(6, "404"),
        "blank option": row(7, picture, ("a", "", "c", "d")),
    }


REASONS = list(bad_rows(""))


@pytest.mark.parametrize("reason", REASONS)
def test_a_bad_row_stops_the_import_and_is_named(eval_mcq, tmp_path, picture, reason):
    source = tsv(tmp_path / "q.tsv", row(0, picture), bad_rows(picture)[reason])
    assert eval_mcq("import", source, "--format", "vlmevalkit", "--out", tmp_path / "b.jsonl") == 2
    assert "q.tsv row 3" in eval_mcq.err
    assert not (tmp_path / "b.jsonl").exists()
    assert not (tmp_path / "b_images").exists()


def test_bad_rows_can_be_left_out_and_are_counted_and_recorded(eval_mcq, tmp_path, picture):
    rows = row(0, picture), *bad_rows(picture).values(), row(0, picture, question="Again?")
    bench = imported(eval_mcq, tmp_path, *rows, more=("--skip-bad",))
    assert [item.id for item in bench.items] == ["0"]
    assert bench.header.built["skipped"] == {**dict.fromkeys(REASONS, 1), "id used before": 1}
    assert bench.header.built["questions_read"] == len(rows)
    assert "left out 8 of 9 questions: " in eval_mcq.err
    assert len(list((tmp_path / "b_images").iterdir())) == 1, "no picture of a question that was left out"


def test_bad_entries_of_a_json_file_are_left_out_too(eval_mcq, tmp_path):
    builders.picture(tmp_path, "0.png")
    good = {
        "question_id": "q",
        "question": "What?",
        "gt_answer": "b",
        "image_path": "0.png",
        "option_A": "a",
        "option_B": "b",
    }
    entries = [
        good,
        {**good, "question_id": "r", "gt_answer": "c"},
        {**good, "question_id": "s", "image_path": "1.png"},
    ]
    entries.append({key: value for key, value in good.items() if key != "question"})
    (tmp_path / "q.json").write_text(json.dumps(entries))
    command = ("import", tmp_path / "q.json", "--format", "omnimedvqa", "--out", tmp_path / "b.jsonl")
    assert eval_mcq(*command) == 2
    assert eval_mcq(*command, "--skip-bad") == 0, eval_mcq.err
    bench = load_bench(tmp_path / "b.jsonl")
    assert [item.id for item in bench.items] == ["q"]
    assert bench.header.built["skipped"] == {
        "answer that is not an option": 1, "no image file": 1, "without a required column": 1,
    }  # fmt: skip


def test_a_file_of_bad_rows_only_says_why_nothing_is_left(eval_mcq, tmp_path, picture):
    source = tsv(tmp_path / "q.tsv", row(0, picture, answer=""))
    command = ("import", source, "--format", "vlmevalkit", "--out", tmp_path / "b.jsonl", "--skip-bad")
    assert eval_mcq(*command) == 2
    assert "1 blank answer" in eval_mcq.err


def test_every_table_of_the_bench_says_what_was_left_out(eval_mcq, tmp_path, picture, tiny_llava):
    rows = [row(i, picture, question=f"Which is {i}?") for i in range(3)]
    imported(eval_mcq, tmp_path, *rows, *list(bad_rows(picture).values())[1:3], more=("--skip-bad",))
    run = tmp_path / "run"
    assert eval_mcq("run", "--model", tiny_llava, "--bench", tmp_path / "b.jsonl", "--out", run) == 0, (
        eval_mcq.err
    )
    for format_ in ("rich", "markdown", "latex"):
        assert eval_mcq("table", run, "--format", format_) == 0, eval_mcq.err
        said = " ".join(eval_mcq.out.replace("\\", "").split())
        assert "2 entries: 1 blank answer, 1 answer that is not an option" in said
    page = tmp_path / "report.html"
    assert eval_mcq("report", f"tiny={run}", "--out", page) == 0, eval_mcq.err
    assert "1 blank answer" in page.read_text()
