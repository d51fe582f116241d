"""The Python API of eval_mcq as a user calls it: from labels to a comparison and a page."""

import pytest

from eval_mcq import build_benchmark, compare, load_benchmark, report, run
from mgll_encoder.common.errors import UserError
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
    with pytest.raises(UserError, match="nope does not exist"):
        run(tiny_llava, tmp_path / "nope")
    with pytest.raises(UserError, match="is not a run"):
        compare({"base": tmp_path})
