"""Importing it registers this project's architectures with transformers' Auto classes."""

from mllm_adapters.architectures import register_models

register_models()
