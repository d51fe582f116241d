"""Writing of a report: a self-contained HTML page, and the plots as files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eval_mcq.html_report.content import Content, check_unchanged, gather
from eval_mcq.html_report.figures import IN_PAGE, ON_WHITE, PALETTE, page_svg, plots
from eval_mcq.html_report.models import models_of
from eval_mcq.html_report.results import results_of
from eval_mcq.html_report.thumbnails import as_files, inlined
from eval_mcq.items.schema import Bench
from eval_mcq.records.run_record import Run
from eval_mcq.tables.results import Comparison
from eval_mcq.tables.summary import compare
from eval_mcq.tables.table_layout import by_disease
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import check_free, new_folder, write_text


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Attributes:
        assets: Folder for the thumbnails, instead of inside the page; next to the page or below its folder.
        plots: Folder for the plots as PNG and SVG files; None for none.
        thumbnail: Longer side of a thumbnail in pixels.
        images: Whether to show thumbnails.
        control: Arm that the others are compared with, see `eval_mcq.tables.summary.compare`.
    """

    assets: Path | None = None
    plots: Path | None = None
    thumbnail: int = 256
    images: bool = True
    control: str | None = None


def write_report(
    arms: Mapping[str, Run], bench: Bench, out: Path, options: ReportOptions, *, force: bool = False
) -> int:
    """Write the page.

    Args:
        arms: Arm name to run.
        bench: The benchmark of the runs.
        out: The page.
        options: See `ReportOptions`.
        force: Replace existing outputs.

    Returns:
        Number of thumbnails.

    Raises:
        UserError: an output exists, the runs cannot be compared, the benchmark is a different one, or an image is
            missing or has changed.
    """
    check_free(out, force)
    for folder in (options.assets, options.plots):
        if folder:
            check_free(folder, force)
    if options.assets and not options.assets.resolve().is_relative_to(out.resolve().parent):
        raise InvalidArgumentError(
            f"assets folder {options.assets} is not below {out.parent}: the page cannot refer to it"
        )
    comparison = compare(arms, options.control)
    content = gather(arms, bench)
    data = content.data() | _references(comparison)
    data |= {"sources": _thumbnails(content, out, options, force)}
    if options.plots:
        with new_folder(options.plots, force) as partial:
            drawn = plots(content, comparison, models_of(arms).curves, ON_WHITE)
            for plot in chain(*drawn):
                (partial / f"{plot.name}.svg").write_text(plot.svg(), encoding="utf-8")
                (partial / f"{plot.name}.png").write_bytes(plot.png())
    write_text(out, _page(content, comparison, data), force)
    return len(data["sources"])


def _references(comparison: Comparison) -> dict[str, object]:
    """Return the index of each arm's reference, for the browser's flips; -1 for the first arm; and how many colors."""
    names = [arm.name for arm in comparison.arms]
    against = [names.index(arm.against) if arm.against else -1 for arm in comparison.arms]
    return {"against": against, "colors": len(PALETTE)}


def _thumbnails(content: Content, out: Path, options: ReportOptions, force: bool) -> list[str]:
    if not options.images:
        return []
    check_unchanged(content)
    if options.assets is None:
        return inlined(content.images, options.thumbnail)
    with new_folder(options.assets, force) as partial:
        names = as_files(content.images, options.thumbnail, partial)
    below = options.assets.resolve().relative_to(out.resolve().parent)
    return [f"{below.as_posix()}/{name}" for name in names]


def _page(content: Content, comparison: Comparison, data: Mapping[str, object]) -> str:
    environment = Environment(
        loader=PackageLoader("eval_mcq.html_report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    part = files("eval_mcq.html_report").joinpath("page")
    models = models_of(content.arms)
    drawn, curves = (
        [(plot, Markup(page_svg(plot))) for plot in some]
        for some in plots(content, comparison, models.curves, IN_PAGE)
    )
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        grid=by_disease(comparison),
        results=results_of(comparison),
        palette=PALETTE,
        plots=drawn,
        models=models,
        curves=curves,
        records={name: run.record for name, run in content.arms.items()},
        names={name: Path(run.record.model).name for name, run in content.arms.items()},
        style=Markup(part.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(part.joinpath("report.js").read_text(encoding="utf-8")),
        # "<" could end the script element with the data
        data=Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
    )
