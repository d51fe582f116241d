"""Shared by the probing commands: options, and the printed table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgll_encoder.common.cli import note, say, stdout
from mgll_encoder.common.patient_column import HELP as PATIENT_HELP
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mgll_encoder.probing.linear import ProbeResult

Encoder = Annotated[
    Path,
    typer.Option(
        "--encoder",
        help="Tower: anything 'mgll-encoder inspect' reads, or a hub id such as openai/clip-vit-large-patch14.",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="Table (CSV, TSV, Excel, Parquet) of image, labels and patient; see docs/tables.md."
    ),
]
Images = Annotated[Path, typer.Option("--images", help="Folder that the image column is relative to.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Published data set, which defines the columns, such as rfmid or chestxray14: see --list.",
    ),
]
ImageColumn = Annotated[
    str, typer.Option("--image-column", help="Column with the image path, or a template such as '{ID}.png'.")
]
LabelsColumn = Annotated[
    str, typer.Option("--labels-column", help="Column with a class, or with a list of labels.")
]
PatientColumn = Annotated[
    str | None,
    typer.Option("--patient-column", help=PATIENT_HELP),
]
SplitColumn = Annotated[
    str | None,
    typer.Option("--split-column", help="Column with train, val or test, instead of a random split."),
]
TestLabels = Annotated[
    Path | None,
    typer.Option(
        "--test-labels",
        help="Label file of the test images, for data sets with two files; the rest is the training set.",
    ),
]
TestImages = Annotated[
    Path | None, typer.Option("--test-images", help="Folder of the test images, if different from --images.")
]
TestList = Annotated[
    Path | None,
    typer.Option(
        "--test-list",
        help="Text file with the names of the test images, one per line; the rest is the training set.",
    ),
]
Only = Annotated[str, typer.Option("--only", help="Labels to use, separated by ';' (default: all).")]
MinPositives = Annotated[
    int,
    typer.Option(
        "--min-positives",
        min=1,
        help="Skip labels with fewer positive test images: their results are noise.",
    ),
]
ActivationName = Annotated[
    str | None,
    typer.Option("--activation", help="gelu or quick_gelu, for towers that do not specify it."),
]
WeightsName = Annotated[
    str | None,
    typer.Option("--weights", help="raw or ema, for towers stored with a moving average of their weights."),
]
TestShare = Annotated[float, typer.Option("--test-share", help="Share of patients for the test split.")]
SplitSeed = Annotated[
    int,
    typer.Option(
        "--split-seed",
        help="Seed of the split, separate from --seed; the same seed, the same split everywhere.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at the first row or image that would be skipped.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=0, help="Processes that read images (default: one per core).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def print_result(
    result: "ProbeResult",
    title: str,
    published: "Mapping[str, Mapping[str, float]]",
    names: "Mapping[str, str]",
    trained: bool = True,
) -> None:
    """Print the table of a probe.

    Args:
        result: The result.
        title: Title of the table.
        published: Method -> metric -> published result in %.
        names: Label -> its name in words.
        trained: Whether training images were used.
    """
    from mgll_encoder.probing.linear import CONFIDENCE, METRICS, REPLICATES

    table = TerminalTable(title).add_words("").add_figures("positive", *METRICS, "majority")
    for label, figures in result.labels.items():
        words = f"{label} ({names[label]})" if label in names else label
        table.add_row(
            words, str(result.positives[label]), *(f"{figures[metric]:.1f}" for metric in METRICS),
            f"{result.majority[label]:.1f}",
        )  # fmt: skip
    table.add_section()
    macro = (
        f"{f.value:.1f} [{f.low:.1f}, {f.high:.1f}]" for f in (result.macro[metric] for metric in METRICS)
    )
    table.add_row("macro average", "", *macro, f"{result.majority_macro:.1f}")
    if len(result.runs) > 1:
        for place, run in enumerate(result.runs, start=1):
            table.add_row(f"  training {place}", "", *(f"{run[metric]:.1f}" for metric in METRICS))
    for name, row in published.items():
        table.add_row(
            f"paper: {name}", "", *(f"{row[metric]:.2f}" if metric in row else "–" for metric in METRICS)
        )
    stdout.print(table)
    sides = f"{result.train} training and {result.test} test images" if trained else f"{result.test} images"
    say(
        f"{sides} of {result.patients} patients; brackets: {CONFIDENCE} % bootstrap over patients "
        f"({REPLICATES} replicates)"
    )
    say("majority: accuracy of always giving the more frequent answer; ACC says nothing below it")
    if result.left_out:
        left_out = ", ".join(result.left_out)
        note(f"skipped, too few positive or negative images (see --min-positives): {left_out}")


def table_of_datasets(asked: bool) -> None:
    """``--list``: print the known data sets, and exit."""
    if not asked:
        return
    from mgll_encoder.probing.benchmarks import PROTOCOLS, benchmarks, published_figures

    table = TerminalTable("Published data sets (--dataset)")
    table.add_words("name", "labels", "published", "description, and how to name its files")
    for name, row in benchmarks().items():
        labels: Any = len(row.binary or row.only or set(row.folders.values())) or "–"
        having = [
            mode for mode, kind in PROTOCOLS.items() if row.paper and published_figures(row.paper, kind)
        ]
        about = row.title + (f"\n{row.hint}" if row.hint else "")
        table.add_row(name, str(labels), ", ".join(having) or "–", about)
    stdout.print(table)
    raise typer.Exit
