"""What the published counts can and cannot support, computed rather than copied."""

import csv
import json
import math
from fractions import Fraction

import pytest
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from eval_mcq import audit_table
from eval_mcq.audit import audit
from eval_mcq.tables.published import PAPER, counts_behind, load_published
from mgll_encoder.common.errors import BadDataError, NotFoundError


@pytest.fixture(scope="module")
def table():
    return load_published()


@pytest.fixture(scope="module")
def findings(table):
    return audit(table)


def test_the_shipped_table_is_the_printed_one(table, real_data):
    path = real_data.parent / "paper" / "table2_mcq.csv"
    if not path.is_file():
        pytest.skip(f"no printed table at {path}")
    with path.open() as stream:
        printed = list(csv.DictReader(stream))
    assert [
        {"model": r.model, "arm": r.arm, **r.cells, "Average": r.average, "gain_printed": r.gain}
        for r in table.rows
    ] == printed


def test_three_cells_are_no_share_of_their_number_of_questions(findings):
    assert [(m.row.model, m.row.arm, m.disease, m.row.cells[m.disease]) for m in findings.misfits] == [
        ("InstructBLIP", "base", "AMD", "80.17"),
        ("InstructBLIP", "base", "Glaucoma", "59.30"),
        ("LLaVA-Med", "base", "DME", "16.67"),
    ]
    assert findings.misfits[0].neighbors == [(137, "80.12"), (138, "80.70")]


def test_the_inferred_numbers_of_questions_explain_the_cells_best(table):
    """Independent of the shipped numbers: each cell may be a misprint with 2 %, and large n are less likely."""

    def fit(disease: str, n: int) -> float:
        cells = [Fraction(row.cells[disease]) for row in table.rows]
        ways = [
            sum(abs(Fraction(100 * k, n) - cell) <= Fraction(1, 200) for k in _near(cell, n))
            for cell in cells
        ]
        return sum(math.log(0.98 * way / (n + 1) + 0.02 / 10001) for way in ways) - math.log(n)

    def _near(cell: Fraction, n: int) -> range:
        return range(max(0, int(cell * n / 100) - 1), min(n, int(cell * n / 100) + 2) + 1)

    assert {d: max(range(2, 300), key=lambda n, d=d: fit(d, n)) for d in table.diseases} == table.questions


def test_46_of_80_cells_cannot_reach_significance_under_any_pairing(findings):
    assert (findings.unsupported, findings.compared) == (46, 80)
    assert [
        sum(c.best >= 0.05 for c in findings.changes[d]) for d in ("CSR", "Retinitis", "Tessellation")
    ] == [8] * 3


def test_no_pairing_of_a_column_beats_the_best_case(table):
    """Every pairing that the counts allow, tried one by one with statsmodels' test."""
    base, after = table.models["Janus-Pro"]
    change = next(c for c in audit(table).changes["CSR"] if c.row is after)
    before_right, after_right, n = table.count(base, "CSR"), table.count(after, "CSR"), 7
    p_values = []
    for both in range(max(0, before_right + after_right - n), min(before_right, after_right) + 1):
        lost, gained = before_right - both, after_right - both
        p_values.append(
            reference_mcnemar([[both, lost], [gained, n - both - lost - gained]], exact=True).pvalue
        )
    assert (change.best, change.worst) == (pytest.approx(min(p_values)), pytest.approx(max(p_values)))


def test_over_all_questions_most_gains_hold_whatever_the_pairing(findings):
    worst = {change.row.model: round(change.worst, 3) for change in findings.pooled}
    assert {m: worst[m] for m in ("LLaVA", "InternVL", "Mini-Gemini", "Janus-Pro")} == {
        "LLaVA": 0.058, "InternVL": 0.049, "Mini-Gemini": 0.025, "Janus-Pro": 0.01,
    }  # fmt: skip
    assert max(worst[m] for m in worst.keys() - {"LLaVA", "InternVL", "Mini-Gemini", "Janus-Pro"}) <= 0.005


def test_all_averages_and_gains_are_consistent(findings):
    assert (findings.averages, findings.gains) == (16, 8)
    assert {round(error, 1) for error in findings.macro_error.values()} <= {x / 10 for x in range(24, 36)}


@pytest.mark.parametrize(
    ("printed", "n", "counts"),
    [
        ("80.17", 171, []),
        ("80.12", 171, [137]),
        ("0.00", 7, [0]),
        ("100", 7, [7]),
        ("50.0", 2000, [999, 1000, 1001]),
    ],
)
def test_counts_behind_a_printed_percentage(printed, n, counts):
    assert counts_behind(printed, n) == counts


def test_python_users_get_the_findings_and_the_tables(findings, tmp_path):
    found = audit_table()
    assert found.findings == findings
    text = found.render("markdown")
    assert text.startswith(found.by_disease.to_markdown())
    assert text.endswith(found.by_model.to_markdown())
    assert "46 of 80 cells cannot reach p < 0.05" in text
    with pytest.raises(NotFoundError):
        audit_table(tmp_path / "none.json")


def test_the_command_says_so(eval_mcq, tmp_path):
    for format_ in ("rich", "markdown", "csv", "latex"):
        assert eval_mcq("audit", "--format", format_) == 0
        assert "Tessellation" in eval_mcq.out
    assert eval_mcq("audit", "--format", "markdown", "--out", tmp_path / "a.md") == 0
    text = (tmp_path / "a.md").read_text()
    assert "46 of 80 cells cannot reach p < 0.05" in text
    assert "80.17 is not k/171 (nearest: 137 = 80.12, 138 = 80.70)" in text
    assert "--force" in eval_mcq.refuses("audit", "--out", tmp_path / "a.md")


def test_a_table_of_ones_own_is_checked(eval_mcq, tmp_path):
    data = json.loads(PAPER.read_text())
    data["rows"] = data["rows"][:2]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data))
    assert eval_mcq("audit", "--table", path, "--format", "markdown") == 0
    assert "4 of 10 cells cannot reach" in eval_mcq.out
    del data["rows"][0]["cells"]["CSR"]
    path.write_text(json.dumps(data))
    assert "row 'InstructBLIP base' has different diseases than 'questions'" in eval_mcq.refuses(
        "audit", "--table", path
    )


@pytest.mark.parametrize(
    ("row", "field", "value", "said"),
    [
        (0, "cells", "n/a", "'n/a' is not a printed percentage, such as 80.17"),
        (0, "cells", "101", "is not a printed percentage"),
        (0, "cells", "1e5", "is not a printed percentage"),
        (0, "average", "NaN", "is not a printed percentage"),
        (1, "gain", "much", "is not a printed difference"),
        (None, "questions", 0, "greater than or equal to 1 .found 0."),
        (None, "questions", 10**12, "less than or equal to"),
        (None, "questions", "n", "should be a valid integer"),
    ],
)  # fmt: skip
def test_a_printed_table_that_makes_no_sense_is_named_by_field(tmp_path, row, field, value, said):
    table = json.loads(PAPER.read_text())
    place = table if row is None else table["rows"][row]
    if field in ("cells", "questions"):
        place, field = place[field], next(iter(place[field]))
    place[field] = value
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table))
    with pytest.raises(BadDataError, match=rf"table .*t\.json: field '.*{field}.*{said}"):
        load_published(path)
