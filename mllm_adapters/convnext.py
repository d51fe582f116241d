"""ConvNeXt towers in timm's naming, as open_clip writes them: names and geometry for transformers' modules."""

import re
from collections.abc import Mapping
from typing import Any

from mgll_encoder.common.errors import UserError
from mllm_adapters.checkpoint import TensorHeader

STRIDE = 4
"""Pixels per side of a cell of the first stage's features: the stride of the stem."""

TIMM_KEY = re.compile(r"(?:visual\.)?(?:trunk\.)?((?:stem|stages)\..+)")
"""A tensor of the stem or the stages, with the prefixes that open_clip puts before timm's name."""

_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"stem\.0\.(\w+)", r"embeddings.patch_embeddings.\1"),
        (r"stem\.1\.(\w+)", r"embeddings.layernorm.\1"),
        (r"stages\.(\d+)\.downsample\.([01]\.\w+)", r"stages.\1.downsampling_layer.\2"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.(\w+)", r"stages.\1.layers.\2.dwconv.\3"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.(\w+)", r"stages.\1.layers.\2.layernorm.\3"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)", r"stages.\1.layers.\2.pwconv\3.\4"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.gamma", r"stages.\1.layers.\2.layer_scale_parameter"),
    )
)
"""timm (timm/models/convnext.py) -> the modules of transformers' ConvNeXt."""


def convnext_name(key: str, where: str) -> str:
    """The name in transformers' modules of one of timm's tensors.

    Raises:
        UserError: it is none of a ConvNeXt.
    """
    for pattern, target in _NAMES:
        if match := pattern.fullmatch(key):
            return match.expand(target)
    raise UserError(
        f"{where}: tensor {key} is not part of a ConvNeXt: expected one of the first generation, as "
        "convnext_large_d_320"
    )


def convnext_config(tensors: Mapping[str, TensorHeader], image_size: int, where: str) -> dict[str, Any]:
    """The transformers configuration of a ConvNeXt, read off its tensors.

    Args:
        tensors: timm's key -> header; the stem and all stages.
        image_size: Input side in pixels.
        where: How the error message calls the tower.

    Raises:
        UserError: the stem, a stage or a block is missing, or the stem is another one.
    """
    blocks: dict[int, set[int]] = {}
    for key in tensors:
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\..+", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    numbers = [set(blocks), *blocks.values()]
    norms = [f"stages.{stage}.blocks.0.norm.weight" for stage in sorted(blocks)]
    gaps = any(found != set(range(len(found))) for found in numbers)
    if not blocks or gaps or any(name not in tensors for name in ("stem.0.weight", *norms)):
        raise UserError(
            f"{where}: the ConvNeXt is incomplete, its stem or blocks are missing: download it again"
        )
    stem = tensors["stem.0.weight"].shape
    if stem[1:] != (3, STRIDE, STRIDE):
        raise UserError(
            f"{where}: stem.0.weight has shape {list(stem)}: expected [width, 3, {STRIDE}, {STRIDE}]"
        )
    return {
        "model_type": "convnext",
        "num_stages": len(blocks),
        "hidden_sizes": [tensors[name].shape[0] for name in norms],
        "depths": [len(blocks[stage]) for stage in sorted(blocks)],
        "patch_size": STRIDE,
        "image_size": image_size,
    }
