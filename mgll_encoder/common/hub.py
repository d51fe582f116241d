"""Models by hub id: from the Hugging Face cache or downloaded, only the files that are read."""

import re
from collections.abc import Callable
from pathlib import Path

from mgll_encoder.common.errors import NotFoundError, UserError, did_you_mean

UNUSED = (
    "*.msgpack", "*.h5", "*.ot", "*.onnx", "*.tflite", "*.gguf", "consolidated*", "onnx/*", "openvino*",
    "optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin", "global_step*/*", "checkpoint-*/*", "runs/*",
)  # fmt: skip
"""Files of published models that are never read: weights of other frameworks, training states."""

DUPLICATES = (
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
"""Duplicates of the weights, if there are safetensors in the transformers layout."""

_ONCE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of those safetensors files."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)$")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form ``owner/name``; a folder of that name takes precedence."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def hub_id_of(path: Path) -> tuple[str, str] | None:
    """Return the hub id and revision of a folder in a Hugging Face cache; None for other folders."""
    found = _IN_CACHE.search(path.absolute().as_posix())
    return (f"{found['owner']}/{found['name']}", found["revision"]) if found else None


def cached(hub_id: str) -> Path | None:
    """Return the folder of a hub id in the Hugging Face cache, if all files that are read have been downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for skipped in ((*UNUSED, *DUPLICATES), UNUSED):
        try:
            folder = Path(snapshot_download(hub_id, local_files_only=True, ignore_patterns=list(skipped)))
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        if any(file.suffix in _WEIGHTS for file in folder.rglob("*")):
            return folder
    return None


def is_elsewhere(path: Path) -> bool:
    """Return whether a path is a hub id.

    A name below an existing folder (``towers/mgll``) and the name of a weight file are paths.
    """
    here = path.exists() or path.parent.is_dir() or path.suffix in _WEIGHTS
    return not here and is_hub_id(path.as_posix())


def missing_path(path: Path, what: str, advice: str) -> NotFoundError:
    """Return an error for a path that does not exist, with the nearest name in its folder as a suggestion.

    Args:
        path: The path.
        what: What was expected there; empty, or ends in a space.
        advice: What to do if there is no near name.
    """
    here = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ()
    near = did_you_mean(path.name, here)
    if near and path.parent != Path():
        near = near.replace("'", f"'{path.parent.as_posix()}/", 1)
    return NotFoundError(f"{what}{path} does not exist: {near.strip() or advice}")


def at_hand(path: Path | str, check: Callable[[Path], object] | None = None) -> Path:
    """Return a local file or folder as it is; for a hub id, the folder from `fetch`.

    Raises:
        UserError: as `fetch`.
    """
    path = Path(path)
    return fetch(path.as_posix(), check) if is_elsewhere(path) else path


def fetch(hub_id: str, check: Callable[[Path], object] | None = None) -> Path:
    """Return the folder of a published model, from the Hugging Face cache or, if that is incomplete, downloaded.

    Of duplicate weights only the safetensors are downloaded; weights of other frameworks are not.

    Args:
        hub_id: ``owner/name``.
        check: Given the model's config.json, if it has one, before anything else is downloaded; may raise.

    Raises:
        UserError: it cannot be downloaded.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    if (folder := cached(hub_id)) is not None:
        return folder
    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id).siblings or ()]
        config = Path(hf_hub_download(hub_id, "config.json")) if "config.json" in names else None
    except hub_errors() as error:
        raise _out_of_reach(hub_id, error) from None
    if config is not None and check is not None:
        check(config)
    twice = any(_ONCE.fullmatch(name) for name in names)
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=[*UNUSED, *(DUPLICATES if twice else ())]))
    except hub_errors() as error:
        raise _out_of_reach(hub_id, error) from None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of huggingface_hub for a hub that does not answer or does not have the file."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    return (HfHubHTTPError, HTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def hub_reason(error: Exception) -> str:
    """Return the first line of a hub error."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


def _out_of_reach(hub_id: str, error: Exception) -> UserError:
    return NotFoundError(
        f"'{hub_id}' is not a local file or folder, is not in the Hugging Face cache, and cannot be downloaded "
        f"({hub_reason(error)}): pass the folder of a downloaded checkpoint"
    )
