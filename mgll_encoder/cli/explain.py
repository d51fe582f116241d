"""``mgll-encoder explain``: attention and attribution maps of a tower."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgll_encoder import api
from mgll_encoder.cli import dataset_options as labeled
from mgll_encoder.cli.dataset_options import said
from mgll_encoder.common import table_options as tables
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, new_file
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.weights.locate import check_tower

if TYPE_CHECKING:
    from mgll_encoder.common.skipped import Skipped
    from mgll_encoder.probing.explain import Target
    from mgll_encoder.tower.load import Tower

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@needs("probe")
def explain(
    encoder: labeled.Encoder,
    images: Annotated[
        Path, typer.Option(help="An image, a folder of images, or the folder that --data is relative to.")
    ],
    out: Annotated[Path, typer.Option(help="The contact sheet to write (.png).")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Show the attribution for this text; repeatable (needs the text tower)."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Show the attribution for this class of a linear probe, fitted on the training split of --data; "
            "repeatable. The pictures are then test images, those of the class first."
        ),
    ] = None,
    data: labeled.Data = None,
    benchmark: labeled.BenchmarkName = None,
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
    seed: Annotated[int, typer.Option(help="Seed of the split of --data.")] = 0,
    strict: labeled.Strict = False,
    force: labeled.Force = False,
) -> None:
    """Overlay attention and attribution maps on images: a contact sheet.

    Columns: the image after the tower's resize rule, attention of the last block, attention rollout and, for each
    --text and --label, a class activation map. Maps show what influenced the tower's output, not where a disease is.

    Captions are row numbers, or positions in the order of file names: the names themselves may identify a patient.

    Example: mgll-encoder explain --encoder mgll-fundus --images photos --text glaucoma --out sheet.png
    """
    check_free(out, force)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {out}: expected a name that ends in .png")
    if label and not (data or benchmark):
        raise UserError(
            "--label needs --data with labels to fit a probe on (and its columns, as for 'probe')"
        )
    if (data or benchmark) and not label:
        raise UserError("--data has no effect without --label: name a class, or leave it out")
    check_tower(encoder)
    if not (images.is_file() or images.is_dir()):
        raise UserError(
            f"--images is {images}, which does not exist: expected an image or a folder of images"
        )
    import torch

    from mgll_encoder.common.images import open_image
    from mgll_encoder.common.skipped import Skipped
    from mgll_encoder.probing.explain import attention_maps, contact_sheet, target_maps
    from mgll_encoder.tower.preprocess import image_transform

    skipped, tower = (
        Skipped(strict, "rows" if label else "images"),
        api.open_tower(encoder, activation, weights),
    )
    targets = _texts(tower, text or [])
    if label:
        question = LabeledSet(
            data,
            images,
            benchmark,
            image_column,
            labels_column,
            binary_columns,
            patient_column,
            seed=seed,
            reading=tables.reading(encoding, sheet, label_separator, uncertain),
        )
        classes, paths, captions = _classes(tower, question, label, limit, skipped)
        targets += classes
    else:
        numbered = _pictures(images, limit, skipped)
        paths, captions = list(numbered), [f"image {number}" for number in numbered.values()]
    pictures = [open_image(path) for path in paths]
    transform = image_transform(tower.spec)
    pixels = torch.stack([transform(picture) for picture in pictures])
    columns = attention_maps(tower, pixels)
    notes: dict[str, list[str]] = {}
    for target in targets:
        maps, scores = target_maps(tower, pixels, target)
        columns[target.name] = maps
        notes[target.name] = [f"{target.unit} {score:.2f}" for score in scores]
    with new_file(out, force) as partial:
        contact_sheet(pictures, captions, columns, notes, tower, partial)
    skipped.say()
    said(f"{len(paths)} images: {out}")


def _texts(tower: "Tower", texts: list[str]) -> "list[Target]":
    from mgll_encoder.probing.explain import text_target
    from mgll_encoder.probing.zero_shot import class_directions, text_tower_of

    if not texts:
        return []
    if blank := [text for text in texts if not text.strip()]:
        raise UserError(f"--text is '{blank[0]}': expected some words")
    directions = class_directions(text_tower_of(tower.header.source, tower), [[text] for text in texts])
    return [text_target(tower, text, feature) for text, feature in zip(texts, directions, strict=True)]


def _classes(
    tower: "Tower", question: LabeledSet, labels: list[str], limit: int, skipped: "Skipped"
) -> "tuple[list[Target], list[Path], list[str]]":
    """Return targets of the classes, test images to show (those of the classes first), and their captions."""
    import numpy as np

    from mgll_encoder.common.files import cache_folder
    from mgll_encoder.probing.explain import class_target
    from mgll_encoder.probing.features import readable_features
    from mgll_encoder.probing.linear import fit_linear

    found = question.read(skipped)
    features, found = readable_features(tower, found, cache_folder("features"), skipped)
    targets, places = [], []
    for label in labels:
        name = next((known for known in found.names if known.casefold() == label.strip().casefold()), None)
        if name is None:
            raise unknown_name("label", label, found.names)
        place = found.names.index(name)
        train = ~found.test & (found.truth | found.false)[:, place]
        truth = found.truth[train, place]
        if truth.all() or not truth.any():
            raise UserError(
                f"label '{label}' has no positive, or no negative, training image: nothing to fit"
            )
        targets.append(class_target(name, fit_linear(features[train], truth)))
        places.append(place)
    asked = np.flatnonzero(found.test)
    having = found.truth[asked][:, places].any(axis=1)
    chosen = asked[np.argsort(~having, kind="stable")][:limit]
    captions = [
        f"{_place(found.rows[i])}\n{', '.join(np.array(found.names)[found.truth[i]]) or 'no label'}"
        for i in chosen
    ]
    return targets, [found.images[i] for i in chosen], captions


def _place(where: str) -> str:
    """Return the row or number of an image, without file names, which may identify a patient."""
    place: str = re.findall(r"\b(?:row|image) \d+", where)[-1]
    return place


def _pictures(images: Path, limit: int, skipped: "Skipped") -> dict[Path, int]:
    """Return readable images, and their numbers when sorted by name."""
    from mgll_encoder.common.skipped import UNREADABLE
    from mgll_encoder.probing.features import unreadable

    found = [images] if images.is_file() else sorted(images.rglob("*"))
    candidates = [path for path in found if path == images or path.suffix.lower() in _PICTURES]
    chosen: dict[Path, int] = {}
    for number, path in enumerate(candidates, start=1):
        if len(chosen) == limit:
            break
        skipped.read += 1
        if trouble := unreadable(path):
            skipped.add(UNREADABLE, f"image {number} (sorted by name) of {images} {trouble}")
        else:
            chosen[path] = number
    if not chosen:
        reasons = "; ".join(skipped.lines()) or f"it contains no {', '.join(_PICTURES)}"
        raise UserError(f"{images} has no usable image: {reasons}")
    return chosen
