"""Contact sheets of explanation maps, from images and a tower to the file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgll_encoder.common.devices import find_device
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, NotFoundError, unknown_name
from mgll_encoder.common.files import check_free, new_file
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.probing.evaluation import open_tower
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.probing.options import TowerOptions
from mgll_encoder.weights.locate import check_tower

if TYPE_CHECKING:
    from mgll_encoder.probing.explain import Target
    from mgll_encoder.tower.model import Tower

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sheet:
    """A written contact sheet.

    Attributes:
        images: Number of images on it.
        skipped: What was skipped, by reason.
    """

    images: int
    skipped: Skipped


def explain_images(
    encoder: Path,
    images: Path,
    out: Path,
    options: TowerOptions,
    *,
    texts: Sequence[str] = (),
    targets: Sequence[str] = (),
    question: LabeledSet | None = None,
    limit: int = 6,
    force: bool = False,
) -> Sheet:
    """See `mgll_encoder.explain`; ``question`` are labeled images, whose test split is shown with the true labels."""
    check_free(out, force)
    if out.suffix.lower() != ".png":
        raise InvalidArgumentError(f"`out` is {out}: expected a name that ends in .png")
    check_tower(encoder)
    if not (images.is_file() or images.is_dir()):
        raise NotFoundError(
            f"`images` is {images}, which does not exist: expected an image or a folder of images"
        )
    import torch

    from mgll_encoder.common.images import open_image
    from mgll_encoder.probing.explain import attention_maps, contact_sheet, target_maps
    from mgll_encoder.tower.preprocess import image_transform

    skipped = Skipped(options.strict, "images" if question is None else "rows")
    tower = open_tower(encoder, options)
    shown = _texts(tower, texts)
    if question is not None:
        classes, paths, captions = _labeled(tower, question, targets, limit, skipped, options.device)
        shown += classes
    else:
        numbered = _pictures(images, limit, skipped)
        paths, captions = list(numbered), [f"image {number}" for number in numbered.values()]
    pictures = [open_image(path) for path in paths]
    transform = image_transform(tower.spec)
    place = find_device(options.device)
    model: torch.nn.Module = tower.model
    model.to(place)
    pixels = torch.stack([transform(picture) for picture in pictures]).to(place)
    columns = attention_maps(tower, pixels)
    notes: dict[str, list[str]] = {}
    for target in shown:
        maps, scores = target_maps(tower, pixels, target)
        columns[target.name] = maps
        notes[target.name] = [f"{target.unit} {score:.2f}" for score in scores]
    with new_file(out, force) as partial:
        contact_sheet(pictures, captions, columns, notes, tower, partial)
    return Sheet(len(paths), skipped)


def _texts(tower: "Tower", texts: Sequence[str]) -> "list[Target]":
    from mgll_encoder.paired.read import text_tower_of
    from mgll_encoder.probing.explain import text_target
    from mgll_encoder.probing.zero_shot import class_directions

    if not texts:
        return []
    if blank := [text for text in texts if not text.strip()]:
        raise InvalidArgumentError(f"`texts` has '{blank[0]}': expected some words")
    directions = class_directions(text_tower_of(tower.header.source, tower), [[text] for text in texts])
    return [text_target(tower, text, feature) for text, feature in zip(texts, directions, strict=True)]


def _labeled(
    tower: "Tower", question: LabeledSet, labels: Sequence[str], limit: int, skipped: Skipped, device: str
) -> "tuple[list[Target], list[Path], list[str]]":
    """Return targets of the classes, test images to show (those of the classes first), and their captions."""
    import numpy as np

    from mgll_encoder.common.files import cache_folder
    from mgll_encoder.probing.explain import class_target
    from mgll_encoder.probing.features import open_every_image, readable_features
    from mgll_encoder.probing.linear import fit_linear

    found = question.read(skipped, both_sides=bool(labels))
    if labels:
        features, found = readable_features(tower, found, cache_folder("features"), skipped, device=device)
    else:
        found = open_every_image(found.subset(found.test), skipped)
    targets, places = [], []
    for label in labels:
        name = next((known for known in found.names if known.casefold() == label.strip().casefold()), None)
        if name is None:
            raise unknown_name("label", label, found.names)
        place = found.names.index(name)
        train = ~found.test & (found.truth | found.false)[:, place]
        truth = found.truth[train, place]
        if truth.all() or not truth.any():
            raise BadDataError(
                f"label '{label}' has no positive, or no negative, training image: nothing to fit"
            )
        targets.append(class_target(name, fit_linear(features[train], truth)))
        places.append(place)
    asked = np.flatnonzero(found.test)
    if not len(asked):
        raise BadDataError("no image is in the test split: leave `labels` out to show any images")
    having = found.truth[asked][:, places].any(axis=1)
    chosen = asked[np.argsort(~having, kind="stable")][:limit]
    captions = [
        f"{_place(found.rows[i])}\ntrue: {', '.join(np.array(found.names)[found.truth[i]]) or 'no label'}"
        for i in chosen
    ]
    return targets, [found.images[i] for i in chosen], captions


def _place(where: str) -> str:
    """Return the row or number of an image, without file names, which may identify a patient."""
    place: str = re.findall(r"\b(?:row|image) \d+", where)[-1]
    return place


def _pictures(images: Path, limit: int, skipped: Skipped) -> dict[Path, int]:
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
        raise BadDataError(f"{images} has no usable image: {reasons}")
    return chosen
