"""Four-bit weights, only in the language model's blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.extras import require
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.stages import lora_targets


def nf4(settings: Mapping[str, Any], where: Path, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' NormalFloat4 with double quantization (QLoRA, Dettmers et al. 2023) for a checkpoint.

    Only layers that get an adapter are quantized, not tower, projector, embeddings and output head.

    Args:
        settings: The checkpoint's config.json.
        where: Its folder, for messages.
        dtype: Of the forward pass.

    Returns:
        A ``transformers.BitsAndBytesConfig``.

    Raises:
        UserError: bitsandbytes is not installed, or the weights are already quantized.
    """
    require("qlora", "loading in 4 bits")
    from transformers import BitsAndBytesConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if settings.get("quantization_config"):
        raise UnsupportedCheckpointError(
            f"{where}/config.json: the weights are already quantized: leave `qlora` or `load_in_4bit` out"
        )
    config = build_config(settings, f"{where}/config.json")
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.device("meta"):
        model = kind(config)
    quantized = set(lora_targets(model, "language_model"))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[
            f"{name.replace('.', chr(92) + '.')}$" for name in linear if name not in quantized
        ],
    )


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that supports gradients.

    On CPUs with AVX512-BF16 bitsandbytes permanently repacks them in the first forward pass in evaluation
    mode (of the feature cache or an evaluation), and its kernel for that layout does not propagate gradients.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
