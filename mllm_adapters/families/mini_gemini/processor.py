"""Image processing for Mini-Gemini (MGM): a high-resolution image, and the low-resolution views made from it.

After dvlab-research/MGM 769820c, mgm/eval/model_vqa.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.processing_utils import ProcessorMixin


def low_resolution(pixels: Tensor, side: int, *, grid: int, whole: bool, antialias: bool) -> Tensor:
    """Make the low-resolution views of high-resolution images.

    Args:
        pixels: Normalized pixels [n, 3, A, A].
        side: Side of a view in pixels.
        grid: Number of tiles along one side.
        whole: Whether the whole image is the last view; only with ``grid`` above 1.
        antialias: Bicubic with antialiasing instead of plain bilinear.

    Returns:
        [n, 3, side, side] for ``grid`` 1, else [n, views, 3, side, side], tiles row by row.
    """
    picture = _resized(pixels, side * grid, antialias)
    if grid == 1:
        return picture
    tiles = split_tiles(picture, grid)
    if not whole:
        return tiles
    return torch.cat([tiles, _resized(picture, side, antialias)[:, None]], dim=1)


def _resized(pixels: Tensor, side: int, antialias: bool) -> Tensor:
    mode = "bicubic" if antialias else "bilinear"
    resized = functional.interpolate(
        pixels.float(), size=(side, side), mode=mode, align_corners=False, antialias=antialias
    )
    return resized.to(pixels.dtype)


def split_tiles(maps: Tensor, grid: int) -> Tensor:
    """Split [n, C, H, H] into [n, grid * grid, C, H / grid, H / grid], row by row."""
    side = maps.shape[-1] // grid
    tiles: Tensor = maps.unflatten(-1, (grid, side)).unflatten(-3, (grid, side))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class MiniGeminiProcessor(ProcessorMixin):
    """Prepares images in both resolutions and text with as many placeholders as image tokens.

    The image processor makes the high-resolution image; the low-resolution views are made from it.

    Args:
        image_processor: Returns the high-resolution images.
        tokenizer: Has the placeholder.
        image_size: Side of a low-resolution view in pixels.
        image_seq_length: Placeholders per image.
        image_grid: As in `MiniGeminiConfig`.
        image_global: As in `MiniGeminiConfig`.
        low_resolution_antialias: As in `MiniGeminiConfig`.
        image_token: The placeholder.
        chat_template: Jinja template of the conversation format.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_size: int = 336,
        image_seq_length: int = 576,
        image_grid: int = 1,
        image_global: bool = False,
        low_resolution_antialias: bool = False,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.image_seq_length = image_size, image_seq_length
        self.image_grid, self.image_global = image_grid, image_global
        self.low_resolution_antialias = low_resolution_antialias
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Mapping[str, Any], list[str]]:
        processed, placeholders = super()._process_images(images, **{**kwargs, "return_tensors": "pt"})
        high = processed["pixel_values"]
        low = low_resolution(
            high,
            self.image_size,
            grid=self.image_grid,
            whole=self.image_global,
            antialias=self.low_resolution_antialias,
        )
        return {**processed, "pixel_values": low, "pixel_values_aux": high}, placeholders

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:  # noqa: ARG002
        """Return the placeholders of one image."""
        return self.image_token * self.image_seq_length
