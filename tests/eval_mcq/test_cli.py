"""The user's workflow: labels, benchmark, run, table, comparison; and its errors."""

import csv
import json
import re
import shlex

import pytest

from eval_mcq.items.schema import load_bench
from eval_mcq.records.run_record import load_run
from eval_mcq.runs import run as run_module
from eval_mcq.scoring.prompt import render
from mgll_encoder.common import signals
from tests.builders import tiny_llava as write_tiny_llava
from tests.eval_mcq.helpers import (
    question,
    run_of_counts,
    save_run,
    scorer,
    small_bench,
    write_bench,
    write_labels,
)
from tests.mllm_adapters.llava_checkpoints import a_tower

ROWS = [
    {"file": f"{disease}{i}.png", "labels": disease, "patient": f"{disease}{i}"}
    for disease in ("glaucoma", "cataract", "AMD", "DR")
    for i in range(4)
]
FOUR = ("--diseases", "AMD,Cataract,DR,Glaucoma")


@pytest.fixture
def labels(tmp_path):
    return ("--labels", write_labels(tmp_path, ROWS), "--images", tmp_path / "photos")


def test_from_labels_to_a_comparison(eval_mcq, labels, tiny_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert eval_mcq("build", *labels, *FOUR, "--patient-column", "patient", "--out", "bench.jsonl") == 0
    assert "Next: eval-mcq run" in eval_mcq.out
    other = write_tiny_llava(tmp_path / "other", seed=1)
    assert eval_mcq("run", "--model", tiny_llava, "--bench", "bench.jsonl", "--out", "runs/base") == 0
    assert "Glaucoma" in eval_mcq.out
    assert "Next: eval-mcq compare" in eval_mcq.out
    assert eval_mcq("run", "--model", other, "--bench", "bench.jsonl", "--batch-size", 3, "--limit", 5) == 0
    assert "only" in eval_mcq.out.lower()
    assert eval_mcq("run", "--model", other, "--bench", "bench.jsonl") == 0
    assert (
        eval_mcq("compare", "base=runs/base", "mgll=runs/other", "--format", "csv", "--out", "table.csv") == 0
    )
    with (tmp_path / "table.csv").open() as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["", "AMD", "Cataract", "DR", "Glaucoma", "Average"]
    assert table[1] == ["n", "4", "4", "4", "4", "16"]
    for format_ in ("rich", "markdown", "csv", "latex"):
        assert eval_mcq("table", "runs/base", "--format", format_) == 0
        assert "Glaucoma" in eval_mcq.out
    assert eval_mcq("compare", "base=runs/base", "mgll=runs/other", "--table-layout", "paper") == 0
    assert "mgll over base" in eval_mcq.out


@pytest.mark.parametrize("name", ["base", "mgll", "my run", "a=b", "x:y"])
def test_the_line_that_a_run_ends_with_can_be_typed(eval_mcq, tiny_llava, tmp_path, monkeypatch, name):
    """A cold reader called the first run base, as the examples do, and was told to compare base with base."""
    monkeypatch.chdir(tmp_path)
    bench = small_bench(tmp_path / "data", 4)
    assert eval_mcq("run", "--model", tiny_llava, "--bench", bench, "--out", f"runs/{name}") == 0, (
        eval_mcq.err
    )
    line = next(line for line in eval_mcq.out.splitlines() if line.startswith("Next: eval-mcq compare"))
    save_run(load_run(tmp_path / "runs" / name), tmp_path / "OTHER_RUN")
    assert eval_mcq(*shlex.split(line)[2:]) == 0, eval_mcq.err
    assert shlex.split(line)[3].startswith("base="), "the reference is the run called base"


def test_after_a_build_of_the_train_split_one_trains(eval_mcq, labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build = (
        "build",
        *labels,
        "--diseases",
        "AMD,DR",
        "--options",
        "2",
        "--min-negatives",
        "1",
        "--test-share",
        "0.5",
    )
    assert eval_mcq(*build, "--split", "train", "--out", "train.jsonl") == 0, eval_mcq.err
    assert "Next: retrain-projector --model MODEL --data train.jsonl\n" in eval_mcq.out
    assert "labels that are not asked about: glaucoma (4), cataract (4)" in eval_mcq.err
    assert eval_mcq(*build, "--split", "test", "--out", "test.jsonl") == 0, eval_mcq.err
    assert "Next: eval-mcq run --model MODEL --bench test.jsonl\n" in eval_mcq.out
    assert eval_mcq("export", "test.jsonl", "--out", "train.json") == 0
    assert (
        "test.jsonl is of the test split: a model that is trained on it cannot be judged by it"
        in eval_mcq.err
    )
    assert eval_mcq("export", "train.jsonl", "--out", "more.json") == 0
    assert "test split" not in eval_mcq.err


def test_a_far_off_disease_gets_the_list_and_the_way_to_ask_about_it(eval_mcq, labels, tmp_path):
    error = eval_mcq.refuses("build", *labels, "--diseases", "Stargardt,DR", "--out", tmp_path / "b.jsonl")
    assert "did you mean" not in error
    assert "known are AMD, CSR, Cataract" in error
    assert "a preset of your own (--preset FILE.json, see docs/formats.md#preset)" in error
    assert eval_mcq("build", "--list") == 0
    folder = re.search(r"Their files: (.*) \(--preset also", eval_mcq.out)[1]
    assert (
        eval_mcq(
            "build", *labels, *FOUR, "--preset", f"{folder}/fundus10.json", "--out", tmp_path / "b.jsonl"
        )
        == 0
    )


@pytest.mark.parametrize(
    ("below", "given"), [("photos", ""), ("photos/left", "left"), ("photos/left/eyes", "left/eyes")]
)
def test_an_image_folder_that_is_too_deep_is_answered_with_the_right_one(eval_mcq, tmp_path, below, given):
    rows = [{**row, "file": f"{given}/{row['file']}".lstrip("/")} for row in ROWS]
    deep = tmp_path / below
    (deep / "more").mkdir(parents=True)
    table = write_labels(tmp_path, rows)
    build = ("build", "--labels", table, *FOUR, "--out", tmp_path / "b.jsonl", "--images")
    error = eval_mcq.refuses(*build, deep / "more" if not given else deep)
    assert "no usable image: no image file, for example: label file" in error
    assert ("it is in a folder above" if not given else "the cells begin with left/") in error
    assert f"try --images {tmp_path / 'photos'};" in error
    assert eval_mcq(*build, tmp_path / "photos") == 0, eval_mcq.err


def test_runs_with_different_limits_are_told_the_remedy(eval_mcq, tiny_llava, tmp_path):
    run = ("run", "--model", tiny_llava, "--bench", small_bench(tmp_path))
    for limit in (4, 6):
        assert eval_mcq(*run, "--limit", limit, "--out", tmp_path / f"r{limit}") == 0
    compare = ("compare", f"a={tmp_path / 'r4'}", f"b={tmp_path / 'r6'}")
    error = eval_mcq.refuses(*compare)
    assert re.search(r"'a' \(.*r4\) answers 4 of 10 questions and 'b' \(.*r6\) 6 of 10", error)
    assert "re-run both with the same --limit, or without one" in error
    assert eval_mcq(*run, "--limit", 6, "--out", tmp_path / "r4") == 0
    assert "4 of 6 already answered" in eval_mcq.err
    assert eval_mcq(*compare) == 0, eval_mcq.err


def test_ctrl_c_says_what_is_kept_and_the_next_run_where_it_goes_on(
    eval_mcq, tiny_llava, tmp_path, monkeypatch
):
    call = (
        "run",
        "--model",
        tiny_llava,
        "--bench",
        small_bench(tmp_path),
        "--batch-size",
        4,
        "--out",
        tmp_path / "r",
    )
    append, calls = run_module.append_answers, []

    def pressed(path, answers):
        append(path, answers)
        calls.append(path)
        if len(calls) == 2:
            signals.signal.raise_signal(signals.signal.SIGINT)

    monkeypatch.setattr(run_module, "append_answers", pressed)
    assert eval_mcq(*call) == 130
    assert re.search(
        rf"[48] of 10 answers are kept in {tmp_path / 'r'}; the same command continues\n", eval_mcq.err
    )
    assert eval_mcq.err.endswith("error: interrupted\n")
    assert "Trying questions with real, blank and exchanged images (8) ..." in eval_mcq.err
    assert "Answering questions (10) ..." in eval_mcq.err
    assert eval_mcq(*call) == 0
    assert "8 of 10 already answered" in eval_mcq.err


def test_a_tower_is_refused_before_any_image_is_looked_at(eval_mcq, tmp_path):
    tower, bench = a_tower(tmp_path / "mgll"), small_bench(tmp_path)
    for command in (("run", "--out", tmp_path / "r"), ("check",)):
        eval_mcq.refuses(*command, "--model", tower, "--bench", bench)
        assert "images" not in eval_mcq.err
        assert "Hashing" not in eval_mcq.err


def test_training_conversations_are_the_very_prompt_that_is_scored(eval_mcq, tiny_llava, tmp_path):
    bench = small_bench(tmp_path)
    assert eval_mcq("export", bench, "--format", "llava", "--out", tmp_path / "train" / "train.json") == 0
    conversations = json.loads((tmp_path / "train" / "train.json").read_text())
    items = load_bench(bench).items
    model_scorer = scorer(tiny_llava)
    assert [c["image"] for c in conversations[:2]] == ["../0.png", "../1.png"]
    for conversation, item in zip(conversations, items, strict=True):
        human, gpt = conversation["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{render(item)}"}
        assert gpt == {"from": "gpt", "value": "AB"[item.answer]}
        assert model_scorer.prompt(item) == f"USER: {human['value']} ASSISTANT:"


def test_a_missing_column_is_answered_with_the_columns_there_are(eval_mcq, labels, tmp_path):
    error = eval_mcq.refuses("build", *labels, "--labels-column", "label", "--out", tmp_path / "b.jsonl")
    assert (
        "no column 'label' (--labels-column): did you mean 'labels'? its columns are file, labels, patient"
        in error
    )
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("--diseases", "AMD,Katarakt"),
            "unknown disease of preset 'fundus10' 'Katarakt': did you mean 'Cataract'?",
        ),
        ((), "disease 'CSR' has no image"),
        (("--preset", "fundus11"), "unknown preset"),
        ((*FOUR, "--images", "nowhere"), "image folder nowhere does not exist"),
        ((*FOUR, "--labels", "nowhere.csv"), "label file nowhere.csv does not exist"),
        ((*FOUR, "--options", "5"), "ask for fewer with --options"),
    ],
)
def test_build_refuses_in_one_line_and_writes_nothing(eval_mcq, labels, tmp_path, change, said):
    out = tmp_path / "b.jsonl"
    assert said in eval_mcq.refuses("build", *labels, *change, "--out", out)
    assert not out.exists()


def test_build_leaves_out_a_broken_image_or_stops_there_and_names_its_row_only(eval_mcq, labels, tmp_path):
    build = ("build", *labels, *FOUR, "--out", tmp_path / "b.jsonl")
    (tmp_path / "photos" / "cataract2.png").write_bytes(b"no picture")
    error = eval_mcq.refuses(*build, "--strict")
    assert "row 8: the image is not in a supported format" in error
    (tmp_path / "photos" / "cataract2.png").unlink()
    assert "row 8: column 'file' names no file below" in eval_mcq.refuses(*build, "--strict")
    assert "cataract2" not in error
    assert not (tmp_path / "b.jsonl").exists()
    assert eval_mcq(*build) == 0, eval_mcq.err
    assert eval_mcq.err.splitlines()[-1] == "left out 1 of 16 rows: 1 no image file"
    built = load_bench(tmp_path / "b.jsonl").header.built
    assert (built["rows_read"], built["skipped"]) == (16, {"no image file": 1})


def test_an_empty_label_table_is_refused(eval_mcq, labels, tmp_path):
    labels[1].write_text("file,labels,patient\n")
    assert "has a header but no rows" in eval_mcq.refuses("build", *labels, "--out", tmp_path / "b.jsonl")


def test_an_existing_bench_is_kept_unless_forced(eval_mcq, labels, tmp_path):
    out = tmp_path / "b.jsonl"
    out.write_text("mine")
    assert "--force" in eval_mcq.refuses("build", *labels, *FOUR, "--out", out)
    assert out.read_text() == "mine"
    assert eval_mcq("build", *labels, *FOUR, "--out", out, "--force") == 0
    assert len(load_bench(out).items) == 16


def test_run_refuses_a_question_that_makes_no_sense(eval_mcq, tiny_llava, tmp_path):
    bench = write_bench(tmp_path / "b.jsonl", [question("q", answer="D")])
    error = eval_mcq.refuses("run", "--model", tiny_llava, "--bench", bench, "--out", tmp_path / "run")
    assert "(id 'q'): answer 'D' is not among the options A-C" in error
    assert not (tmp_path / "run").exists()


def test_run_refuses_what_is_no_model(eval_mcq, tmp_path):
    bench = small_bench(tmp_path)
    error = eval_mcq.refuses("run", "--model", tmp_path, "--bench", bench, "--out", tmp_path / "run")
    assert "is not a model folder: it has no config.json" in error
    assert "unknown --device 'gpu'" in eval_mcq.refuses(
        "run",
        "--model",
        write_tiny_llava(tmp_path / "m"),
        "--bench",
        bench,
        "--out",
        tmp_path / "run",
        "--device",
        "gpu",
    )
    assert not (tmp_path / "run").exists()


def test_a_model_that_changed_since_does_not_reuse_answers(eval_mcq, tmp_path):
    bench, model = small_bench(tmp_path), tmp_path / "model"
    call = ("run", "--model", write_tiny_llava(model), "--bench", bench, "--out", tmp_path / "run")
    assert eval_mcq(*call) == 0
    write_tiny_llava(model, seed=1)
    assert "was made with a different model" in eval_mcq.refuses(*call)
    assert eval_mcq(*call, "--force") == 0


def test_compare_refuses_what_cannot_be_compared(eval_mcq, tmp_path):
    a = save_run(run_of_counts({"DR": (1, 2)}), tmp_path / "a")
    b = save_run(run_of_counts({"DR": (1, 2)}, bench="c" * 64), tmp_path / "b")
    assert "differ in their bench" in eval_mcq.refuses("compare", f"base={a}", f"mgll={b}")
    assert "does not have the form NAME=RUN" in eval_mcq.refuses("compare", a, b)
    assert "two arms are named 'x'" in eval_mcq.refuses("compare", f"x={a}", f"x={a}")
    assert "two or more" in eval_mcq.refuses("compare", f"x={a}")
    assert "is not a run" in eval_mcq.refuses("compare", f"x={a}", f"y={tmp_path}")
    (tmp_path / "t.md").write_text("mine")
    assert "--force" in eval_mcq.refuses("table", a, "--format", "markdown", "--out", tmp_path / "t.md")


@pytest.mark.parametrize("command", ["build", "export", "run", "table", "compare"])
def test_every_command_explains_itself_with_an_example(eval_mcq, command):
    assert eval_mcq(command, "--help") == 0
    assert f"eval-mcq {command}" in eval_mcq.out
    assert "Example:" in eval_mcq.out
