"""The public API, by topic. Paths are checked before anything heavy is imported."""

from mllm_adapters.api.deltas import compose, extract
from mllm_adapters.api.gguf import export_gguf, plan_gguf
from mllm_adapters.api.swaps import (
    align,
    convert,
    fitting,
    list_families,
    plan_conversion,
    plan_swap,
    restore,
    verify,
)
from mllm_adapters.api.training import estimate_memory, finetune_lora, retrain_projector

__all__ = [
    "align", "compose", "convert", "estimate_memory", "export_gguf", "extract", "finetune_lora", "fitting",
    "list_families", "plan_conversion", "plan_gguf", "plan_swap", "restore", "retrain_projector", "verify",
]  # fmt: skip
