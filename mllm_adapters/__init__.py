"""Multimodal LLM families behind one contract: read, swap the vision tower, train.

Importing it registers the architectures of `mllm_adapters.modeling` with transformers. Only our own commands register
no more than the one that they come to load: all of them take seconds to import, and none can be where transformers
does not work together with what else is installed.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_adapters.modeling import register

if TYPE_CHECKING:
    from mllm_adapters.loading import load_mllm

COMMANDS = {"swap-encoder", "retrain-projector", "finetune-lora", "eval-mcq"}

if Path(sys.argv[0] if sys.argv else "").name not in COMMANDS:
    register()

__all__ = ["load_mllm"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``load_mllm`` needs torch and transformers, ``--help`` neither."""
    if name == "load_mllm":
        from mllm_adapters.loading import load_mllm

        return load_mllm
    raise AttributeError(f"module 'mllm_adapters' has no attribute '{name}'")
