"""The pixels agree with an independent implementation of the rule."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision
from transformers import AutoImageProcessor

from mgll_encoder import image_processor, image_transform
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PixelRule, Resize

SIZES = [(28, 28), (40, 28), (28, 41), (97, 63), (20, 15)]


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def by_hand(image: Image.Image, rule: PixelRule) -> torch.Tensor:
    """The rule written with torchvision alone."""
    side = rule.image_size
    pixels = vision.pil_to_tensor(image.convert("RGB"))
    if rule.resize == "pad":
        height, width = pixels.shape[1:]
        longest = max(height, width)
        canvas = torch.tensor([int(255 * m) for m in rule.mean], dtype=torch.uint8)[:, None, None]
        canvas = canvas.repeat(1, longest, longest)
        top, left = (longest - height) // 2, (longest - width) // 2
        canvas[:, top : top + height, left : left + width] = pixels
        pixels = canvas
    size = [side] if rule.resize == "crop" else [side, side]
    pixels = vision.resize(pixels, size, vision.InterpolationMode.BICUBIC, antialias=True)
    if rule.resize == "crop":
        top, left = ((length - side) // 2 for length in pixels.shape[1:])  # transformers rounds down
        pixels = pixels[:, top : top + side, left : left + side]
    mean, std = (torch.tensor(values)[:, None, None] for values in (rule.mean, rule.std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_follow_the_rule(resize: Resize, size: tuple[int, int]) -> None:
    rule = PixelRule(image_size=28, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=resize)
    image = noise(*size)
    pixels = image_transform(rule)(image)
    assert (pixels.shape, pixels.dtype) == ((3, 28, 28), torch.float32)
    torch.testing.assert_close(pixels, by_hand(image, rule), atol=1e-5, rtol=1e-5)


def test_rules_differ_on_an_oblong_image() -> None:
    image = noise(97, 63)
    pixels = {
        (resize, mean): image_transform(PixelRule(image_size=28, mean=mean, std=CLIP_STD, resize=resize))(
            image
        )
        for resize in ("squash", "crop", "pad")
        for mean in (CLIP_MEAN, IMAGENET_MEAN)
    }
    values = list(pixels.values())
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_image_mode_gives_three_channels(mode: str) -> None:
    image = noise(40, 33).convert(mode)
    rule = PixelRule(image_size=28)
    torch.testing.assert_close(image_transform(rule)(image), by_hand(image, rule), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_saved_processor_gives_the_same_pixels(tmp_path: Path, resize: Resize) -> None:
    rule = PixelRule(image_size=28, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=resize)
    image_processor(rule).save_pretrained(tmp_path)
    image = noise(97, 63)
    stock = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(stock, image_transform(rule)(image))
