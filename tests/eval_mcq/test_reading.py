"""What a reader of the result sees first: the gain over the control, the Average by one routine, and the rotations."""

import json
import re

import pytest

from eval_mcq.html_report import ReportOptions, write_report
from eval_mcq.items.schema import load_bench
from eval_mcq.records.run_record import load_run
from eval_mcq.runs.run import finish
from eval_mcq.scoring.prompt import shown_letters
from eval_mcq.tables.multi_model import like_paper_pairs, long_table
from eval_mcq.tables.render import as_markdown, as_text
from eval_mcq.tables.summary import compare, compare_models
from eval_mcq.tables.table_layout import by_disease, like_paper
from mgll_encoder.common.errors import InvalidArgumentError
from tests.eval_mcq.helpers import run_of_bench, run_of_counts, save_run, small_bench

COUNTS = {
    "base": {"DR": (11, 40), "CSR": (5, 20)},
    "control": {"DR": (15, 40), "CSR": (5, 20)},
    "mgll": {"DR": (30, 40), "CSR": (12, 20)},
}
INTERVAL = r"\[\d+\.\d, \d+\.\d\]"


@pytest.fixture
def arms():
    return {name: run_of_counts(counts) for name, counts in COUNTS.items()}


def averages(text: str) -> set[str]:
    """Every Average of the arm ``mgll`` with its interval that a text shows."""
    return set(re.findall(rf"67\.5 {INTERVAL}", text))


def test_the_headline_is_the_gain_over_the_control_and_not_over_the_base(arms):
    for grid in (by_disease(compare(arms)), like_paper(compare(arms)), like_paper_pairs({"": compare(arms)})):
        first, second = grid.headline
        assert first.startswith("mgll against control: +36.3 [")
        assert first.endswith("(67.5 % against 31.3 %; chance 25.0 %).")
        assert second.startswith("control against base: +5.0 [")
        assert any("Gains: control against base; mgll against control" in note for note in grid.notes)
        assert any(note.startswith("mgll against base: Average +41.3 [") for note in grid.notes)
        assert f"- **{first}**" in as_markdown(grid)
        assert first in as_text(grid)
    columns = by_disease(compare(arms)).columns
    assert columns[-2:] == ["mgll over control", "p"]


def test_any_arm_can_be_the_control_and_without_one_all_are_compared_with_the_first(arms):
    retrained = {name.replace("control", "retrained"): run for name, run in arms.items()}
    assert [arm.against for arm in compare(retrained).arms] == ["", "base", "base"]
    named = compare(retrained, control="retrained")
    assert [arm.against for arm in named.arms] == ["", "base", "retrained"]
    last = {name: retrained[name] for name in ("base", "mgll", "retrained")}
    assert compare(last, control="retrained").arms[1].macro_gain == named.arms[2].macro_gain
    assert [arm.against for arm in compare(arms, control="base").arms] == ["", "base", "base"]
    with pytest.raises(
        InvalidArgumentError, match=r"no arm is named 'cotnrol' .the control.: the arms are base, con"
    ):
        compare(arms, control="cotnrol")


def test_one_arm_has_one_interval_whoever_it_is_shown_with(arms, tmp_path, eval_mcq):
    for name, run in arms.items():
        save_run(run, tmp_path / name)
    folders = [f"{name}={tmp_path / name}" for name in arms]
    alone = compare({"mgll": arms["mgll"]}).arms[0].macro
    among = compare(arms)
    assert among.arms[2].macro == alone
    assert compare(dict(reversed(arms.items()))).arms[0].macro == alone
    assert finish(tmp_path / "mgll", arms["mgll"].record).folder == tmp_path / "mgll"
    summary = json.loads((tmp_path / "mgll" / "summary.json").read_text())["arms"][0]["macro"]
    assert (summary["interval"]["low"], summary["interval"]["high"]) == (
        alone.interval.low,
        alone.interval.high,
    )

    shown = set()
    for command in (["table", tmp_path / "mgll"], ["compare", *folders]):
        for form in (["--format", "markdown", "--table-layout", "diseases"], ["--table-layout", "diseases"]):
            assert eval_mcq(*command, *form) == 0
            shown |= averages(eval_mcq.out)
    assert shown == averages(by_disease(among).rows[2][7])
    assert len(shown) == 1, "the interval of one Average"
    long = long_table({"": among})
    row = next(row for row in long.rows if row[1:4] == ["mgll", "control", "macro"])
    assert (float(row[9]), float(row[10])) == pytest.approx(
        (alone.interval.low, alone.interval.high), rel=1e-5
    )


def test_the_page_says_the_same_first_in_the_same_figures(tmp_path, eval_mcq):
    bench = load_bench(small_bench(tmp_path, 10))
    for name, every in (("base", 2), ("control", 3), ("mgll", 9)):
        save_run(run_of_bench(bench, lambda number, every=every: number % every == 0), tmp_path / name)
    runs = {name: load_run(tmp_path / name) for name in ("base", "control", "mgll")}
    write_report(runs, bench, tmp_path / "report.html", ReportOptions())
    page = (tmp_path / "report.html").read_text()
    grid = by_disease(compare(runs))
    head = page[page.index("<header>") : page.index("</header>")]
    written = [line.replace(" %", "\u00a0%") for line in grid.headline]
    assert [line for line in written if f'<p class="headline">{line}</p>' in head] == written
    assert head.index("mgll against control") < head.index("control against base")
    average = next(row for row in grid.rows if row[0] == "Average")
    value, interval = average[7].split(" ", 1)
    assert f"</span> {value}&nbsp;% {interval}" in head
    assert '"against":[-1,0,1]' in page

    folders = [f"{name}={tmp_path / name}" for name in runs]
    again = tmp_path / "again.html"
    assert eval_mcq("report", *folders, "--control-arm", "base", "--out", again) == 0
    assert "mgll against base" in again.read_text().partition("</header>")[0]
    refusal = eval_mcq.refuses("report", *folders, "--control-arm", "x", "--out", tmp_path / "no.html")
    assert "no arm is named 'x'" in refusal


def rotated(right: int, of: int = 40):
    """A run that knows ``right`` of the answers and says A otherwise, each question in four orders."""
    run = run_of_counts({"DR": (of, of)})
    rows = []
    for number, row in enumerate(run.rows):
        gold = "ABCD"[number % 4]
        for rotation in range(4):
            shown = shown_letters(4, rotation)
            said = gold if number < right else "ABCD"[shown.index("A")]
            sure = [0.4 if letter == said else 0.2 for letter in "ABCD"]
            rows.append(
                row.model_copy(
                    update={
                        "rotation": rotation, "shown": shown, "gold": gold, "chosen": said, "probabilities": sure,
                    }
                )
            )  # fmt: skip
    return type(run)(run.folder, run.record.model_copy(update={"rotations": 4}), rows)


def test_rotations_stand_side_by_side_with_what_they_mean():
    comparison = compare({"base": rotated(0), "control": rotated(8), "mgll": rotated(32)})
    grid = by_disease(comparison)
    rows = {row[0]: row for row in grid.rows}
    assert [row[0] for row in grid.rows][-4:] == [
        "Average", "All questions", "Average, one order", "Average, all 4 orders",
    ]  # fmt: skip
    assert [rows[name][1:3] for name in list(rows)[-2:]] == [["160", "25.0"], ["40", "0.4"]]
    assert rows["Average, one order"][3].startswith("25.0 [")  # it always says A: a quarter of single orders
    assert rows["Average, all 4 orders"][3].startswith("0.0 [")
    assert rows["Average, all 4 orders"][7].startswith("80.0 [")
    assert rows["Average, all 4 orders"][8].startswith("+60.0 [")
    assert rows["Average, one order"][7].startswith("85.0 [")
    assert re.search(
        rf"^mgll against control: \+\d+\.\d {INTERVAL} points .* %\); one order \+\d+\.\d {INTERVAL}; "
        rf"all 4 orders \+60\.0 {INTERVAL}\.$",
        grid.headline[0],
    )
    explained = [note for note in grid.notes if note.startswith("Every question is asked in up to 4 orders")]
    assert len(explained) == 1

    paper = like_paper(comparison)
    line = next(note for note in paper.notes if note.startswith("mgll: Average "))
    assert re.fullmatch(
        rf"mgll: Average \d+\.\d {INTERVAL}; one order 85\.0 {INTERVAL}; all 4 orders 80\.0 {INTERVAL}\.",
        line,
    )
    pairs = like_paper_pairs(compare_models({"m": {"base": rotated(0), "mgll": rotated(32)}}))
    assert f"m {line}" in pairs.notes
    long = {(row[1], row[3]): row for row in long_table({"": comparison}).rows}
    assert float(long["mgll", "macro, all orders"][8]) == 0.8
    assert float(long["mgll", "macro, one order"][8]) == 0.85


def test_without_rotations_nothing_is_said_of_them(arms):
    grid = by_disease(compare(arms))
    assert not [
        text for text in [*(row[0] for row in grid.rows), *grid.notes, *grid.checks] if "order" in text
    ]
