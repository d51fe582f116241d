"""What the probing commands share: their options, the images they name, and the table they print."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgll_encoder.common.cli import note, stdout, warn
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.patient_column import HELP as PATIENT_HELP
from mgll_encoder.common.table_options import listed
from mgll_encoder.common.tables import Reading
from mgll_encoder.common.texts import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mgll_encoder.common.skipped import Skipped
    from mgll_encoder.data.label_table import LabelledImages
    from mgll_encoder.probe import ProbeResult
    from mgll_encoder.tower import Tower

Encoder = Annotated[
    Path,
    typer.Option(
        "--encoder",
        help="Tower: whatever 'mgll-encoder inspect' reads, or a hub id such as openai/clip-vit-large-patch14.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Table (CSV, TSV, Excel, Parquet): image, labels, patient; see docs/tables.md."
    ),
]
Images = Annotated[Path, typer.Option("--images", help="Folder that the image column is relative to.")]
BenchmarkName = Annotated[
    str | None,
    typer.Option(
        "--benchmark",
        help="A published data set, which says what the columns are, such as rfmid or chestxray14: see --list.",
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
    typer.Option("--split-column", help="Column that says train, val or test, instead of a random split."),
]
TestData = Annotated[
    Path | None,
    typer.Option(
        "--test-data", help="Label file of the test images, for sets that publish two; all else trains."
    ),
]
TestImages = Annotated[
    Path | None, typer.Option("--test-images", help="Their folder, if it is not that of --images.")
]
TestList = Annotated[
    Path | None,
    typer.Option(
        "--test-list", help="Text file with the names of the test images, one a line; all else trains."
    ),
]
Only = Annotated[str, typer.Option("--only", help="Labels that count, separated by ';' (default: all).")]
MinPositives = Annotated[
    int,
    typer.Option(
        "--min-positives",
        min=1,
        help="Labels with fewer positive test images are left out: their figures are noise.",
    ),
]
ActivationName = Annotated[
    str | None,
    typer.Option("--activation", help="gelu or quick_gelu, for towers that do not say it themselves."),
]
WeightsName = Annotated[
    str | None,
    typer.Option(
        "--weights", help="raw or ema, for towers with a moving average of the weights beside them."
    ),
]
TestShare = Annotated[float, typer.Option("--test", help="Share of patients for the test side.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at the first row or image that would be left out.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=0, help="Processes that read images (default: one per core).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


_COLUMNS = ("file", "labels", "")
"""Defaults of the options that a benchmark answers itself."""


@dataclass(frozen=True)
class Question:
    """Which images and labels the user means; each field is the option of its name."""

    data: Path | None
    images: Path
    benchmark: str | None = None
    image_column: str = "file"
    labels_column: str = "labels"
    binary_columns: str = ""
    patient_column: str | None = None
    split_column: str | None = None
    test_data: Path | None = None
    test_images: Path | None = None
    test_list: Path | None = None
    only: str = ""
    test: float = 0.3
    seed: int = 0
    reading: Reading = field(default_factory=Reading)

    def read(self, skipped: "Skipped", both_sides: bool = True) -> "LabelledImages":
        """The labelled images; what is left out is counted in ``skipped``.

        Raises:
            UserError: see `mgll_encoder.data.label_table`; options that contradict each other.
        """
        from mgll_encoder.benchmarks import benchmark as described
        from mgll_encoder.data.label_table import Columns, Sides, read_class_files, read_labels

        if self.test_images and not self.test_data:
            raise UserError("--test-images is given without --test-data: expected both, or neither")
        if sum(map(bool, (self.test_data, self.test_list, self.split_column))) > 1:
            raise UserError(
                "--test-data, --test-list and --split-column exclude each other: give one of them"
            )
        sides = Sides(
            self.test, self.seed, _listed(self.test_list), self.test_data, self.test_images, both_sides
        )
        if self.benchmark and (self.image_column, self.labels_column, self.binary_columns) != _COLUMNS:
            raise UserError(
                f"--benchmark {self.benchmark} says what the columns are: leave their options out"
            )
        only = tuple(name.strip().casefold() for name in self.only.split(";") if name.strip())
        known = described(self.benchmark) if self.benchmark else None
        if known and not self.data and known.folders:
            if self.patient_column or self.split_column:
                raise UserError(
                    "--patient-column and --split-column need a label table: give --data, or leave them out"
                )
            columns = known.columns if known.tabled else None
            if self.test_data and not columns:
                raise UserError(f"benchmark '{self.benchmark}' has no label table: leave --test-data out")
            return read_class_files(
                self.images,
                known.folders,
                only=only,
                columns=columns,
                sides=sides,
                skipped=skipped,
                reading=self.reading,
            )
        if not self.data:
            raise UserError(
                "--data is missing: expected the label file; only sets labelled by folders need none"
            )
        if known and not known.tabled:
            raise UserError(
                f"benchmark '{self.benchmark}' is labelled by its folders: leave --data out, or leave --benchmark "
                "out and say what the columns of your file are"
            )
        if known:
            columns = known.columns
            columns = replace(
                columns, patient=self.patient_column or columns.patient, split=self.split_column
            )
            only = only or known.only
        else:
            columns = Columns(
                self.image_column, self.labels_column, listed(self.binary_columns), self.patient_column,
                self.split_column,
            )  # fmt: skip
        return read_labels(
            self.data, self.images, columns, only=only, sides=sides, skipped=skipped, reading=self.reading
        )

    def warn_of_leaks(self, data: "LabelledImages") -> None:
        """Say where test images may show patients that were trained on."""
        if divided := data.divided:
            warn(f"{len(divided)} patients have images on both sides: figures are flattered")
        elif not data.by_patient:
            warn(
                "no --patient-column: images of one patient may be on both sides, which flatters every figure"
            )


def _listed(path: Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    names = read_text(path, "--test-list").split()
    if not names:
        raise UserError(f"list {path} is empty: expected the name of a test image in each line")
    return frozenset(Path(name).name for name in names)


def open_tower(encoder: Path, activation: str | None, weights: str | None = None) -> "Tower":
    """The tower, with its warnings said."""
    from mgll_encoder.tower import load_tower

    choices: dict[str, Any] = {"activation": activation, "weights": weights}  # checked by load_tower
    tower = load_tower(encoder, **choices)
    for message in tower.header.warnings:
        warn(message)
    return tower


def need_kept(kept: list[int], min_positives: int) -> None:
    """Refuse a set of which nothing can be judged.

    Raises:
        UserError: no label is kept.
    """
    if not kept:
        raise UserError(
            f"no label has negative and {min_positives} positive test images, and both to train on: see --min-positives"
        )


def print_result(
    result: "ProbeResult",
    title: str,
    published: "Mapping[str, Mapping[str, float]]",
    names: "Mapping[str, str]",
    trained: bool = True,
) -> None:
    """The table of a probe.

    Args:
        result: What was found.
        title: Above the table.
        published: Method -> metric -> published figure in %.
        names: Label -> its name in words.
        trained: Whether training images had a part.
    """
    from rich.table import Table
    from rich.text import Text

    from mgll_encoder.probe import CONFIDENCE, METRICS, REPLICATES

    table = Table(title=Text(title), title_justify="left")
    for column in ("", "positive", *METRICS):
        table.add_column(column, justify="left" if not column else "right")
    for label, figures in result.labels.items():
        words = f"{label} ({names[label]})" if label in names else label
        table.add_row(
            Text(words), str(result.positives[label]), *(f"{figures[metric]:.1f}" for metric in METRICS)
        )
    table.add_section()
    macro = (
        f"{f.value:.1f} [{f.low:.1f}, {f.high:.1f}]" for f in (result.macro[metric] for metric in METRICS)
    )
    table.add_row("macro average", "", *macro)
    if len(result.runs) > 1:
        for place, run in enumerate(result.runs, start=1):
            table.add_row(f"  training {place}", "", *(f"{run[metric]:.1f}" for metric in METRICS))
    for name, row in published.items():
        table.add_row(
            f"paper: {name}", "", *(f"{row[metric]:.2f}" if metric in row else "–" for metric in METRICS)
        )
    stdout.print(table)
    sides = f"{result.train} training and {result.test} test images" if trained else f"{result.test} images"
    stdout.print(
        f"{sides} of {result.patients} patients; brackets: {CONFIDENCE} % bootstrap over patients "
        f"({REPLICATES} draws)",
        highlight=False,
        soft_wrap=True,
    )
    if result.left_out:
        left_out = ", ".join(result.left_out)
        note(f"left out, for want of positive or negative images (see --min-positives): {left_out}")


def said(text: str) -> None:
    """A line of result."""
    stdout.print(text, markup=False, highlight=False, soft_wrap=True)


def table_of_benchmarks(asked: bool) -> None:
    """``--list``: print the described benchmarks, and leave."""
    if not asked:
        return
    from rich.table import Table

    from mgll_encoder.benchmarks import PROTOCOLS, benchmarks, published_figures

    table = Table(title="Published probes (--benchmark)", title_justify="left")
    for heading in ("name", "labels", "published", "what, and how to name its files"):
        table.add_column(heading)
    for name, row in benchmarks().items():
        labels: Any = len(row.binary or row.only or set(row.folders.values())) or "–"
        having = [
            mode for mode, kind in PROTOCOLS.items() if row.paper and published_figures(row.paper, kind)
        ]
        about = row.title + (f"\n{row.hint}" if row.hint else "")
        table.add_row(name, str(labels), ", ".join(having) or "–", about)
    stdout.print(table)
    raise typer.Exit
