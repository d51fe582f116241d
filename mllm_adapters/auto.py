"""Registers this project's architectures with transformers' Auto classes on import."""

from mllm_adapters.core.architectures import register_models

register_models()
