"""Finding checkpoints: as a folder, in the Hugging Face cache, on the hub."""

import re
from pathlib import Path

from mgll_encoder.common.errors import UserError, unknown_name
from mllm_adapters.families import FAMILIES

_HUB_ID = re.compile(r"[^/.~][^/]*/[^/]+")


def resolve(name: str) -> Path:
    """The local folder of a checkpoint given as folder, hub id or family name.

    A family name stands for the family's published checkpoint. What is not on this machine is downloaded.

    Raises:
        UserError: there is no such folder, and nothing of that name can be downloaded.
    """
    check_name(name)
    if Path(name).is_dir():
        return Path(name)
    return _fetch(_hub_id(name) if name in FAMILIES else name)


def check_name(name: str) -> None:
    """Refuse what is neither a folder here nor the form of a hub id nor a family name; downloads and imports nothing.

    Raises:
        UserError: it is none of them.
    """
    if Path(name).is_file():
        raise UserError(f"{name} is a file: pass the checkpoint's folder, the one that holds config.json")
    if Path(name).is_dir() or _HUB_ID.fullmatch(name) or name in FAMILIES:
        return
    if "/" in name:
        raise UserError(f"checkpoint folder {name} does not exist")
    raise unknown_name("family or checkpoint folder", name, FAMILIES)


def _hub_id(name: str) -> str:
    from mllm_adapters.registry import family  # torch, which a name that means nothing need not wait for

    return family(name).spec.hub_id


def _fetch(hub_id: str) -> Path:
    from mllm_adapters.swap.hub import fetch  # a second, which a folder at hand need not wait for

    return fetch(hub_id)
