"""``mgll-encoder probe``: classification with a tower, frozen or fine-tuned."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgll_encoder import api
from mgll_encoder.cli import dataset_options as labeled
from mgll_encoder.cli.dataset_options import print_result, said
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.probing.labeled_set import LabeledSet

if TYPE_CHECKING:
    from mgll_encoder.api import Scored
    from mgll_encoder.common.skipped import Skipped
    from mgll_encoder.data.label_table import LabeledImages
    from mgll_encoder.tower.load import Tower


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
        raise UserError(
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
    score = api.linear(min_positives, workers)
    if mode == "finetune":
        settings["seed"] = seed
        score = partial(
            _finetuned, positives=min_positives, workers=workers, settings=settings, trainings=trainings or 1,
            tower_out=tower_out, force=force,
        )  # fmt: skip
    found = api.evaluate_trained(
        encoder, question, score, activation=activation, weights=weights, strict=strict
    )
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


def _finetuned(
    tower: "Tower",
    labels: "LabeledImages",
    skipped: "Skipped",
    *,
    positives: int,
    workers: int | None,
    settings: dict[str, Any],
    trainings: int,
    tower_out: Path | None,
    force: bool,
) -> "Scored":
    import numpy as np

    from mgll_encoder.common.files import cache_folder
    from mgll_encoder.common.picture_bytes import picture_digests
    from mgll_encoder.common.trained_on import TOWER, Training, trainings_of
    from mgll_encoder.probing.features import open_every_image
    from mgll_encoder.probing.finetune import CHOSEN_BY, FinetuneOptions, finetune
    from mgll_encoder.probing.linear import kept_labels
    from mgll_encoder.tower.save import save_tower

    options = FinetuneOptions(**settings)
    labels = open_every_image(labels, skipped)
    api.need_kept(kept_labels(labels, positives), positives)
    cache = cache_folder("finetune")
    runs = [
        finetune(
            tower,
            labels,
            replace(options, seed=options.seed + i),
            cache,
            positives=positives,
            workers=workers,
        )
        for i in range(trainings)
    ]
    best = max(runs, key=lambda run: run.validation)
    if tower_out:
        digests = picture_digests(best.trained_on, "Hashing the training images").values()
        trained = [
            *trainings_of(tower.header.source),
            Training.of((TOWER,), "probe --mode finetune", digests),
        ]
        provenance = {"finetuning": {**best.record, CHOSEN_BY: best.validation, **skipped.record()}}
        save_tower(best.tower, tower_out, force, provenance, trainings=trained)
    record = {"finetuning": [{**run.record, f"validation_{CHOSEN_BY}": run.validation} for run in runs]}
    return np.stack([run.scores for run in runs]), runs[0].kept, labels, record
