"""Outputs that appear whole or not at all, and hashes of inputs."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgll_encoder.common.errors import UserError

CACHE = "MGLL_CACHE_DIR"
"""Environment variable that names the cache folder."""


def cache_folder(kind: str) -> Path:
    """Where things of a kind that can be computed again are kept: below `CACHE`, or ``~/.cache/mgll-mllm``."""
    return Path(os.environ.get(CACHE, Path.home() / ".cache" / "mgll-mllm")) / kind


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write that becomes ``path`` when the block ends without an error.

    Unlike outputs, what is kept in a cache may be written by several processes at once: the last one wins, and
    all have written the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_free(path: Path, force: bool = False) -> None:
    """Refuse an output path that is taken.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    if path.exists() and not force:
        raise UserError(f"output {path} exists: choose another --out, or replace it with --force")


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling folder that becomes ``path`` when the block ends without an error.

    A killed process leaves nothing under ``path``; a failed block removes the sibling.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    check_free(path, force)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    partial.chmod(0o755)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists():
            doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.replaced-", dir=path.parent))
            path.rename(doomed / path.name)
            partial.rename(path)
            shutil.rmtree(doomed)
        else:
            partial.rename(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str, force: bool = False) -> None:
    """Write a text file whole or not at all.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    check_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
