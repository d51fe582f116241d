"""Finding checkpoints and their parts by paths and the files that mark them; nothing heavy is imported."""

import os
from pathlib import Path

from mgll_encoder.common.errors import BadDataError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.common.extras import require
from mgll_encoder.common.hub import cached
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.foreign import ADAPTER_CONFIG

PROVENANCE = "mgll_swap.json"
"""The record of a swap, in the folder of a checkpoint that ``swap-encoder`` wrote."""

DELTA = "mgll_delta.json"
"""What tells the folder of a delta (`mllm_adapters.loading.delta`) from that of a checkpoint."""


def beside(folder: Path, ending: str) -> Path:
    """The default output of what is given a folder: its name with an ending, beside it."""
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder  # noqa: PTH100
    return named.with_name(f"{named.name}-{ending}")


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint folder that is not there.

    Raises:
        UserError: it is not.
    """
    if not folder.is_dir():
        raise NotFoundError(f"checkpoint folder {folder} does not exist")


def check_image_folder(folder: Path) -> None:
    """Refuse a folder of training images that is not there.

    Raises:
        UserError: it is not.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"image folder {folder} does not exist: pass the folder that image paths start from"
        )


def is_swapped(folder: Path) -> bool:
    """Whether ``swap-encoder`` wrote this folder: its record, ``mgll_swap.json``, is there."""
    return (folder / PROVENANCE).is_file()


def check_swapped(folder: Path) -> None:
    """Refuse a folder that ``swap-encoder`` did not write.

    Raises:
        UserError: it holds no record of a swap.
    """
    if not is_swapped(folder):
        refuse_delta(folder)
        raise NotFoundError(f"{folder} holds no {PROVENANCE}: expected a checkpoint that swap-encoder wrote")


def check_delta(folder: Path) -> None:
    """Refuse a folder that is no delta.

    Raises:
        UserError: it holds no record of one.
    """
    if not (folder / DELTA).is_file():
        raise NotFoundError(
            f"{folder} is no delta: expected a folder with {DELTA}, as swap-encoder --delta writes"
        )


def refuse_delta(folder: Path) -> None:
    """Say of a delta, where a whole checkpoint is needed, what it is and what to do.

    Raises:
        UserError: the folder is a delta.
    """
    if (folder / DELTA).is_file():
        raise UnsupportedCheckpointError(
            f"{folder} is a delta (it holds {DELTA}), not a whole checkpoint: `swap-encoder compose --delta {folder} "
            f"--out {folder.name}-whole` makes one of it; load_mllm and eval-mcq run take it as it is"
        )


def find_part(name: str, checkpoint: Path) -> Path | None:
    """Where a part named in a config.json lies on this machine, or None.

    Looked for, in this order: as an absolute path or relative to the checkpoint folder, relative to its parent, in
    the Hugging Face cache. Nothing is downloaded.
    """
    for candidate in (checkpoint / name, checkpoint.absolute().parent / name):
        if candidate.exists():
            return candidate
    return cached(name)


def base_of_adapter(folder: Path) -> Path | None:
    """The checkpoint that an adapter folder belongs to; None where the folder is no adapter's.

    A folder that has a config.json is a checkpoint, whatever lies in it besides.

    Raises:
        UserError: the base is not named, or is not there.
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
            f"{file}: its base model {base} is not there: set base_model_name_or_path to where the checkpoint is now"
        )
    return found
