"""``mgll-encoder probe``: what a tower's frozen features know."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from mgll_encoder.common.cli import note, stdout, warn
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import check_free, write_text

if TYPE_CHECKING:
    from mgll_encoder.probe import ProbeResult
    from mgll_encoder.spec import Activation

CACHE = "MGLL_CACHE_DIR"


def probe(
    encoder: Path = typer.Option(..., help="Tower: whatever 'mgll-encoder inspect' reads."),
    data: Path = typer.Option(..., help="CSV with a header line: image, labels, patient."),
    images: Path = typer.Option(..., help="Folder that the image column is relative to."),
    benchmark: str | None = typer.Option(
        None,
        help="A published data set, which says what the columns are, such as rfmid or chestxray14.",
    ),
    image_column: str = typer.Option(
        "file", help="Column with the image path, or a template such as '{ID}.png'."
    ),
    labels_column: str = typer.Option(
        "labels", help="Column with a class, or with labels separated by ';' or '|'."
    ),
    binary_columns: str = typer.Option("", help="Columns with 0 or 1 instead, separated by commas."),
    patient_column: str | None = typer.Option(
        None, help="Column with the patient id; sides never divide a patient."
    ),
    split_column: str | None = typer.Option(
        None, help="Column that says train or test, instead of a random split."
    ),
    only: str = typer.Option("", help="Labels that count, separated by ';' (default: all)."),
    min_positives: int = typer.Option(
        10, min=1, help="Labels with fewer positive test images are left out: their figures are noise."
    ),
    activation: str | None = typer.Option(
        None, help="gelu or quick_gelu, for towers that do not say it themselves."
    ),
    test: float = typer.Option(0.3, help="Share of patients for the test side."),
    seed: int = typer.Option(0, help="Draws the sides and the bootstrap."),
    compare: str | None = typer.Option(None, help="'paper': print the published figures beside."),
    out: Path | None = typer.Option(None, help="Write the result as JSON."),
    force: bool = typer.Option(False, "--force", help="Replace an existing result."),
) -> None:
    """Fit a linear classifier on a tower's frozen features and judge it on other patients: AUC, mAP, accuracy.

    Features are kept in a cache folder (MGLL_CACHE_DIR, by default ~/.cache/mgll-mllm), so that a second probe of the
    same images takes seconds.

    Example: mgll-encoder probe --encoder mgll-fundus --data labels.csv --images images --patient-column patient
    """
    from mgll_encoder.benchmarks import benchmark as described
    from mgll_encoder.benchmarks import published_figures
    from mgll_encoder.data.label_table import Columns, read_labels
    from mgll_encoder.probe import cached_features, judge, linear_scores
    from mgll_encoder.tower import load_tower

    if compare not in (None, "paper"):
        raise unknown_name("comparison", compare, ["paper"])
    if compare and not (benchmark and described(benchmark).paper):
        raise UserError(
            "--compare paper needs --benchmark with published figures: rfmid, refuge, adam or chestxray14"
        )
    if out:
        check_free(out, force)
    wanted = tuple(name.strip().casefold() for name in only.split(";") if name.strip())
    if benchmark:
        known = described(benchmark)
        columns, wanted = known.columns, wanted or known.only
        columns = replace(columns, patient=patient_column or columns.patient, split=split_column)
    else:
        binary = tuple(name.strip() for name in binary_columns.split(",") if name.strip())
        columns = Columns(image_column, labels_column, binary, patient_column, split_column)
    labelled = read_labels(data, images, columns, only=wanted, test=test, seed=seed)
    tower = load_tower(encoder, activation=cast("Activation | None", activation))
    for message in tower.header.warnings:
        warn(message)
    cache = Path(os.environ.get(CACHE, Path.home() / ".cache" / "mgll-mllm")) / "features"
    scores, kept = linear_scores(
        cached_features(tower, labelled.images, cache), labelled, positives=min_positives
    )
    if not kept:
        raise UserError(
            f"label file {data}: no label has negative and {min_positives} positive test images, and both to train on: "
            "see --min-positives"
        )
    result = judge(scores, kept, labelled, seed=seed)
    if result.left_out:
        note(
            f"left out, for want of positive or negative images (see --min-positives): {', '.join(result.left_out)}"
        )
    if not columns.patient:
        warn("no --patient-column: images of one patient may be on both sides, which flatters every figure")
    published = {}
    if compare and benchmark:
        published = {
            f"paper: {method}": dict(figures)
            for name in described(benchmark).paper
            for method, figures in published_figures(name).items()
        }
    _print(result, encoder, published)
    if out:
        record = {"encoder": str(encoder), "data": str(data), "seed": seed, "test": test, **asdict(result)}
        write_text(out, json.dumps(record, indent=2) + "\n", force)
        stdout.print(f"written: {out}", highlight=False, soft_wrap=True)


def _print(result: "ProbeResult", encoder: Path, published: dict[str, dict[str, float]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mgll_encoder.probe import CONFIDENCE, METRICS, REPLICATES

    table = Table(title=Text(f"Linear probe of {encoder}, in %"), title_justify="left")
    for column in ("", "positive", *METRICS):
        table.add_column(column, justify="left" if not column else "right")
    for name, figures in result.labels.items():
        table.add_row(name, str(result.positives[name]), *(f"{figures[metric]:.1f}" for metric in METRICS))
    table.add_section()
    macro = (
        f"{f.value:.1f} \\[{f.low:.1f}, {f.high:.1f}]" for f in (result.macro[metric] for metric in METRICS)
    )
    table.add_row("macro average", "", *macro)
    for name, figures in published.items():
        table.add_row(
            name, "", *(f"{figures[metric]:.2f}" if metric in figures else "–" for metric in METRICS)
        )
    stdout.print(table)
    stdout.print(
        f"{result.train} training and {result.test} test images of {result.patients} patients; brackets: "
        f"{CONFIDENCE} % bootstrap over patients ({REPLICATES} draws)",
        highlight=False,
        soft_wrap=True,
    )
