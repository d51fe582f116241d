"""Quantized checkpoints: detects them from config.json, and names an alternative."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UnsupportedCheckpointError

FIELD = "quantization_config"

LOADABLE = "bitsandbytes"
"""Methods that transformers loads, quantized on loading (as in QLoRA) or stored."""

_PARTS = ("text_config", "llm_config", "vision_config")
"""Sections of a config.json that may declare it for one part of the model."""

FILES = ("quantize_config.json", "quant_config.json")
"""Files that AutoGPTQ and AutoAWQ write next to quantized weights, whatever config.json says."""

_UNQUANTIZED = (
    "quantized weights cannot be swapped, converted or trained: use the unquantized checkpoint (without "
    "-4bit, -Int4, -AWQ, -GPTQ or -FP8 in its name)"
)


def quantization(config: Mapping[str, Any]) -> str | None:
    """Return how the weights of a config.json are quantized, such as ``gptq``; None if they are not."""
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
    """Refuse quantized weights, naming the method.

    Args:
        config: Contents of config.json.
        where: Name of the configuration in error messages.
        to_load: Whether the model is only to be loaded, which transformers supports for `LOADABLE`.

    Raises:
        UserError: the weights are quantized.
    """
    method = quantization(config)
    if method is None or (to_load and method == LOADABLE):
        return
    raise UnsupportedCheckpointError(f"{where}: {FIELD} says {method}: {_UNQUANTIZED}")


def refuse_quantized_files(folder: Path) -> None:
    """Refuse a folder with a file that a quantization program writes.

    Raises:
        UserError: there is such a file.
    """
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is not None:
        raise UnsupportedCheckpointError(f"{found} is written by GPTQ or AWQ: {_UNQUANTIZED}")
