"""Importing it registers this project's architectures with transformers' Auto classes."""

from mllm_adapters.modeling import register_models

register_models()
