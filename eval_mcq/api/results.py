"""Compare runs, report them, and audit a published table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from mgll_encoder.common.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from eval_mcq.audit import Audit
    from eval_mcq.records.run_record import Run
    from eval_mcq.tables.table_layout import Grid

TableLayout = Literal["diseases", "paper", "long"]


@dataclass(frozen=True)
class ComparisonTable:
    """A table of results that can be rendered.

    Attributes:
        grid: Its cells.
    """

    grid: "Grid"

    def render(self, format_: str) -> str:
        """Render as text: ``markdown``, ``csv``, ``latex`` or ``rich`` (for terminals)."""
        from eval_mcq.tables.render import RENDERERS

        return RENDERERS[format_](self.grid)

    def to_markdown(self) -> str:
        """Render as Markdown."""
        return self.render("markdown")

    def to_csv(self) -> str:
        """Render as CSV."""
        return self.render("csv")

    def to_latex(self) -> str:
        """Render as LaTeX."""
        return self.render("latex")


def compare(
    runs: "Mapping[str, Run | str | Path] | Mapping[str, Mapping[str, Run | str | Path]]",
    *,
    control_arm: str | None = None,
    table_layout: TableLayout = "paper",
    paper_rounding: bool = False,
    compare: Literal["paper"] | None = None,
) -> ComparisonTable:
    """Compare runs of one benchmark, paired question by question.

    Args:
        runs: Arm -> run or run folder, the first is the base; or model -> such arms. A single run gives its own table.
        control_arm: Arm with the same training and the old tower: gains of the others are against it, its own against
            the first arm. None for the arm called ``control``; without one all gains are against the first arm.
        table_layout: ``paper``: diseases as columns; ``diseases``: as rows, for one model; ``long``: one value per row.
        paper_rounding: Round like the published table: Average of rounded cells, gain of rounded Averages.
        compare: ``paper``: add the published rows of the MGLL paper.

    Raises:
        UserError: a folder is not a run, the runs cannot be compared, no arm has the name of the control, or the layout
            cannot show them.
    """
    models = _models(runs)
    pairs = compare is not None or len(models) > 1
    if pairs and table_layout == "diseases":
        raise InvalidArgumentError(
            "`table_layout=diseases` shows one model and no published rows: use paper or long"
        )
    if compare is not None and table_layout == "long":
        raise InvalidArgumentError(
            "`table_layout=long` has no published rows: leave `compare` out, or use `table_layout=paper`"
        )
    from eval_mcq.tables.multi_model import like_paper_pairs, long_table
    from eval_mcq.tables.published import load_published
    from eval_mcq.tables.summary import compare_models
    from eval_mcq.tables.table_layout import by_disease, like_paper

    comparisons = compare_models(models, control_arm)
    only = next(iter(comparisons.values()))
    if table_layout == "long":
        return ComparisonTable(long_table(comparisons))
    if pairs:
        return ComparisonTable(
            like_paper_pairs(comparisons, paper_rounding, load_published() if compare else None)
        )
    return ComparisonTable((by_disease if table_layout == "diseases" else like_paper)(only, paper_rounding))


def report(
    runs: "Mapping[str, Run | str | Path]",
    out: str | Path,
    *,
    control_arm: str | None = None,
    bench: str | Path | None = None,
    assets: Path | None = None,
    plots: Path | None = None,
    thumbnail_size: int = 256,
    thumbnails: bool = True,
    force: bool = False,
) -> int:
    """Write an HTML report: table, plots, every question with image and answers, and how the models were trained.

    Args:
        runs: Arm -> run or run folder.
        out: Page to write.
        control_arm: As for `compare`.
        bench: Benchmark file, if it was moved.
        assets: Folder for the thumbnails, instead of inside the page.
        plots: Folder for the plots as PNG and SVG files.
        thumbnail_size: Longer side of a thumbnail in pixels.
        thumbnails: Whether to show the images.
        force: Replace existing outputs.

    Returns:
        Number of thumbnails.

    Raises:
        UserError: a run or the benchmark cannot be read, or an output exists.
    """
    named = _arms(runs)
    asked = Path(bench or next(iter(named.values())).record.bench)
    if bench is None and not asked.is_file():
        raise NotFoundError(f"bench {asked} of the runs does not exist: give it with `bench`")
    from eval_mcq.html_report import ReportOptions, write_report
    from eval_mcq.items.schema import load_bench

    options = ReportOptions(assets, plots, thumbnail_size, thumbnails, control_arm)
    return write_report(named, load_bench(asked), Path(out), options, force=force)


@dataclass(frozen=True)
class AuditedTable:
    """What the figures of a published table can support.

    Attributes:
        findings: What was found.
        by_disease: What each disease's number of questions allows, with the findings on the whole as notes.
        by_model: Each model's gain over all questions, for the best and worst pairing.
    """

    findings: "Audit"
    by_disease: ComparisonTable
    by_model: ComparisonTable

    def render(self, format_: str) -> str:
        """Render both tables as text, as `ComparisonTable.render`."""
        return "\n".join(table.render(format_) for table in (self.by_disease, self.by_model))


def audit_table(table: str | Path | None = None) -> AuditedTable:
    """Check which claims a published table can support, given its numbers of questions.

    Args:
        table: A printed table as JSON, in the form of the packaged one; that of the MGLL paper if not given.

    Raises:
        UserError: the file cannot be read, or its figures do not fit together.
    """
    from eval_mcq.tables.published import PAPER, load_published

    published = load_published(Path(table or PAPER))
    from eval_mcq.audit import audit, by_column, by_model

    findings = audit(published)
    return AuditedTable(findings, ComparisonTable(by_column(findings)), ComparisonTable(by_model(findings)))


def _models(
    runs: "Mapping[str, Run | str | Path] | Mapping[str, Mapping[str, Run | str | Path]]",
) -> "dict[str, dict[str, Run]]":
    if all(isinstance(arms, Mapping) for arms in runs.values()):
        nested = cast("Mapping[str, Mapping[str, Run | str | Path]]", runs)
        return {model: _arms(arms) for model, arms in nested.items()}
    return {"": _arms(cast("Mapping[str, Run | str | Path]", runs))}


def _arms(arms: "Mapping[str, Run | str | Path]") -> "dict[str, Run]":
    return {name: as_run(arm) for name, arm in arms.items()}


def as_run(run: "Run | str | Path") -> "Run":
    """Read a run folder; a run is returned as it is."""
    from eval_mcq.records.run_record import load_run

    return load_run(Path(run)) if isinstance(run, str | Path) else run
