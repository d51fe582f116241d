"""``mgll-encoder explain``: attention and attribution maps of a tower."""

from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder import api
from mgll_encoder.cli import dataset_options as labeled
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.cli import say
from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.extras import needs


@needs("probe")
def explain(
    encoder: labeled.Encoder,
    images: Annotated[
        Path, typer.Option(help="An image, a folder of images, or the folder that --labels is relative to.")
    ],
    out: Annotated[Path, typer.Option(help="The contact sheet to write (.png).")],
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help="Show the attribution for this text; repeatable (needs the text tower)."),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Show the attribution for this class of a linear probe, fitted on the training split of "
            "--labels; repeatable. The pictures are then test images, those of the class first.",
        ),
    ] = None,
    labels: labeled.Labels = None,
    dataset: labeled.Dataset = None,
    image_column: labeled.ImageColumn = "file",
    labels_column: labeled.LabelsColumn = "labels",
    binary_columns: tables.BinaryColumns = "",
    label_separator: tables.LabelSeparator = None,
    uncertain: tables.UncertainCells = "ignore",
    encoding: tables.Encoding = None,
    sheet: tables.Sheet = None,
    patient_column: labeled.PatientColumn = None,
    limit: Annotated[int, typer.Option(min=1, max=40, help="Maximum number of images on the sheet.")] = 6,
    activation: labeled.ActivationName = None,
    weights: labeled.WeightsName = None,
    split_seed: labeled.SplitSeed = 0,
    device: compute.Device = AUTO,
    strict: labeled.Strict = False,
    force: labeled.Force = False,
) -> None:
    """Overlay attention and attribution maps on images: a contact sheet.

    Columns: the image after the tower's resize rule, attention of the last block, attention rollout and, for each
    --text and --target, a class activation map. With --labels, test images are shown with their true labels. Maps show
    what influenced the tower's output, not where a disease is.

    Captions are row numbers, or positions in the order of file names: the names themselves may identify a patient.

    Example: mgll-encoder explain --encoder mgll-fundus --images photos --text glaucoma --out sheet.png
    """
    found = api.explain(
        encoder, images, out, texts=texts or (), targets=targets or (), labels=labels, limit=limit, force=force,
        dataset=dataset, image_column=image_column, labels_column=labels_column, binary_columns=binary_columns,
        patient_column=patient_column, split_seed=split_seed,
        reading=tables.reading(encoding, sheet, label_separator, uncertain),
        activation=activation, weights=weights, strict=strict, device=device,
    )  # fmt: skip
    found.skipped.say()
    say(f"{found.images} images: {out}")
