"""``mgll-encoder data``: build data sets for pretraining."""

from pathlib import Path

import typer

from mgll_encoder.common import table_options as tables
from mgll_encoder.common.cli import new_app, next_line, note, say, stdout, warn
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.extras import needs
from mgll_encoder.common.patient_column import HELP as PATIENT_HELP
from mgll_encoder.common.tables import listed

_PRETRAIN = "mgll-encoder pretrain --manifest {} --out tower"

app = new_app("Build data sets for pretraining.")


@app.command()
def fundus(
    labels: Path | None = typer.Option(
        None,
        help="Table (CSV, TSV, Excel, Parquet) of image, labels, patient and optional keywords; see docs/tables.md. "
        "Not needed if folders or file names give the class: the training sets of adam, refuge and palm.",
    ),
    dataset: str = typer.Option(
        "generic",
        help="generic (see the columns below), or as published: rfmid, odir (keywords per eye), refuge, adam, palm.",
    ),
    classes: str = typer.Option(
        "", help="Labels for the values of a column with one class: 0=normal,1=glaucoma."
    ),
    images: Path = typer.Option(..., help="Folder that the image column is relative to."),
    out: Path = typer.Option(..., help="The manifest to write (.jsonl or .parquet)."),
    image_column: str = typer.Option("file", help="Column with the image path."),
    labels_column: str = typer.Option("labels", help="Column with a list of labels."),
    binary_columns: tables.BinaryColumns = "",
    label_separator: tables.LabelSeparator = None,
    uncertain: tables.UncertainCells = "ignore",
    encoding: tables.Encoding = None,
    sheet: tables.Sheet = None,
    patient_column: str | None = typer.Option(None, help=PATIENT_HELP),
    keywords_column: str | None = typer.Option(
        None, help="Column with the annotators' words (default: raw_label_or_keywords, if present)."
    ),
    source_column: str | None = typer.Option(
        None, help="Column with the name of the data set (default: dataset, if present)."
    ),
    explanations: Path | None = typer.Option(None, help="Your own table of clinical explanations (JSON)."),
    test_share: float = typer.Option(0.3, help="Share of patients for the test split."),
    val_share: float = typer.Option(0.0, help="Share of patients for the validation split."),
    split_seed: int = typer.Option(0, help="Seed of the split; the same seed, the same split everywhere."),
    strict: bool = typer.Option(False, "--strict", help="Stop at the first row that would be skipped."),
    force: bool = typer.Option(False, "--force", help="Replace an existing manifest."),
) -> None:
    """Build a manifest from fundus labels: status, disease, keyword with severity, clinical explanation.

    Example: mgll-encoder data fundus --labels odir/labels.csv --images odir --out odir/manifest.jsonl
    """
    from mgll_encoder.data.fundus import EXPLANATIONS, FundusTable, build_fundus
    from mgll_encoder.data.fundus_layouts import GENERIC

    if labels is None and dataset == GENERIC:
        raise InvalidArgumentError(
            "--labels is missing: expected the label file; only data sets labeled by folders need none"
        )
    table = FundusTable(
        labels or images,
        image_column,
        labels_column,
        patient_column,
        keywords_column,
        source_column,
        dataset,
        _classes(classes),
        listed(binary_columns),
        tables.reading(encoding, sheet, label_separator, uncertain),
    )
    report = build_fundus(
        table, images, out, test_share=test_share, val_share=val_share, split_seed=split_seed,
        explanations=explanations or EXPLANATIONS, strict=strict, force=force,
    )  # fmt: skip
    report.skipped.say()
    if report.without_patient:
        warn(f"{report.without_patient} images have no patient id: each counts as a separate patient")
    if report.unexplained:
        names = ", ".join(f"{label} ({count})" for label, count in report.unexplained.most_common())
        warn(f"labels without a clinical explanation: {names}; add them to a copy of {EXPLANATIONS.name}")
    splits = ", ".join(f"{count} {side}" for side, count in sorted(report.splits.items()))
    texts = ", ".join(f"{count} {granularity}" for granularity, count in report.texts.items())
    say(f"{report.rows} images ({splits}); distinct texts: {texts}")
    say(f"manifest: {out}")
    say(next_line(_PRETRAIN, out))


def _classes(option: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in option.split(",") if part.strip()]
    for value, equals, name in pairs:
        if not (equals and value.strip() and name.strip()):
            raise InvalidArgumentError(
                f"--classes is '{option}': expected VALUE=LABEL pairs, such as 0=normal,1=glaucoma"
            )
    return {value.strip(): name.strip() for value, _, name in pairs}


@app.command()
@needs("dicom", "pydicom")
def xray(
    dicom: Path = typer.Option(..., help="Folder with DICOM files, at any depth."),
    out: Path = typer.Option(..., help="New folder for images/*.png and the manifest."),
    modalities: str = typer.Option("CR,DX", help="Values of Modality to use, separated by commas."),
    burned_in: bool = typer.Option(
        False,
        "--burned-in",
        help="Also use files that declare text (often the patient's name) burned into the picture.",
    ),
    patient_folders: bool = typer.Option(
        False,
        "--patient-folders",
        help="Treat each folder directly below --dicom as a patient; splits are by patient.",
    ),
    parquet: bool = typer.Option(
        False, "--parquet", help="Write manifest.parquet instead of manifest.jsonl, for long manifests."
    ),
    test_share: float = typer.Option(0.3, help="Share of patients for the test split."),
    val_share: float = typer.Option(0.0, help="Share of patients for the validation split."),
    split_seed: int = typer.Option(0, help="Seed of the split; the same seed, the same split everywhere."),
    workers: int = typer.Option(2, min=1, help="Processes that decode."),
    contact_sheet: Path | None = typer.Option(
        None,
        help="Also write a contact sheet (.png) of pictures as read and as the tower's input.",
    ),
    strict: bool = typer.Option(False, "--strict", help="Stop at the first file that would be skipped."),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
) -> None:
    """Build PNGs and a manifest from DICOM radiographs: modality, study description, series description.

    No other text of the header is written, and file names are replaced by hashes. Names, numbers and dates of the same
    header are removed from the two descriptions. They may contain other names: check the manifest before you share it.
    Messages number the files in the order of "find DICOM ! -type d | LC_ALL=C sort".

    Example: mgll-encoder data xray --dicom midrc --out midrc-png --patient-folders --contact-sheet sheet.png
    """
    from mgll_encoder.data.xray import MANIFEST, PARQUET_MANIFEST, build_xray

    manifest = PARQUET_MANIFEST if parquet else MANIFEST
    wanted = [name.strip().upper() for name in modalities.split(",") if name.strip()]
    report = build_xray(
        dicom, out, modalities=wanted, burned_in=burned_in, patient_folders=patient_folders, manifest=manifest,
        test_share=test_share, val_share=val_share, split_seed=split_seed, workers=workers,
        contact_sheet=contact_sheet, strict=strict, force=force,
    )  # fmt: skip
    report.skipped.say()
    if report.cut:
        note(
            f"{report.cut} study and series descriptions contained names, numbers or dates, which were removed"
        )
    if not patient_folders:
        warn(
            "each image counts as a separate patient, because the header's patient fields are not written: sort the "
            "files into one folder per patient and pass --patient-folders"
        )
    splits = ", ".join(f"{count} {side}" for side, count in sorted(report.splits.items()))
    texts = ", ".join(f"{count} {granularity}" for granularity, count in report.texts.items())
    say(f"{report.rows} images ({splits}); distinct texts: {texts}")
    if contact_sheet is not None:
        say(f"contact sheet of {report.on_sheet} images: {contact_sheet}")
    say(next_line(_PRETRAIN, out / manifest))


@app.command()
@needs("pretrain", "scipy")
def phantom(
    out: Path = typer.Option(
        ...,
        help="New folder for images/, labels.csv, views.jsonl (texts without diseases) and contact_sheet.png.",
    ),
    images_per_disease: int = typer.Option(100, help="Number of pictures per disease, and of normal eyes."),
    image_size: int = typer.Option(64, help="Side of the pictures in pixels."),
    seed: int = typer.Option(0, help="The same seed writes the same pictures."),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
) -> None:
    """Render a procedural fundus phantom: ten diseases and normal eyes, no real patients.

    Example: mgll-encoder data phantom --out phantom --images-per-disease 100
    """
    from mgll_encoder.data.phantom.dataset import write_phantom

    count = write_phantom(out, images_per_disease, image_size, seed, force)
    stdout.print(
        f"{count} phantom photographs in {out} (labels.csv, views.jsonl, contact_sheet.png)", highlight=False
    )
    made = (out / "labels.csv", out, out / "manifest.jsonl")
    say(next_line("mgll-encoder data fundus --labels {} --images {} --out {}", *made))
