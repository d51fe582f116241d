"""From picture to pixels, as a tower expects them: one rule, written as a transformers image processor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, CLIPImageProcessor, LlavaImageProcessor

from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, PixelRule, Resize

_BICUBIC = 3  # PIL's number, as preprocessor_config.json has it


def image_processor(spec: PixelRule) -> BaseImageProcessor:
    """The transformers image processor of a tower (bicubic with antialias, then mean and standard deviation).

    Args:
        spec: The tower's contract, or that of a host.

    Returns:
        A ``CLIPImageProcessor``, or a ``LlavaImageProcessor`` for ``resize="pad"``; both give
        ``pixel_values`` [n, 3, S, S].
    """
    square = {"height": spec.image_size, "width": spec.image_size}
    common: dict[str, Any] = {
        "crop_size": square,
        "do_center_crop": spec.resize == "crop",
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": _BICUBIC,
    }
    if spec.resize == "crop":
        return CLIPImageProcessor(size={"shortest_edge": spec.image_size}, **common)
    if spec.resize == "squash":
        return CLIPImageProcessor(size=square, **common)
    return LlavaImageProcessor(size=square, do_pad=True, **common)


def image_transform(spec: PixelRule) -> Callable[[Image.Image], Tensor]:
    """A picture-to-pixels function for data sets, the same pixels as ``image_processor(spec)``.

    Args:
        spec: The pixel rule; a ``TowerSpec`` is one.

    Returns:
        A function from a PIL image (any mode, any size) to float32 pixels [3, S, S].
    """
    processor = image_processor(spec)

    def transform(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    return transform


def read_preprocessing(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the contract's part of a ``preprocessor_config.json``, of old and of new transformers.

    Args:
        config: The JSON object.
        where: Its file, for error messages.

    Returns:
        The fields of ``PixelRule``, and notes on what they cannot say.

    Raises:
        UserError: a step that the contract needs is switched off, or the image is not made square.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) is False:
            raise UserError(f"{where}: field '{step}' is false: expected true, a tower needs all three steps")
    notes = []
    size, crop, crops = config.get("size", 224), config.get("crop_size"), config.get("do_center_crop", True)
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    sides = {edge} if edge else {size.get("height"), size.get("width")}
    if crops and crop is not None:
        sides_after = {crop} if isinstance(crop, int) else {crop.get("height"), crop.get("width")}
    else:
        sides_after = sides
    resize: Resize = "pad" if config.get("do_pad") else "crop" if edge else "squash"
    if len(sides_after) != 1 or None in sides_after or (resize == "crop" and not crops):
        raise UserError(
            f"{where}: size {size} with crop {crop} makes no square image: expected a square for a tower"
        )
    if sides != sides_after:
        notes.append(f"{where.name} resizes to {size} and crops to {crop}; here it resizes to the crop")
    if config.get("resample", _BICUBIC) != _BICUBIC:
        notes.append(f"{where.name} has resample {config['resample']}; here it is bicubic (3)")
    found = {
        "mean": tuple(config.get("image_mean", CLIP_MEAN)),
        "std": tuple(config.get("image_std", CLIP_STD)),
        "resize": resize,
        "image_size": sides_after.pop(),
    }
    return found, tuple(notes)
