"""Preprocessing of images for a tower, as a transformers image processor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, PixelRule, Resize, checked

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import BaseImageProcessor

_BICUBIC = 3  # PIL's number, as in preprocessor_config.json


def image_processor(spec: PixelRule) -> "BaseImageProcessor":
    """Build the transformers image processor of a tower (bicubic with antialias, then mean and standard deviation).

    Args:
        spec: The pixel rule of a tower or a host.

    Returns:
        A ``CLIPImageProcessor``, or a ``LlavaImageProcessor`` for ``resize="pad"``; both give
        ``pixel_values`` [n, 3, S, S].
    """
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    kind = LlavaImageProcessor if spec.resize == "pad" else CLIPImageProcessor
    settings = processor_settings(spec)
    del settings["image_processor_type"]
    return kind(**settings)


def processor_settings(spec: PixelRule) -> dict[str, Any]:
    """Return what ``image_processor(spec)`` saves as preprocessor_config.json, without importing transformers."""
    square = {"height": spec.image_size, "width": spec.image_size}
    return {
        "crop_size": square,
        "do_center_crop": spec.resize == "crop",
        "do_convert_rgb": True,
        "do_normalize": True,
        **({"do_pad": True} if spec.resize == "pad" else {}),
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_processor_type": "LlavaImageProcessor" if spec.resize == "pad" else "CLIPImageProcessor",
        "image_std": list(spec.std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": spec.image_size} if spec.resize == "crop" else square,
    }


def image_transform(spec: PixelRule) -> "Callable[[Image.Image], Tensor]":
    """Return a function from image to pixels for datasets, with the same pixels as ``image_processor(spec)``.

    Args:
        spec: The pixel rule; a ``TowerSpec`` is one.

    Returns:
        A function from a PIL image (any mode, any size) to float32 pixels [3, S, S].
    """
    processor = image_processor(spec)

    def transform(image: "Image.Image") -> "Tensor":
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"]
        return pixels[0]

    return transform


def read_preprocessing(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the pixel rule of a ``preprocessor_config.json``, of old and of new transformers.

    Args:
        config: The JSON object.
        where: Its file, for error messages.

    Returns:
        The fields of ``PixelRule``, and notes on settings that these cannot express.

    Raises:
        UserError: a required step is switched off, or the result is not square.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) is False:
            raise BadDataError(
                f"{where}: field '{step}' is false: expected true, a tower needs all three steps"
            )
    crops = config.get("do_center_crop", True) and config.get("crop_size") is not None
    size, crop = config.get("size", 224), config.get("crop_size")
    by_edge = isinstance(size, int) or (isinstance(size, Mapping) and "shortest_edge" in size)
    resized = _sides(size)
    final = _sides(crop) if crops else resized
    resize: Resize = "pad" if config.get("do_pad") else "crop" if by_edge else "squash"
    if len(final) != 1 or (resize == "crop" and not config.get("do_center_crop", True)):
        raise BadDataError(
            f"{where}: size {size} with crop {crop} does not give a square image: expected a square"
        )
    notes = []
    if resized != final:
        notes.append(f"{where.name} resizes to {size} and crops to {crop}; here it resizes to the crop")
    if config.get("resample", _BICUBIC) != _BICUBIC:
        notes.append(f"{where.name} has resample {config['resample']}; here it is bicubic (3)")
    fields = {
        "mean": config.get("image_mean", CLIP_MEAN),
        "std": config.get("image_std", CLIP_STD),
        "resize": resize,
        "image_size": final.pop(),
    }
    return checked(PixelRule, fields, where).model_dump(), tuple(notes)


def _sides(size: Any) -> set[int]:
    """Return the lengths in a ``size`` or ``crop_size``, in any of its formats; empty if there is none."""
    values = size.values() if isinstance(size, Mapping) else [size]
    return {value for value in values if isinstance(value, int)}
