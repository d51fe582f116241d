"""Finds checkpoints and their parts by path and marker files, without heavy imports."""

import os
from pathlib import Path

from mgll_encoder.common.errors import BadDataError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.common.extras import require
from mgll_encoder.common.hub import cached, missing_path
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.foreign import ADAPTER_CONFIG

PROVENANCE = "mgll_swap.json"
"""The record of a swap, in the folder of a checkpoint that ``swap-encoder`` wrote."""

DELTA = "mgll_delta.json"
"""File that marks the folder of a delta (`mllm_adapters.loading.delta`)."""


def beside(folder: Path, ending: str) -> Path:
    """Return the default output for a folder: its name with an ending, next to it."""
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder  # noqa: PTH100
    return named.with_name(f"{named.name}-{ending}")


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint folder that does not exist.

    Raises:
        UserError: it does not exist.
    """
    if not folder.is_dir():
        raise missing_path(folder, "checkpoint folder ", "check the path")


def check_image_folder(folder: Path) -> None:
    """Refuse a folder of training images that does not exist.

    Raises:
        UserError: it does not exist.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"image folder {folder} does not exist: pass the folder that image paths start from"
        )


def is_swapped(folder: Path) -> bool:
    """Whether ``swap-encoder`` wrote this folder, that is, it contains the record ``mgll_swap.json``."""
    return (folder / PROVENANCE).is_file()


def check_swapped(folder: Path) -> None:
    """Refuse a folder that ``swap-encoder`` did not write.

    Raises:
        UserError: it holds no record of a swap.
    """
    if not is_swapped(folder):
        refuse_delta(folder)
        raise NotFoundError(f"{folder} has no {PROVENANCE}: expected a checkpoint written by `plan_swap()`")


def check_delta(folder: Path) -> None:
    """Refuse a folder that is not a delta.

    Raises:
        UserError: it holds no record of one.
    """
    if not (folder / DELTA).is_file():
        raise NotFoundError(
            f"{folder} is not a delta: expected a folder with {DELTA}, as `write_delta()` writes"
        )


def refuse_delta(folder: Path) -> None:
    """Refuse a delta where a whole checkpoint is needed, and say what to do.

    Raises:
        UserError: the folder is a delta.
    """
    if (folder / DELTA).is_file():
        raise UnsupportedCheckpointError(
            f"{folder} is a delta (it holds {DELTA}), not a whole checkpoint: `compose(delta={folder}, "
            f"out={folder.name}-whole)` makes one from it; load_mllm and `run()` accept a delta"
        )


def find_part(name: str, checkpoint: Path) -> Path | None:
    """Find a part named in a config.json on this machine; None if it is not found.

    It is searched for, in this order, as an absolute path or relative to the checkpoint folder, relative to
    its parent, and in the Hugging Face cache. Nothing is downloaded.
    """
    for candidate in (checkpoint / name, checkpoint.absolute().parent / name):
        if candidate.exists():
            return candidate
    return cached(name)


def base_of_adapter(folder: Path) -> Path | None:
    """Return the checkpoint that an adapter folder belongs to; None if the folder is not an adapter.

    A folder with a config.json is a checkpoint, whatever else it contains.

    Raises:
        UserError: the base is not named, or does not exist.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    require("train", f"adapter {folder}", "peft")
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadDataError(
            f"{file} does not name its base model: set base_model_name_or_path to the checkpoint folder"
        )
    places = (folder.absolute().parent / base, Path(base))
    found = next((place for place in places if place.is_dir()), None) or cached(base)
    if found is None:
        raise NotFoundError(
            f"{file}: its base model {base} does not exist: set base_model_name_or_path to the checkpoint's "
            "current path"
        )
    return found
