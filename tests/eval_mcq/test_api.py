"""The Python API of eval_mcq as a user calls it: from labels to a comparison and a page."""

import pytest

from eval_mcq import (
    build_benchmark,
    check_model,
    compare,
    export_benchmark,
    import_benchmark,
    load_benchmark,
    report,
    run,
)
from mgll_encoder.common.errors import (
    InvalidArgumentError,
    NotFoundError,
    OutputTakenError,
    UnknownNameError,
)
from tests.builders import tiny_llava as write_tiny_llava
from tests.eval_mcq.helpers import write_labels

ROWS = [
    {"file": f"{disease}{i}.png", "labels": disease, "patient": f"{disease}{i}"}
    for disease in ("glaucoma", "cataract", "AMD", "DR")
    for i in range(4)
]
FOUR = ["AMD", "Cataract", "DR", "Glaucoma"]


def test_from_labels_to_a_comparison_and_a_page(tiny_llava, tmp_path, eval_mcq):
    labels, bench = write_labels(tmp_path, ROWS), tmp_path / "bench.jsonl"
    built = build_benchmark(labels, tmp_path / "photos", bench, diseases=FOUR, patient_column="patient")
    assert built.questions.total() == 16
    assert [item.category for item in load_benchmark(bench).items].count("DR") == 4
    other = write_tiny_llava(tmp_path / "other", seed=1)
    base = run(tiny_llava, bench, tmp_path / "runs" / "base")
    assert len(base.rows) == 16
    assert run(other, bench, tmp_path / "runs" / "mgll", limit=5).complete is False
    mgll = run(other, bench, tmp_path / "runs" / "mgll")
    found = compare({"base": base, "mgll": tmp_path / "runs" / "mgll"})
    arms = (f"base={base.folder}", f"mgll={mgll.folder}")
    assert eval_mcq("compare", *arms, "--format", "markdown") == 0
    assert found.to_markdown() == eval_mcq.out
    assert "Glaucoma" in found.to_latex()
    assert report({"base": base, "mgll": mgll}, tmp_path / "report.html", bench=bench) == 16
    assert (tmp_path / "report.html").is_file()


def test_mistakes_are_exceptions(tiny_llava, tmp_path):
    with pytest.raises(NotFoundError, match="nope does not exist"):
        run(tiny_llava, tmp_path / "nope")
    with pytest.raises(NotFoundError, match="is not a run"):
        compare({"base": tmp_path})


def test_questions_go_to_another_tool_and_come_back(tmp_path):
    labels, bench = write_labels(tmp_path, ROWS), tmp_path / "bench.jsonl"
    build_benchmark(labels, tmp_path / "photos", bench, diseases=FOUR, patient_column="patient")
    assert export_benchmark(bench, tmp_path / "b.tsv", "vlmevalkit") == 16
    back = import_benchmark(tmp_path / "b.tsv", tmp_path / "back.jsonl", "vlmevalkit")
    assert (back.questions.total(), back.skipped.total) == (16, 0)
    assert back.pictures == 1, "the photographs are equal, and kept once"
    asked = [(item.question, item.options, item.answer) for item in load_benchmark(bench).items]
    assert [(i.question, i.options, i.answer) for i in load_benchmark(tmp_path / "back.jsonl").items] == asked
    with pytest.raises(OutputTakenError):
        export_benchmark(bench, tmp_path / "b.tsv", "vlmevalkit")
    for argument, value in (("images", tmp_path), ("run", tmp_path)):
        with pytest.raises(InvalidArgumentError) as refused:
            export_benchmark(bench, tmp_path / "b.parquet", "parquet", **{argument: value})
        assert refused.value.arguments == (argument,)
    with pytest.raises(UnknownNameError):
        import_benchmark(tmp_path / "b.tsv", tmp_path / "c.jsonl", "vlmevalkitt")


def test_a_model_is_checked_before_it_is_run(tiny_llava, tmp_path):
    labels, bench = write_labels(tmp_path, ROWS), tmp_path / "bench.jsonl"
    build_benchmark(labels, tmp_path / "photos", bench, diseases=FOUR, patient_column="patient")
    found = check_model(tiny_llava, load_benchmark(bench), limit=4)
    assert load_benchmark(bench).items[0].question in found.prompt
    assert (found.tower, found.trainings, found.leak) == (None, (), None)
    assert found.sensitivity.questions == 4
    assert set(found.sensitivity.moved) == {"blank", "shuffled"}
    assert check_model(tiny_llava).sensitivity is None
