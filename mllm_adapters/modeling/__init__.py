"""Architectures of our own, registered with transformers' Auto classes.

Two kinds: models that transformers does not have, and native ones whose configuration takes no CLIP tower. After
``import mllm_adapters`` they load as any other: ``AutoModelForImageTextToText.from_pretrained(folder)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Architecture:
    """A row of the table of registered architectures.

    Attributes:
        module: Module below this package.
        config: Name of the configuration class in it.
        model: Name of the model class in it.
        processor: Name of the processor class that goes with it, if it is our own.
        renames_like: model_type of the native class whose renaming of checkpoint keys holds here too: transformers
            does not hand it down to subclasses.
    """

    module: str
    config: str
    model: str
    processor: str | None = None
    renames_like: str | None = None


MODEL_TYPES: Mapping[str, Architecture] = {
    "mgll_janus": Architecture(
        module="janus",
        config="MgllJanusConfig",
        model="MgllJanusForConditionalGeneration",
        processor="MgllJanusProcessor",
    ),
}
"""``model_type`` -> what it is built of."""


def register() -> None:
    """Make every architecture known to transformers' Auto classes."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    for model_type, row in MODEL_TYPES.items():
        module = import_module(f"{__name__}.{row.module}")
        config = getattr(module, row.config)
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForImageTextToText.register(config, getattr(module, row.model), exist_ok=True)
        if row.processor:
            AutoProcessor.register(config, getattr(module, row.processor), exist_ok=True)
        if row.renames_like:
            renames = get_checkpoint_conversion_mapping(row.renames_like)
            register_checkpoint_conversion_mapping(model_type, renames, overwrite=True)
