"""Finding the parts of a checkpoint that lie outside its folder."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError


def find_part(name: str, checkpoint: Path) -> Path | None:
    """Where a part named in a config.json lies on this machine, or None.

    Looked for, in this order: as an absolute path or relative to the checkpoint folder, relative to its parent, in
    the Hugging Face cache. Nothing is downloaded.
    """
    for candidate in (checkpoint / name, checkpoint.absolute().parent / name):
        if candidate.exists():
            return candidate
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
