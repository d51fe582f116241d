"""This project's architectures, registered with transformers' Auto classes.

There are two kinds: models that transformers does not have, and native ones whose configuration does not
support a CLIP tower. After ``import mllm_adapters.auto`` they load like any other:
``AutoModelForImageTextToText.from_pretrained(folder)``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Architecture:
    """A row of the table of registered architectures.

    Attributes:
        family: Folder below `mllm_adapters.families` whose ``modeling.py`` holds them.
        config: Name of the configuration class in it.
        model: Name of the model class in it.
        processor: Name of its processor class, if it is our own.
        image_processor: Name of its image processor class, likewise.
        renames_like: model_type or name of the native class whose renaming of checkpoint keys also applies
            here:
            transformers does not inherit it in subclasses.
    """

    family: str
    config: str
    model: str
    processor: str | None = None
    image_processor: str | None = None
    renames_like: str | None = None


def _qwen_vl(name: str, renames_like: str | None = None) -> Architecture:
    return Architecture(
        family="qwen2_vl",
        config=f"Mgll{name}Config",
        model=f"Mgll{name}ForConditionalGeneration",
        processor="MgllQwen2VLProcessor",
        image_processor="MgllQwen2VLImageProcessor",
        renames_like=renames_like,
    )


MODEL_TYPES: Mapping[str, Architecture] = {
    "mgll_qwen2_vl": _qwen_vl("Qwen2VL", "Qwen2VLForConditionalGeneration"),
    "mgll_qwen2_5_vl": _qwen_vl("Qwen2_5_VL", "Qwen2_5_VLForConditionalGeneration"),
    "mgll_qwen3_vl": _qwen_vl("Qwen3VL"),
    "mgll_internvl": Architecture(
        "internvl",
        "MgllInternVLConfig",
        "MgllInternVLForConditionalGeneration",
        "MgllInternVLProcessor",
        renames_like="internvl",
    ),
    "mgll_flamingo": Architecture(
        "med_flamingo", "FlamingoConfig", "FlamingoForConditionalGeneration", processor="FlamingoProcessor"
    ),
    "mgll_mini_gemini": Architecture(
        "mini_gemini", "MiniGeminiConfig", "MiniGeminiForConditionalGeneration", "MiniGeminiProcessor"
    ),
    "mgll_instructblip": Architecture(
        "instructblip",
        "MgllInstructBlipConfig",
        "MgllInstructBlipForConditionalGeneration",
        "MgllInstructBlipProcessor",
    ),
    "mgll_qwen_vl": Architecture(
        "qwen_vl", "QwenVLConfig", "QwenVLForConditionalGeneration", "QwenVLProcessor"
    ),
    "mgll_janus": Architecture(
        family="janus_pro",
        config="MgllJanusConfig",
        model="MgllJanusForConditionalGeneration",
        processor="MgllJanusProcessor",
    ),
}
"""``model_type`` -> its architecture."""


_registered: set[str] = set()


def register_models(model_types: Iterable[str] = MODEL_TYPES) -> None:
    """Register architectures with transformers' Auto classes: all, or those of our own among these model types."""
    wanted = [name for name in model_types if name in MODEL_TYPES and name not in _registered]
    if not wanted:
        return

    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    for model_type in wanted:
        row = MODEL_TYPES[model_type]
        module = import_module(f"mllm_adapters.families.{row.family}.modeling")
        config = getattr(module, row.config)
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForImageTextToText.register(config, getattr(module, row.model), exist_ok=True)
        if row.processor:
            AutoProcessor.register(config, getattr(module, row.processor), exist_ok=True)
        if row.image_processor:
            classes = {"torchvision": getattr(module, row.image_processor)}
            AutoImageProcessor.register(config, image_processor_classes=classes, exist_ok=True)
        if row.renames_like:
            renames = get_checkpoint_conversion_mapping(row.renames_like)
            register_checkpoint_conversion_mapping(model_type, renames, overwrite=True)
        _registered.add(model_type)
