"""Input files, outputs that appear complete or not at all, and hashes of both."""

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    NotFoundError,
    OutputTakenError,
)
from mgll_encoder.common.faults import CACHE, find_fault, writing
from mgll_encoder.common.locks import let_go, locked

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-[a-z0-9_]{8}", re.DOTALL)
"""Hidden siblings that are being written, or that hold what is about to be replaced."""

_LOCK = re.compile(r"\.(?P<name>.+)\.lock", re.DOTALL)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

_swept: set[Path] = set()
"""Cache folders in which this process has removed leftovers of killed processes."""


def cache_folder(kind: str) -> Path:
    """Return the cache folder for data of a kind: below `CACHE`, or ``~/.cache/mgll-mllm``."""
    return Path(os.environ.get(CACHE, Path.home() / ".cache" / "mgll-mllm")) / kind


def regular_file(path: Path, what: str = "file") -> Path:
    """Check that an input is an ordinary file, or a link to one. It is not opened, so a pipe does not block.

    Args:
        path: The input.
        what: What it should be, for the message, such as ``"label file"``.

    Raises:
        UserError: it is missing, a folder, a pipe, a device or a socket, or is not accessible.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        leads = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise NotFoundError(f"{what} {path}{leads} does not exist: check the path") from None
    except OSError as error:
        fault = find_fault(error)
        raise BadDataError(f"{what} {fault.line() if fault else error}") from None
    except ValueError:
        raise InvalidArgumentError(
            f"{what} {str(path)!r} is not a file name: it contains characters that file names cannot have"
        ) from None
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "not a file")
        raise BadDataError(f"{what} {path} is {kind}, expected an ordinary file: check the path")
    return path


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False also for impossible names, such as one of 300 letters."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes ``path`` when the block ends without an error.

    For cached data that can be recomputed: a second process waits, and then writes the same. Leftovers of killed
    processes in the folder are removed first.

    Raises:
        UserError: the disk is full or read-only.
    """
    with writing(path):
        _make(path.parent)
        _sweep(path.parent)
        with locked(_lock_of(path), otherwise=None), _cleared(path), _partial_file(path) as partial:
            yield partial


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """Create a file or folder of a cache if it does not exist yet; a second process waits for it.

    Args:
        path: The cached file or folder.
        make: Writes it completely to the path that it is given.

    Raises:
        UserError: the disk is full or read-only.
    """
    if not path.exists():
        with writing(path):
            _make(path.parent)
            _sweep(path.parent)
            with locked(_lock_of(path), otherwise=None):
                if not path.exists():  # another process may have created it in the meantime
                    with _cleared(path), _partial_file(path) as partial:
                        make(partial)
    return path


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary file that becomes ``path`` when the block ends without an error.

    Two processes cannot write the same file at once. Leftovers of killed processes next to ``path`` are removed first.

    Raises:
        UserError: ``path`` exists and ``force`` is not set, another process is writing it, or it cannot be written.
    """
    with _only_writer(path, force), _partial_file(path) as partial:
        yield partial


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling folder that becomes ``path`` when the block ends without an error.

    A killed process leaves nothing at ``path``; a failed block removes the sibling. Leftovers of killed processes next
    to ``path`` are removed first. Two processes cannot create the same folder at once; the lock is one of the operating
    system (flock), so it is released when its process ends, for whatever reason.

    Raises:
        UserError: ``path`` exists and ``force`` is not set, another process is writing it, or it cannot be written.
    """
    with _only_writer(path, force):
        path = path.absolute()
        partial = _new_sibling(path, "partial")
        try:
            yield partial
            _publish(partial)
            if path.exists():
                doomed = _new_sibling(path, "replaced")
                path.rename(doomed / path.name)
                partial.rename(path)
                shutil.rmtree(doomed)
            else:
                partial.rename(path)
            sync_file(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def clear_interrupted() -> None:
    """Remove unfinished outputs of this process whose cleanup was interrupted by a signal."""
    for lock in let_go():
        with suppress(OutputTakenError, OSError), locked(lock, "another process is writing there") as alone:
            if alone and (match := _LOCK.fullmatch(lock.name)):
                _clear_leftovers(lock.with_name(match["name"]))


def optional_path(path: str | Path | None) -> Path | None:
    """Return a path as `Path`, or None."""
    return None if path is None else Path(path)


def check_free(path: Path, force: bool = False) -> None:
    """Refuse an output path that already exists.

    Raises:
        UserError: ``path`` exists and ``force`` is not set, or is a dangling link.
    """
    if path.is_symlink() and not path.exists():
        raise OutputTakenError(
            f"output {path} is a link to {path.readlink()}, which does not exist: remove the link, or choose another "
            "`out`"
        )
    if path.exists() and not force:
        raise OutputTakenError(f"output {path} exists: choose another `out`, or replace it with `force=True`")


def write_text(path: Path, text: str, force: bool = False) -> None:
    """Write a text file completely or not at all.

    Raises:
        UserError: see `new_file`.
    """
    with new_file(path, force) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with regular_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _only_writer(path: Path, force: bool) -> Iterator[None]:
    """Hold the exclusive right to write an output, and remove leftovers of killed processes next to it."""
    check_free(path, force)
    with writing(path):
        _make(path.absolute().parent)
        lock = _lock_of(path.absolute())
        taken = (
            f"another process is writing {path.absolute()} (it holds the lock {lock}): wait for it, or choose another "
            "`out`"
        )
        with locked(lock, taken) as alone:
            if alone:
                _clear_leftovers(path.absolute())
            check_free(path, force)  # again: another process may have finished it, or an old one was restored
            with _cleared(path.absolute()):
                yield


@contextmanager
def _cleared(path: Path) -> Iterator[None]:
    """Remove leftovers next to ``path`` after an error, even if a signal interrupted the cleanup."""
    try:
        yield
    except BaseException:
        _clear_leftovers(path)
        raise


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """Yield a file in a hidden sibling folder, which also holds temporary files that libraries write next to it."""
    folder = _new_sibling(path.absolute(), "partial")
    # under another name, so that an unfinished config.json is not mistaken for a complete one
    partial = folder / f"partial{path.suffix}"
    try:
        yield partial
        _publish(folder)
        partial.replace(path)
        sync_file(path.absolute().parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidArgumentError(
            f"{error.filename} is a file, expected a folder: choose another location"
        ) from None


def _lock_of(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def _new_sibling(path: Path, kind: str) -> Path:
    sibling = path.parent / f".{path.name}.{kind}-{secrets.token_hex(4)}"
    sibling.mkdir()
    return sibling


def _publish(folder: Path) -> None:
    """Set the permissions given by the umask (safetensors creates private files), and sync to disk."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        state = path.lstat()
        if stat.S_ISREG(state.st_mode) and state.st_nlink == 1:  # a hard link keeps the mode of its source
            path.chmod(0o666 & ~umask)
        sync_file(path)


def _clear_leftovers(path: Path) -> None:
    """Remove leftovers of killed processes next to ``path``; restore what one was about to replace."""
    for left, match in _siblings(path.parent, _PARTIAL):
        if match["name"] == path.name:
            if (left / path.name).is_dir() and match["kind"] == "replaced" and not path.exists():
                (left / path.name).rename(path)
            _remove_last_first(left)


def _sweep(folder: Path) -> None:
    """Remove leftovers of killed processes in a cache folder, once per process that writes there."""
    if folder.resolve() in _swept:
        return
    _swept.add(folder.resolve())
    names = {match["name"] for pattern in (_PARTIAL, _LOCK) for _, match in _siblings(folder, pattern)}
    for name in names:
        with suppress(OutputTakenError), locked(_lock_of(folder / name), "it is being written") as alone:
            if alone:
                _clear_leftovers(folder / name)


def _siblings(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    found = ((path, pattern.fullmatch(path.name)) for path in folder.iterdir())
    return [(path, match) for path, match in found if match]


def _remove_last_first(folder: Path) -> None:
    """Remove a folder, the last written files first, so that an interrupted removal still looks unfinished."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for file in sorted(files, key=lambda file: file.lstat().st_mtime_ns, reverse=True):
        file.unlink()
    shutil.rmtree(folder)
