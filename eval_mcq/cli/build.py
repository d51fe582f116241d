"""The command ``eval-mcq build``: questions from a table of labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eval_mcq import api
from eval_mcq.cli.items import Force, after_bench
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.cli import note, say, stdout, warn
from mgll_encoder.common.extras import needs
from mgll_encoder.common.patient_column import HELP as PATIENT_HELP
from mgll_encoder.common.tables import listed
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from eval_mcq.items.build import BuildReport


def table_of_presets(asked: bool) -> None:
    """``--list``: print the packaged presets, and exit."""
    if not asked:
        return
    from eval_mcq.items.preset import FOLDER

    table = TerminalTable("Presets (--preset)").add_words("name", "diseases", "description")
    for preset in api.list_presets():
        names = ", ".join(disease.name for disease in preset.diseases)
        table.add_row(preset.name, f"{len(preset.diseases)}: {names}", preset.about)
        table.add_section()
    stdout.print(table)
    files = f"Their files: {FOLDER} (--preset also takes a changed copy of one, see docs/formats.md#preset)"
    say(files)
    raise typer.Exit


@needs("eval")
def build(
    labels: Annotated[
        Path,
        typer.Option(help="Table (CSV, TSV, Excel, Parquet) with one row per image; see docs/tables.md."),
    ],
    images: Annotated[Path, typer.Option(help="Folder that the image column is relative to.")],
    out: Annotated[Path, typer.Option(help="Benchmark file to write (.jsonl).")],
    preset: Annotated[
        str, typer.Option(help="Preset by name, or a .json file of the same form.")
    ] = "fundus10",
    diseases: Annotated[
        str | None, typer.Option(help="Use only these diseases of the preset, separated by commas.")
    ] = None,
    options: Annotated[
        int | None, typer.Option(help="Options per question (default: the preset's).", min=2, max=26)
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column with the image path.")] = "file",
    labels_column: Annotated[
        str,
        typer.Option(
            help="Column with a list of labels; comma-separated names are read as --binary-columns: DR,AMD,CSR."
        ),
    ] = "labels",
    binary_columns: tables.BinaryColumns = "",
    label_separator: tables.LabelSeparator = None,
    uncertain: tables.UncertainCells = "ignore",
    encoding: tables.Encoding = None,
    sheet: tables.Sheet = None,
    patient_column: Annotated[
        str | None,
        typer.Option(help=PATIENT_HELP),
    ] = None,
    source_column: Annotated[str | None, typer.Option(help="Column with the name of the data set.")] = None,
    split: Annotated[Literal["train", "test", "all"], typer.Option(help="Which patients to use.")] = "all",
    test_share: Annotated[float, typer.Option(help="Share of patients in the test split.")] = 0.3,
    split_seed: Annotated[
        int,
        typer.Option(help="Seed of the split, separate from --seed, so that the test split stays the same."),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of distractors and positions.")] = 0,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Published data set that the label file is of, which defines the columns: rfmid, odir; or generic "
            "(default: the preset's)."
        ),
    ] = None,
    hard_distractors: Annotated[
        bool,
        typer.Option(
            "--hard-distractors", help="Prefer diseases that are easily confused with the true one."
        ),
    ] = False,
    min_negatives: Annotated[
        int, typer.Option(help="Refuse a disease if fewer images are without it.", min=1)
    ] = 5,
    contact_sheet: Annotated[
        Path | None,
        typer.Option(help="Also write a contact sheet (.png) of images as read and as the tower's input."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first row that would be skipped.")
    ] = False,
    force: Force = False,
    _: Annotated[
        bool,
        typer.Option(
            "--list", is_eager=True, callback=table_of_presets, help="List the packaged presets and exit."
        ),
    ] = False,
) -> None:
    """Build questions from a table of labels.

    Example: eval-mcq build --labels labels.csv --images photos --patient-column patient --split test --out b.jsonl
    """
    report = api.build_benchmark(
        labels, images, out, preset=preset,
        diseases=None if diseases is None else [name.strip() for name in diseases.split(",")],
        options=options, image_column=image_column, labels_column=labels_column,
        binary_columns=listed(binary_columns),
        reading=tables.reading(encoding, sheet, label_separator, uncertain),
        patient_column=patient_column, source_column=source_column, split=split, test_share=test_share,
        split_seed=split_seed, seed=seed, dataset=dataset, hard_distractors=hard_distractors,
        min_negatives=min_negatives, contact_sheet=contact_sheet, strict=strict, force=force,
    )  # fmt: skip
    if contact_sheet is not None:
        shown = f"{report.on_sheet} of {report.images} images to look at"
        say(f"{contact_sheet}: {shown}")
    _show_report(report, out, split)


def _show_report(report: "BuildReport", out: Path, split: str) -> None:
    from eval_mcq.items.schema import LETTERS
    from eval_mcq.tables.entries import SMALL

    counts = TerminalTable(str(out)).add_words("Disease")
    counts.add_figures("questions", "patients", "images without it")
    for category in report.categories:
        of = (report.questions, report.patients, report.negatives)
        counts.add_row(category, *(str(counter[category]) for counter in of))
    counts.add_section()
    counts.add_row("all", str(report.questions.total()), "", "")
    stdout.print(counts)
    positions = ", ".join(f"{LETTERS[i]} {n}" for i, n in sorted(report.positions.items()))
    stdout.print(f"true option: {positions}", highlight=False)
    if report.without_patient:
        note(f"{report.without_patient} rows without a patient id: each counts as a separate patient")
    if report.unasked:
        unasked = ", ".join(f"{label} ({n})" for label, n in report.unasked.most_common())
        note(f"labels that are not asked about: {unasked}")
    small = [f"{c} ({report.questions[c]})" for c in report.categories if report.questions[c] < SMALL]
    if small:
        warn(f"fewer than {SMALL} questions, so intervals are wide: {', '.join(small)}")
    report.skipped.say()
    say(after_bench(out, split))
