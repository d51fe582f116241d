"""Finding checkpoints and their parts, and what is known of published towers by their exact name."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, TowerSpec
from mllm_adapters.registry import FAMILIES, family

_OPENAI_VIT_L = TowerSpec(
    width=1024, depth=24, heads=16, mlp_width=4096, patch_size=14, image_size=224, activation="quick_gelu",
    projection_dim=768, mean=CLIP_MEAN, std=CLIP_STD, resize="crop",
)  # fmt: skip

PUBLISHED_TOWERS: Mapping[str, TowerSpec] = {
    "openai/clip-vit-large-patch14": _OPENAI_VIT_L,
    "openai/clip-vit-large-patch14-336": _OPENAI_VIT_L.model_copy(update={"image_size": 336}),
}
"""Geometry of towers that hosts name by hub id: a tower that is to be replaced need not be downloaded."""


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
            return _from_hub(family(name).spec.hub_id)
        if "/" in name:
            raise UserError(f"checkpoint folder {name} does not exist")
        raise unknown_name("family or checkpoint folder", name, FAMILIES)
    return _from_hub(name)


def _from_hub(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not in the cache: try to download
    try:
        return Path(snapshot_download(hub_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"'{hub_id}' is no folder here, is not in the Hugging Face cache, and cannot be downloaded "
            f"({reason[:120]}): pass the folder of a downloaded checkpoint"
        ) from None


def find_part(name: str, checkpoint: Path) -> Path | None:
    """Where a part named in a config.json lies on this machine, or None.

    Looked for, in this order: as an absolute path or relative to the checkpoint folder, relative to its parent, in
    the Hugging Face cache. Nothing is downloaded.
    """
    for candidate in (checkpoint / name, checkpoint.absolute().parent / name):
        if candidate.is_dir():
            return candidate
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
