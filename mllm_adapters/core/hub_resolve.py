"""Finds checkpoints: as a folder, in the Hugging Face cache, on the hub."""

from pathlib import Path

from mgll_encoder.common.errors import UnsupportedCheckpointError, unknown_name
from mgll_encoder.common.hub import fetch, is_elsewhere, missing_path
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.foreign import other_format
from mllm_adapters.core.family_table import FAMILIES


def resolve(name: str) -> Path:
    """Return the local folder of a checkpoint given as folder, hub id or family name.

    A family name stands for the family's published checkpoint. Missing checkpoints are downloaded.

    Raises:
        UserError: there is no such folder, and no such checkpoint to download.
    """
    check_name(name)
    if Path(name).is_dir():
        return Path(name)
    return _fetch(_hub_id(name) if name in FAMILIES else name)


def check_name(name: str) -> None:
    """Refuse a name that is not a folder, a possible hub id or a family name, without downloads or heavy imports.

    Raises:
        UserError: it is not one of these.
    """
    if Path(name).is_file():
        found = other_format(Path(name)) or f"{name} is a file"
        raise UnsupportedCheckpointError(f"{found}: pass the checkpoint's folder, which contains config.json")
    if Path(name).is_dir() or is_elsewhere(Path(name)) or name in FAMILIES:
        return
    if "/" in name:
        raise missing_path(Path(name), "checkpoint folder ", "check the path")
    raise unknown_name("family or checkpoint folder", name, FAMILIES)


def _hub_id(name: str) -> str:
    from mllm_adapters.core.registry import family  # imports torch

    return family(name).spec.hub_id


def _fetch(hub_id: str) -> Path:
    """Download a published checkpoint; an unsupported one is refused before its weights are downloaded."""
    from mllm_adapters.core.registry import detect

    return fetch(hub_id, lambda config: detect(read_json(config), f"{hub_id}/config.json"))
