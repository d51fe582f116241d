"""Finding checkpoints: as a folder, in the Hugging Face cache, on the hub."""

from pathlib import Path

from mgll_encoder.common.errors import UserError, unknown_name
from mllm_adapters.registry import FAMILIES, family


def resolve(name: str) -> Path:
    """The local folder of a checkpoint given as folder, hub id or family name.

    A family name stands for the family's published checkpoint. What is not on this machine is downloaded.

    Raises:
        UserError: there is no such folder, and nothing of that name can be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{name} is a file: pass the checkpoint's folder, the one that holds config.json")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        if name in FAMILIES:
            return _fetch(family(name).spec.hub_id)
        if "/" in name:
            raise UserError(f"checkpoint folder {name} does not exist")
        raise unknown_name("family or checkpoint folder", name, FAMILIES)
    return _fetch(name)


def _fetch(hub_id: str) -> Path:
    from mllm_adapters.swap.hub import fetch  # a second, which a folder at hand need not wait for

    return fetch(hub_id)
