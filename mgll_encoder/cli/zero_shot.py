"""``mgll-encoder zero-shot`` and ``retrieval``: evaluation of image and text tower, without training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgll_encoder import api
from mgll_encoder.cli import dataset_options as labeled
from mgll_encoder.cli.dataset_options import print_result
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.cli import say, stdout
from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.common.tables import listed
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mgll_encoder.probing.retrieval import Retrieval


@needs("probe")
def zero_shot(
    encoder: labeled.Encoder,
    images: labeled.Images,
    labels: labeled.Labels = None,
    dataset: labeled.Dataset = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="generic, fundus, xray, or your own .json file (default: the data set's, or generic)."
        ),
    ] = None,
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
    every: Annotated[
        bool,
        typer.Option("--all", help="Evaluate on all images, not only the test split: for unseen data sets."),
    ] = False,
    split_seed: labeled.SplitSeed = 0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    strict: labeled.Strict = False,
    workers: labeled.Workers = None,
    device: compute.Device = AUTO,
    force: labeled.Force = False,
) -> None:
    """Classify without training, by the similarity of an image to prompts of each class: AUC, mAP, accuracy.

    Needs a tower with its text tower: a folder written by 'mgll-encoder pretrain', or a full CLIP. The prompts of a
    class are averaged; if several labels may be true at once, a label is compared with the prompts of its absence.

    Example: mgll-encoder zero-shot --encoder mgll-fundus --labels labels.csv --images images --prompts fundus
    """
    if out:
        check_free(out, force)
    found = api.zero_shot(
        encoder, labels, images, prompts=prompts, every=every,
        dataset=dataset, image_column=image_column, labels_column=labels_column, binary_columns=binary_columns,
        patient_column=patient_column, split_column=split_column, test_labels=test_labels, test_images=test_images,
        test_list=test_list, only=only, test_share=test_share, split_seed=split_seed,
        reading=tables.reading(encoding, sheet, label_separator, uncertain), min_positives=min_positives,
        activation=activation, weights=weights, seed=seed, strict=strict, workers=workers, device=device,
    )  # fmt: skip
    print_result(found.result, f"Zero-shot classification by {encoder}, in %", {}, found.names, trained=False)
    if out:
        content = {
            "encoder": str(encoder), "labels": str(labels or images), "protocol": "zero-shot", "seed": seed,
            "split_seed": split_seed, "test_share": test_share,
            **found.record, **found.skipped.record(), **asdict(found.result),
        }  # fmt: skip
        write_text(out, json.dumps(content, indent=2) + "\n", force)
        say(f"written: {out}")
    found.skipped.say()


@needs("probe")
def retrieval(
    encoder: labeled.Encoder,
    manifest: Annotated[
        Path,
        typer.Option(help="Manifest, as written by 'mgll-encoder data fundus' or 'data xray'."),
    ],
    images: Annotated[
        Path | None, typer.Option(help="Image folder (default: the one named in the manifest).")
    ] = None,
    split: Annotated[str, typer.Option(help="The split: train, val or test.")] = "test",
    granularities: Annotated[
        str,
        typer.Option(
            help="Granularities to use, separated by commas (default: each alone, and all together)."
        ),
    ] = "",
    activation: labeled.ActivationName = None,
    weights: labeled.WeightsName = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    strict: labeled.Strict = False,
    workers: labeled.Workers = None,
    device: compute.Device = AUTO,
    force: labeled.Force = False,
) -> None:
    """Measure retrieval of texts for images and images for texts: recall among the nearest 1, 5 and 10.

    Texts repeat, so any of an image's texts, and any of a text's images, is a hit; the recall of a random order is
    printed, too.

    Example: mgll-encoder retrieval --encoder mgll-fundus --manifest manifest.jsonl
    """
    if out:
        check_free(out, force)
    found = api.retrieval(
        encoder, manifest, images=images, split=split, granularities=listed(granularities),
        activation=activation, weights=weights, seed=seed, strict=strict, workers=workers,
        device=device,
    )  # fmt: skip
    _print_retrieval(found.levels, encoder, found.patients)
    if out:
        content = {
            "encoder": str(encoder), "manifest": str(manifest), "split": split, "seed": seed, **found.skipped.record(),
            "granularities": {level: [asdict(way) for way in both] for level, both in found.levels.items()},
        }  # fmt: skip
        write_text(out, json.dumps(content, indent=2) + "\n", force)
        say(f"written: {out}")
    found.skipped.say()


def _print_retrieval(
    results: "Mapping[str, tuple[Retrieval, Retrieval]]", encoder: Path, patients: int
) -> None:
    from mgll_encoder.probing.linear import CONFIDENCE, REPLICATES
    from mgll_encoder.probing.retrieval import DEPTHS

    table = TerminalTable(f"Retrieval by {encoder}: recall in %, and by chance", fixed=2)
    table.add_words("texts", "from, to").add_figures("queries", "candidates", *(f"R@{k}" for k in DEPTHS))
    for level, both in results.items():
        for way in both:
            cells = (
                f"{f.value:.1f} [{f.low:.1f}, {f.high:.1f}] ({way.chance[k]:.1f})"
                for k, f in way.recall.items()
            )
            table.add_row(level, way.direction, str(way.queries), str(way.candidates), *cells)
    stdout.print(table)
    say(
        f"{patients} patients; brackets: {CONFIDENCE} % bootstrap over patients ({REPLICATES} replicates); "
        "parentheses: chance"
    )
