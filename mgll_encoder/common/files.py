"""Outputs that appear whole or not at all, and hashes of inputs."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mgll_encoder.common.errors import UserError

CACHE = "MGLL_CACHE_DIR"
"""Environment variable that names the cache folder."""

_RANDOM = r"[a-z0-9_]{8}"
"""What `tempfile.mkdtemp` appends."""


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

    A killed process leaves nothing under ``path``; a failed block removes the sibling. What killed processes left
    beside ``path`` is cleared away first. Two processes cannot make the same folder at once; the lock is one of the
    operating system (flock), so it ends with the process that holds it, however that ends.

    Raises:
        UserError: ``path`` exists and ``force`` is not set, or another process is writing it.
    """
    check_free(path, force)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    taken = (
        f"another process is writing {path} (it holds the lock {lock}): wait for it, or choose another --out"
    )
    with locked(lock, taken):
        _clear_leftovers(path)
        check_free(path, force)  # again: another process may have finished it, or an old one come back
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        partial.chmod(0o755)
        try:
            yield partial
            sync_tree(partial)
            if path.exists():
                doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.replaced-", dir=path.parent))
                path.rename(doomed / path.name)
                partial.rename(path)
                shutil.rmtree(doomed)
            else:
                partial.rename(path)
            sync_file(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below ``folder`` is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync_file(path)


@contextmanager
def locked(file: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock; a killed process gives it up.

    Args:
        file: The lock; it is there only while it is held.
        otherwise: What to tell the user where another process holds it.

    Raises:
        UserError: another process does.
    """
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(otherwise) from None
    try:
        yield
    finally:
        # While it is held: who opened it meanwhile finds it unlinked, and makes a new one.
        file.unlink(missing_ok=True)
        lock.release()


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside ``path``; what one was about to replace comes back."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(partial|replaced)-{_RANDOM}")
    for left in [found for found in path.parent.iterdir() if pattern.fullmatch(found.name)]:
        if (left / path.name).is_dir() and ".replaced-" in left.name and not path.exists():
            (left / path.name).rename(path)
        _remove_last_first(left)


def _remove_last_first(folder: Path) -> None:
    """Remove a folder, what was written last first: killed in between, what is left looks as unfinished as it is."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for file in sorted(files, key=lambda file: file.lstat().st_mtime_ns, reverse=True):
        file.unlink()
    shutil.rmtree(folder)


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling file that becomes ``path`` when the block ends without an error.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    check_free(path, force)
    with appearing(path) as partial:
        yield partial


def write_text(path: Path, text: str, force: bool = False) -> None:
    """Write a text file whole or not at all.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    with new_file(path, force) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
