"""Early checks that inputs exist; nothing heavy is imported."""

from pathlib import Path

from mgll_encoder.common.errors import NotFoundError
from mgll_encoder.common.hub import is_elsewhere, missing_path


def check_manifest(path: Path) -> None:
    """Refuse a manifest that does not exist.

    Raises:
        UserError: it does not exist, or is not a file.
    """
    if not path.is_file():
        raise NotFoundError(
            f"manifest {path} does not exist or is not a file: create one with `build_fundus()`"
        )


def check_tower(path: Path) -> None:
    """Refuse a tower that does not exist and is not a hub id.

    Raises:
        UserError: it is neither a path nor a hub id.
    """
    if not path.exists() and not is_elsewhere(path):
        raise missing_path(path, "", "check the path of the tower")
