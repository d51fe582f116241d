"""``mgll-encoder probe``: classification with a tower, frozen or fine-tuned."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from mgll_encoder import api
from mgll_encoder.cli import dataset_options as labeled
from mgll_encoder.cli.dataset_options import print_result
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.cli import say
from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.probing.options import LabeledProbeKeywords

Protocol = Literal["linear", "finetune"]
_TITLES = {"linear": "Linear probe of {}, in %", "finetune": "Fine-tuned {}, in %"}


@needs("probe")
def probe(
    encoder: labeled.Encoder,
    images: labeled.Images,
    labels: labeled.Labels = None,
    protocol: Annotated[
        Protocol,
        typer.Option(help="linear: frozen features; finetune: train tower and linear head together."),
    ] = "linear",
    dataset: labeled.Dataset = None,
    image_column: labeled.ImageColumn = "file",
    labels_column: labeled.LabelsColumn = "labels",
    binary_columns: tables.BinaryColumns = "",
    label_separator: tables.LabelSeparator = None,
    uncertain: tables.UncertainCells = "ignore",
    encoding: tables.Encoding = None,
    sheet: tables.Sheet = None,
    patient_column: labeled.PatientColumn = None,
    split_column: labeled.SplitColumn = None,
    test_labels: labeled.TestLabels = None,
    test_images: labeled.TestImages = None,
    test_list: labeled.TestList = None,
    only: labeled.Only = "",
    min_positives: labeled.MinPositives = 10,
    activation: labeled.ActivationName = None,
    weights: labeled.WeightsName = None,
    test_share: labeled.TestShare = 0.3,
    split_seed: labeled.SplitSeed = 0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of --protocol finetune.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(help="finetune: passes over the training images (default 20).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="finetune: images per step (default 32).")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="finetune: peak learning rate (default 1e-4).")
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option(
            help="finetune: share of the training patients for the validation split, which chooses the epoch "
            "(default 0.15)."
        ),
    ] = None,
    trainings: Annotated[
        int | None,
        typer.Option(
            min=1, help="finetune: number of runs, with seeds from --seed on; results are means (default 1)."
        ),
    ] = None,
    tower_out: Annotated[
        Path | None,
        typer.Option(help="finetune: new folder for the tower with the best validation result."),
    ] = None,
    compare: Annotated[
        Literal["paper"] | None, typer.Option(help="paper: add the published results of the MGLL paper.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    strict: labeled.Strict = False,
    workers: labeled.Workers = None,
    device: compute.Device = AUTO,
    force: labeled.Force = False,
    _: Annotated[
        bool,
        typer.Option(
            "--list",
            is_eager=True,
            callback=labeled.table_of_datasets,
            help="List the known data sets and exit.",
        ),
    ] = False,
) -> None:
    """Train a classifier on a tower and evaluate it on other patients: AUC, mAP, accuracy, with intervals.

    By default a linear classifier on frozen features, which are cached (MGLL_CACHE_DIR, by default ~/.cache/mgll-mllm),
    so that a second probe of the same images takes seconds. With --protocol finetune the tower is trained, too; after a
    kill, re-run the same command to continue from the last complete epoch.

    Example: mgll-encoder probe --encoder mgll-fundus --labels labels.csv --images images --patient-column patient
    """
    from mgll_encoder.probing.benchmarks import PROTOCOLS, published_rows

    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "val_share": val_share,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    beyond = [
        name for name, value in {**given, "trainings": trainings, "tower_out": tower_out}.items() if value
    ]
    if protocol != "finetune" and beyond:
        raise InvalidArgumentError(
            f"--{beyond[0].replace('_', '-')} has no effect on a linear probe: add --protocol finetune"
        )
    published = published_rows(dataset, PROTOCOLS[protocol]) if compare else {}
    for path in filter(None, (out, tower_out)):
        check_free(path, force)
    options = LabeledProbeKeywords(
        dataset=dataset, image_column=image_column, labels_column=labels_column, binary_columns=binary_columns,
        patient_column=patient_column, split_column=split_column, test_labels=test_labels, test_images=test_images,
        test_list=test_list, only=only, test_share=test_share, split_seed=split_seed,
        reading=tables.reading(encoding, sheet, label_separator, uncertain), min_positives=min_positives,
        activation=activation, weights=weights, seed=seed, strict=strict, workers=workers, device=device,
    )  # fmt: skip
    if protocol == "finetune":
        found = api.finetune_probe(
            encoder, labels, images, trainings=trainings or 1, tower_out=tower_out, settings=settings, force=force,
            **options,
        )  # fmt: skip
    else:
        found = api.linear_probe(encoder, labels, images, **options)
    print_result(found.result, _TITLES[protocol].format(encoder), published, found.names)
    if out:
        content = {
            "encoder": str(encoder), "labels": str(labels or images), "protocol": protocol, "seed": seed,
            "split_seed": split_seed, "test_share": test_share,
            **found.record, **found.skipped.record(), **asdict(found.result),
        }  # fmt: skip
        write_text(out, json.dumps(content, indent=2) + "\n", force)
        say(f"written: {out}")
    if tower_out:
        say(f"tower: {tower_out}")
    found.skipped.say()
