"""Multimodal LLM families behind one contract: read, swap the vision tower, train.

Importing it registers the architectures of `mllm_adapters.modeling` with transformers. Only our own command
``swap-encoder`` registers no more than the one that it comes to load: all of them take seconds to import.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_adapters.modeling import register

if TYPE_CHECKING:
    from mllm_adapters.loading import load_mllm

if Path(sys.argv[0] if sys.argv else "").name != "swap-encoder":
    register()

__all__ = ["load_mllm"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``load_mllm`` needs torch and transformers, ``--help`` neither."""
    if name == "load_mllm":
        from mllm_adapters.loading import load_mllm

        return load_mllm
    raise AttributeError(f"module 'mllm_adapters' has no attribute '{name}'")
