"""``mgll-encoder probe``: classification with a tower, frozen or fine-tuned."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder.cli import dataset_options as labeled
from mgll_encoder.cli.dataset_options import print_result, said
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.probing.evaluation import evaluate_trained, finetuned, linear
from mgll_encoder.probing.labeled_set import LabeledSet

MODES = ("linear", "finetune")
_TITLES = {"linear": "Linear probe of {}, in %", "finetune": "Fine-tuned {}, in %"}


@needs("probe")
def probe(
    encoder: labeled.Encoder,
    images: labeled.Images,
    data: labeled.Data = None,
    mode: Annotated[
        str, typer.Option(help="linear: frozen features; finetune: train tower and linear head together.")
    ] = "linear",
    benchmark: labeled.BenchmarkName = None,
    image_column: labeled.ImageColumn = "file",
    labels_column: labeled.LabelsColumn = "labels",
    binary_columns: tables.BinaryColumns = "",
    label_separator: tables.LabelSeparator = None,
    uncertain: tables.UncertainCells = "ignore",
    encoding: tables.Encoding = None,
    sheet: tables.Sheet = None,
    patient_column: labeled.PatientColumn = None,
    split_column: labeled.SplitColumn = None,
    test_data: labeled.TestData = None,
    test_images: labeled.TestImages = None,
    test_list: labeled.TestList = None,
    only: labeled.Only = "",
    min_positives: labeled.MinPositives = 10,
    activation: labeled.ActivationName = None,
    weights: labeled.WeightsName = None,
    test: labeled.TestShare = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of the split, the bootstrap and the fine-tuning.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(help="finetune: passes over the training images (default 20).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="finetune: images per step (default 32).")] = None,
    lr: Annotated[float | None, typer.Option(help="finetune: peak learning rate (default 1e-4).")] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="finetune: share of training patients used to choose the epoch (default 0.15)."),
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
    compare: Annotated[str | None, typer.Option(help="'paper': also print the published results.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    strict: labeled.Strict = False,
    workers: labeled.Workers = None,
    force: labeled.Force = False,
    _: Annotated[
        bool,
        typer.Option(
            "--list",
            is_eager=True,
            callback=labeled.table_of_benchmarks,
            help="List the benchmarks and exit.",
        ),
    ] = False,
) -> None:
    """Train a classifier on a tower and evaluate it on other patients: AUC, mAP, accuracy, with intervals.

    By default a linear classifier on frozen features, which are cached (MGLL_CACHE_DIR, by default ~/.cache/mgll-mllm),
    so that a second probe of the same images takes seconds. With --mode finetune the tower is trained, too; after a
    kill, re-run the same command to continue from the last complete epoch.

    Example: mgll-encoder probe --encoder mgll-fundus --data labels.csv --images images --patient-column patient
    """
    from mgll_encoder.probing.benchmarks import PROTOCOLS, published_rows

    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "validation": validation}
    settings = {name: value for name, value in given.items() if value is not None}
    beyond = [
        name for name, value in {**given, "trainings": trainings, "tower_out": tower_out}.items() if value
    ]
    if mode != "finetune" and beyond:
        raise InvalidArgumentError(
            f"--{beyond[0].replace('_', '-')} has no effect on a linear probe: add --mode finetune"
        )
    if compare not in (None, "paper"):
        raise unknown_name("comparison", compare, ["paper"])
    published = published_rows(benchmark, PROTOCOLS[mode]) if compare else {}
    for path in filter(None, (out, tower_out)):
        check_free(path, force)
    question = LabeledSet(
        data, images, benchmark, image_column, labels_column, binary_columns, patient_column, split_column,
        test_data, test_images, test_list, only, test, seed,
        tables.reading(encoding, sheet, label_separator, uncertain),
    )  # fmt: skip
    score = linear(min_positives, workers)
    if mode == "finetune":
        score = finetuned(
            {**settings, "seed": seed}, min_positives=min_positives, workers=workers,
            trainings=trainings or 1, tower_out=tower_out, force=force,
        )  # fmt: skip
    found = evaluate_trained(encoder, question, score, activation=activation, weights=weights, strict=strict)
    print_result(found.result, _TITLES[mode].format(encoder), published, found.names)
    if out:
        content = {
            "encoder": str(encoder), "data": str(data or images), "mode": mode, "seed": seed, "test": test,
            **found.record, **found.skipped.record(), **asdict(found.result),
        }  # fmt: skip
        write_text(out, json.dumps(content, indent=2) + "\n", force)
        said(f"written: {out}")
    if tower_out:
        said(f"tower: {tower_out}")
    found.skipped.say()
