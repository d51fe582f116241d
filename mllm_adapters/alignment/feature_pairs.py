"""Pairs the features of two towers at the same positions of the same images."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.hooks import hooked
from mgll_encoder.common.texts import checked, parse_json, read_text
from mgll_encoder.data.manifest import image_folder, read_header, read_rows
from mgll_encoder.tower.preprocess import image_processor
from mgll_encoder.tower.spec import PixelRule
from mllm_adapters.alignment.vision_model import VisionModel
from mllm_adapters.core.contract import Family
from mllm_adapters.data.mcq_rows import BENCH_SCHEMA, BenchQuestion

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files in a folder, in any case."""

FEWEST = 10
"""Minimum number of images for a fit with held-out images."""


class _AllSeen(Exception):
    """Raised to stop the forward pass once all inputs are captured."""


@dataclass(frozen=True)
class Pairs:
    """Features at one point of the model.

    Attributes:
        new: Features of the new tower [images, tokens, width].
        old: Features of the old tower, for the same tokens [images, tokens, width].
        seen: Whether that part of the image is in the old tower's field of view [images, tokens].
    """

    new: Tensor
    old: Tensor
    seen: Tensor

    def rows(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return new and old features [n, width] of selected images' tokens, by a mask [images] that views repeat."""
        chosen = (
            self.seen
            & pictures.to(self.seen.device).repeat_interleave(len(self.seen) // len(pictures))[:, None]
        )
        return self.new[chosen], self.old[chosen]


class FeaturePairs:
    """Runs two models on images and captures the inputs of their connectors.

    Args:
        family: The family, which runs its models' vision part.
        old: The model before the swap.
        new: The model after it.
        points: Name -> (module of the new model, module of the old one) whose input is captured.
    """

    def __init__(
        self, family: Family, old: VisionModel, new: VisionModel, points: Mapping[str, tuple[str, str]]
    ) -> None:
        self._family, self._old, self._new = family, old, new
        self._new_points = {name: new.module_name(pair[0]) for name, pair in points.items()}
        self._old_points = {name: old.module_name(pair[1]) for name, pair in points.items()}
        self._new_rule = family.pixel_rule(new.contract, new.config)
        self._old_rule = family.pixel_rule(old.contract, old.config)
        if old.contract.tiles > 1:  # the content of a tile does not follow from the image's shape
            self._old_rule = self._old_rule.model_copy(update={"resize": self._new_rule.resize})

    def look(self, pictures: Sequence[Image.Image]) -> dict[str, Pairs]:
        """Return the connectors' inputs for images, by point."""
        new = self._catch(self._new, self._new_rule, self._new_points, pictures)
        old = self._catch(self._old, self._old_rule, self._old_points, pictures)
        shown = [
            [n / o for n, o in zip(_extent(self._new_rule, p), _extent(self._old_rule, p), strict=True)]
            for p in pictures
        ]
        return {name: match(new[name], old[name], torch.tensor(shown)) for name in new}

    def _catch(
        self, sight: VisionModel, rule: PixelRule, points: Mapping[str, str], pictures: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        pixels = image_processor(rule)(list(pictures), return_tensors="pt")["pixel_values"]
        with _inputs(sight.model, points) as caught, suppress(_AllSeen):
            self._family.encode_images(sight.model, pixels.to(sight.device), sight.contract)
        order = self._family.token_order(sight.model, sight.contract)
        found = {name: _by_picture(value, len(pictures)) for name, value in caught.items()}
        return found if order is None else {name: value[:, order] for name, value in found.items()}


def find_images(images: Path, most: int) -> list[Path]:
    """Find image files, in a random order that is always the same for the same files.

    Args:
        images: Folder, searched recursively; or the training split of an MGLL manifest (``.jsonl``); or an
            eval-mcq benchmark (``.jsonl``).
        most: Maximum number of images.

    Raises:
        UserError: there is no such folder or manifest, or it has too few images.
    """
    if images.is_dir():
        files = sorted(f for f in images.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        where = f"{images} holds {len(files)} image files ({', '.join(SUFFIXES)})"
    elif images.suffix == ".jsonl":
        files = sorted(_listed(images))
        where = f"{images} has {len(files)} images to train on"
    else:
        what = "is neither a folder nor a manifest or bench (.jsonl)" if images.exists() else "does not exist"
        raise InvalidArgumentError(f"`images={images}` {what}: give a folder of images; they need no labels")
    if min(len(files), most) < FEWEST:
        asked = f", and `samples` is {most}" if most < FEWEST <= len(files) else ""
        raise InvalidArgumentError(
            f"`images`: {where}{asked}: at least {FEWEST} are needed, some hundreds are better"
        )
    random.Random(0).shuffle(files)
    return files[:most]


def _listed(file: Path) -> set[Path]:
    """Return the images of a manifest's training split, or of all questions of a benchmark."""
    lines = read_text(file, "`images`").split("\n")  # not splitlines(): texts may contain U+2028
    first = parse_json(lines[0], f"{file} line 1")
    if not (isinstance(first, dict) and first.get("schema") == BENCH_SCHEMA):
        folder = image_folder(file, read_header(file))
        return {folder / row.image for _, _, row in read_rows(file) if row.split == "train"}
    rest = ((line, f"{file} line {number}") for number, line in enumerate(lines[1:], start=2))
    questions = [
        checked(BenchQuestion, parse_json(line, place), place) for line, place in rest if line.strip()
    ]
    return {file.absolute().parent / image for question in questions for image in question.images}


def match(new: Tensor, old: Tensor, shown: Tensor) -> Pairs:
    """Pair each new token with the old tower's features at its position.

    Args:
        new: New features [n, tokens, width], with or without a class token first.
        old: Old features, likewise, on any grid.
        shown: Width and height of the new tower's field of view, relative to the old one's [images, 2].
    """
    (new_class, new_grid), (old_class, old_grid) = _split(new), _split(old)
    placed, seen = _sample(
        old_grid, shown.repeat_interleave(len(old) // len(shown), dim=0), new_grid.shape[1]
    )
    if new_class is not None and old_class is not None:
        new_grid, placed = torch.cat([new_class, new_grid], 1), torch.cat([old_class, placed], 1)
        seen = torch.cat([seen.new_ones(len(seen), 1), seen], 1)
    return Pairs(new_grid, placed, seen)


def _split(tokens: Tensor) -> tuple[Tensor | None, Tensor]:
    """Split off the class token, if only the other tokens form a square."""
    number = tokens.shape[1]
    if isqrt(number) ** 2 == number:
        return None, tokens
    if isqrt(number - 1) ** 2 == number - 1:
        return tokens[:, :1], tokens[:, 1:]
    raise LookupError(f"{number} tokens do not form a square grid, with or without class token")


def _sample(old: Tensor, shown: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Interpolate features [n, number, width] at the new tokens' positions, with a mask of the old field of view."""
    side, old_side = isqrt(number), isqrt(old.shape[1])
    if side == old_side and bool((shown == 1).all()):
        return old, torch.ones(old.shape[:2], dtype=torch.bool, device=old.device)
    centers = (torch.arange(side, device=old.device) + 0.5) / side * 2 - 1
    rows, columns = torch.meshgrid(centers, centers, indexing="ij")
    places = torch.stack([columns, rows], -1) * shown.to(old)[:, None, None]
    table = old.transpose(1, 2).unflatten(-1, (old_side, old_side))
    sampled = functional.grid_sample(table, places.to(old), padding_mode="border", align_corners=False)
    return sampled.flatten(2).transpose(1, 2), (places.abs() <= 1).all(-1).flatten(1)


def _extent(rule: PixelRule, picture: Image.Image) -> tuple[float, float]:
    """Return width and height of a tower's field of view, relative to the image's."""
    width, height = picture.size
    side = {"crop": min(width, height), "pad": max(width, height), "squash": None}[rule.resize]
    return (1.0, 1.0) if side is None else (side / width, side / height)


def _by_picture(value: Tensor, pictures: int) -> Tensor:
    """Reshape [tokens of all images, width], [n, tokens, width] or [n, rows, columns, width] to [n, tokens, width]."""
    return value.unflatten(0, (pictures, -1)) if value.ndim == 2 else value.flatten(1, -2)


@contextmanager
def _inputs(model: Any, points: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Capture the first inputs of modules; the forward pass is stopped when all are captured."""
    caught: dict[str, Tensor] = {}

    def note(name: str, given: tuple[Any, ...]) -> None:
        caught.setdefault(name, given[0])
        if len(caught) == len(points):
            raise _AllSeen

    with hooked({name: model.get_submodule(module) for name, module in points.items()}, before=note):
        yield caught
