"""Multimodal LLM families behind one contract: read, swap the vision tower, train.

Importing it registers the architectures of `mllm_adapters.modeling` with transformers.
"""

from mllm_adapters.loading import load_mllm
from mllm_adapters.modeling import register

register()

__all__ = ["load_mllm"]
