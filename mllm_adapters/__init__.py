"""Multimodal LLM families behind one contract: read, swap the vision tower, train."""

from mllm_adapters.loading import load_mllm

__all__ = ["load_mllm"]
