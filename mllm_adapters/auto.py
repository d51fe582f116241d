"""Importing it registers this project's architectures with transformers' Auto classes."""

from mllm_adapters.core.architectures import register_models

register_models()
