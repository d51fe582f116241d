"""Quantised checkpoints: what their config.json says of it, and what to do instead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UnsupportedCheckpointError

FIELD = "quantization_config"

LOADABLE = "bitsandbytes"
"""Done while weights are loaded, as QLoRA does, or stored; transformers loads both."""

_PARTS = ("text_config", "llm_config", "vision_config")
"""Sections of a config.json that may say it of one part of the model."""

FILES = ("quantize_config.json", "quant_config.json")
"""What AutoGPTQ and AutoAWQ write beside weights that they have quantised, whatever config.json says."""

_UNQUANTIZED = (
    "quantised weights can be neither swapped nor converted nor trained: take the unquantised checkpoint (without "
    "-4bit, -Int4, -AWQ, -GPTQ or -FP8 in its name)"
)


def quantization(config: Mapping[str, Any]) -> str | None:
    """How the weights that a config.json describes are quantised, such as ``gptq``; None where they are not."""
    for section in (config, *(config.get(name) for name in _PARTS)):
        settings = section.get(FIELD) if isinstance(section, Mapping) else None
        if isinstance(settings, Mapping) and settings:
            stored = any(settings.get(name) for name in ("load_in_4bit", "load_in_8bit"))
            method = settings.get("quant_method") or (LOADABLE if stored else "unknown method")
            return str(getattr(method, "value", method))
        if settings:
            return str(settings)
    return None


def refuse_quantized(config: Mapping[str, Any], where: str, *, to_load: bool = False) -> None:
    """Refuse quantised weights by the name of the method.

    Args:
        config: Contents of config.json.
        where: How the error message calls it.
        to_load: Whether the model is only to be loaded, which transformers does with `LOADABLE`.

    Raises:
        UserError: the weights are quantised.
    """
    method = quantization(config)
    if method is None or (to_load and method == LOADABLE):
        return
    raise UnsupportedCheckpointError(f"{where}: {FIELD} says {method}: {_UNQUANTIZED}")


def refuse_quantized_files(folder: Path) -> None:
    """Refuse a folder whose weights were quantised by a program that says so in a file of its own.

    Raises:
        UserError: there is such a file.
    """
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is not None:
        raise UnsupportedCheckpointError(f"{found} is that of GPTQ or AWQ: {_UNQUANTIZED}")
