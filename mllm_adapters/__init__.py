"""Multimodal LLM families with one interface: read, swap the vision tower, train.

Names are imported on first use. Checkpoints of this project's own architectures load with `load_mllm`, or with
transformers' Auto classes after ``import mllm_adapters.auto``.
"""

from typing import TYPE_CHECKING

from mgll_encoder.common.lazy import lazy

if TYPE_CHECKING:
    from mllm_adapters.api.deltas import compose, extract
    from mllm_adapters.api.gguf import export_gguf, plan_gguf
    from mllm_adapters.api.swaps import align, convert, list_families, plan_swap, restore, verify
    from mllm_adapters.api.training import estimate_memory, finetune_lora, retrain_projector
    from mllm_adapters.checkpoints.locate import base_of_adapter, is_swapped
    from mllm_adapters.core.architectures import register_models
    from mllm_adapters.core.provenance import alignment_of
    from mllm_adapters.core.registry import family_of
    from mllm_adapters.loading.load import check_mllm, load_mllm
    from mllm_adapters.loading.quantization import nf4
    from mllm_adapters.swap.verify import Verification

    __version__: str

__all__ = [
    "Verification",
    "align",
    "alignment_of",
    "base_of_adapter",
    "check_mllm",
    "compose",
    "convert",
    "estimate_memory",
    "export_gguf",
    "extract",
    "family_of",
    "finetune_lora",
    "is_swapped",
    "list_families",
    "load_mllm",
    "nf4",
    "plan_gguf",
    "plan_swap",
    "register_models",
    "restore",
    "retrain_projector",
    "verify",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Verification": "swap.verify",
        "align": "api.swaps",
        "alignment_of": "core.provenance",
        "base_of_adapter": "checkpoints.locate",
        "check_mllm": "loading.load",
        "compose": "api.deltas",
        "convert": "api.swaps",
        "estimate_memory": "api.training",
        "export_gguf": "api.gguf",
        "extract": "api.deltas",
        "family_of": "core.registry",
        "finetune_lora": "api.training",
        "is_swapped": "checkpoints.locate",
        "list_families": "api.swaps",
        "load_mllm": "loading.load",
        "nf4": "loading.quantization",
        "plan_gguf": "api.gguf",
        "plan_swap": "api.swaps",
        "register_models": "core.architectures",
        "restore": "api.swaps",
        "retrain_projector": "api.training",
        "verify": "api.swaps",
    },
)
