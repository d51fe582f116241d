"""The families, by name. Adding one is a file under `families` and a row here."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from mgll_encoder.common.errors import UserError, unknown_name
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import FAMILY_KEY, Family

FAMILIES: Mapping[str, str] = {
    "llava": "mllm_adapters.families.llava:LLAVA",
    "llava-med": "mllm_adapters.families.llava:LLAVA_MED",
}
"""Registry name -> ``module:object``; the module is imported on first use."""


def family(name: str) -> Family:
    """The family of this name.

    Raises:
        UserError: there is none; the message suggests the nearest.
    """
    if name not in FAMILIES:
        raise unknown_name("family", name, FAMILIES)
    module, attribute = FAMILIES[name].split(":")
    return cast(Family, getattr(import_module(module), attribute))


def detect(config: Mapping[str, Any], where: str) -> tuple[Family, str]:
    """The family and layout that a config.json describes.

    Args:
        config: Contents of config.json.
        where: How error messages call the checkpoint.

    Raises:
        UserError: no family recognises it.
    """
    if config.get(FAMILY_KEY) in FAMILIES:
        marked = family(config[FAMILY_KEY])
        layout = marked.layout(config)
        if layout is not None:
            return marked, layout
    for candidate in map(family, FAMILIES):
        layout = candidate.layout(config)
        if layout is not None:
            return candidate, layout
    found = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    raise UserError(f"{where}: no known family has {found}: supported are {', '.join(FAMILIES)}")


def open_checkpoint(folder: Path) -> tuple[Checkpoint, Family, str]:
    """A checkpoint folder with its family and layout.

    Raises:
        UserError: no checkpoint, or of no known family.
    """
    config = Checkpoint(folder).config
    found, layout = detect(config, f"{folder}/config.json")
    return Checkpoint(folder, found.spec.extra_weights), found, layout


def family_of_model(model: Any) -> Family:
    """The family of a loaded model, by its configuration.

    Raises:
        UserError: no family recognises it.
    """
    return detect(model.config.to_dict(), type(model).__name__)[0]
