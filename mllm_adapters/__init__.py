"""Multimodal LLM families behind one contract: read, swap the vision tower, train.

Names are imported on first use. Checkpoints of this project's own architectures load with `load_mllm`, or with
transformers' Auto classes after ``import mllm_adapters.auto``.
"""

from typing import TYPE_CHECKING

from mgll_encoder.common.lazy import lazy

if TYPE_CHECKING:
    from mllm_adapters.loading import load_mllm
    from mllm_adapters.modeling import register_models

    __version__: str

__all__ = ["load_mllm", "register_models"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "load_mllm": "loading",
        "register_models": "modeling",
    },
)
