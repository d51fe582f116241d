"""Maps ConvNeXt towers from timm's names, as written by open_clip, to transformers' modules; reads their geometry."""

import re
from collections.abc import Mapping
from typing import Any

from mgll_encoder.common.errors import BadDataError
from mllm_adapters.checkpoints.checkpoint import TensorHeader
from mllm_adapters.families.keytable import OriginalLayout

STRIDE = 4
"""Side in pixels of a cell of the first stage's features: the stride of the stem."""

TIMM_KEY = re.compile(r"(?:visual\.)?(?:trunk\.)?((?:stem|stages)\..+)")
"""A tensor of the stem or the stages, with open_clip's prefixes before timm's name."""

_BLOCK, _TO_BLOCK = "stages.{}.blocks.{}.", "stages.{}.layers.{}."

CONVNEXT = OriginalLayout(
    {
        "stem.0.*": "embeddings.patch_embeddings.{}",
        "stem.1.*": "embeddings.layernorm.{}",
        "stages.{}.downsample.{0,1}.*": "stages.{}.downsampling_layer.{}.{}",
        _BLOCK + "conv_dw.*": _TO_BLOCK + "dwconv.{}",
        _BLOCK + "norm.*": _TO_BLOCK + "layernorm.{}",
        _BLOCK + "mlp.fc{1,2}.*": _TO_BLOCK + "pwconv{}.{}",
        _BLOCK + "gamma": _TO_BLOCK + "layer_scale_parameter",
    },
    of="a ConvNeXt",
    hint="expected one of the first generation, as convnext_large_d_320",
)
"""timm (timm/models/convnext.py) -> the modules of transformers' ConvNeXt."""


def convnext_config(tensors: Mapping[str, TensorHeader], image_size: int, where: str) -> dict[str, Any]:
    """Read the transformers configuration of a ConvNeXt from its tensors.

    Args:
        tensors: timm's key -> header; the stem and all stages.
        image_size: Input side in pixels.
        where: Name of the tower in error messages.

    Raises:
        UserError: the stem, a stage or a block is missing, or the stem has another shape.
    """
    blocks: dict[int, set[int]] = {}
    for key in tensors:
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\..+", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    numbers = [set(blocks), *blocks.values()]
    norms = [f"stages.{stage}.blocks.0.norm.weight" for stage in sorted(blocks)]
    gaps = any(found != set(range(len(found))) for found in numbers)
    if not blocks or gaps or any(name not in tensors for name in ("stem.0.weight", *norms)):
        raise BadDataError(
            f"{where}: the ConvNeXt is incomplete, its stem or blocks are missing: download it again"
        )
    stem = tensors["stem.0.weight"].shape
    if stem[1:] != (3, STRIDE, STRIDE):
        raise BadDataError(
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
