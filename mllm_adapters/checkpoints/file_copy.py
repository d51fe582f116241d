"""Copies files: by hard link, by clone (reflink) or by the kernel."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from rich.filesize import decimal

from mgll_encoder.common.errors import StorageError
from mgll_encoder.weights.spans import truncated

Way = Literal["link", "clone", "copy"]
"""How to copy an unchanged file: ``link`` shares the file, ``clone`` its blocks until one is written."""

FICLONE = 0x40049409
"""Request number of ``ioctl_ficlone(2)``: share all blocks of a file, copy on write (btrfs, xfs)."""

_CHUNK = 64 << 20

_NOT_HERE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Error codes of the kernel if a file system does not support in-kernel copies."""


def _link(source: Path, target: Path) -> None:
    os.link(source.resolve(), target)  # for a link into a hub cache: the blob


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as given, target.open("xb") as made:
        fcntl.ioctl(made, FICLONE, given.fileno())


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as given, target.open("xb") as made:
        copy_range(given, made, 0, os.fstat(given.fileno()).st_size)
        os.fsync(made.fileno())


_WAYS: Mapping[Way, Callable[[Path, Path], None]] = {"link": _link, "clone": _clone, "copy": _copy}


def transfer(source: Path, target: Path, way: Way) -> None:
    """Copy ``source`` to ``target``, which must not exist.

    Raises:
        OSError: this way is not supported.
    """
    _WAYS[way](source, target)


def best_way(source: Path, folder: Path, *, copy: bool) -> Way:
    """Find the cheapest way to copy from a file into a folder, by trying.

    Args:
        source: An existing file.
        folder: An existing, writable folder.
        copy: Whether the new file must be independent: no hard link.
    """
    cheap: tuple[Way, ...] = ("clone",) if copy else ("link", "clone")
    for way in cheap:
        trial = folder / ".trial"
        try:
            transfer(source, trial, way)
        except OSError:
            continue
        else:
            return way
        finally:
            trial.unlink(missing_ok=True)
    return "copy"


def copy_range(source: BinaryIO, target: BinaryIO, start: int, length: int) -> None:
    """Copy ``length`` bytes from ``start`` on to the position of ``target``; in the kernel if possible.

    Raises:
        OSError: reading or writing fails.
        UserError: ``source`` has been truncated.
    """
    target.flush()
    while length:
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(length, _CHUNK), start)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            done = _copy_through_memory(source, target, start, length)
        if not done:
            raise truncated(source.name)
        start, length = start + done, length - done


def check_space(folder: Path, needed: int) -> None:
    """Refuse to write more than fits on the disk.

    Raises:
        UserError: fewer than ``needed`` bytes are free on the disk of ``folder``.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder.parent} has {decimal(free)} free, but {decimal(needed)} are to be written: free "
            f"{decimal(needed - free)}, or choose an `out` on another disk"
        )


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files without their permissions: copies of a read-only source are writable."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _copy_through_memory(source: BinaryIO, target: BinaryIO, start: int, length: int) -> int:
    block = os.pread(source.fileno(), min(length, _CHUNK), start)
    return os.write(target.fileno(), block) if block else 0
