"""Getting the bytes of a file elsewhere: hard-linked, cloned (reflink) or copied by the kernel."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from rich.filesize import decimal

from mgll_encoder.common.errors import UserError
from mgll_encoder.weights.spans import truncated

Way = Literal["link", "clone", "copy"]
"""How an unchanged file gets into an output: ``link`` shares the file, ``clone`` its blocks until one is written."""

FICLONE = 0x40049409
"""Request number of ``ioctl_ficlone(2)``: share all blocks of a file, copy on write (btrfs, xfs)."""

_CHUNK = 64 << 20

_NOT_HERE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What the kernel answers where a file system cannot copy by itself."""


def _link(source: Path, target: Path) -> None:
    os.link(source.resolve(), target)  # of a link into a hub cache, the blob


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as given, target.open("xb") as made:
        fcntl.ioctl(made, FICLONE, given.fileno())


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as given, target.open("xb") as made:
        copy_range(given, made, 0, os.fstat(given.fileno()).st_size)
        os.fsync(made.fileno())


_WAYS: Mapping[Way, Callable[[Path, Path], None]] = {"link": _link, "clone": _clone, "copy": _copy}


def transfer(source: Path, target: Path, way: Way) -> None:
    """Make ``target``, which must not exist, hold what ``source`` holds.

    Raises:
        OSError: it cannot be done in this way.
    """
    _WAYS[way](source, target)


def best_way(source: Path, folder: Path, *, copy: bool) -> Way:
    """The cheapest way that works from a file into a folder, found by trying.

    Args:
        source: An existing file.
        folder: An existing folder that can be written.
        copy: Whether the new file must be one of its own: no hard link.
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
    """Copy ``length`` bytes from ``start`` on to where ``target`` stands; in the kernel, where it can.

    Raises:
        OSError: reading or writing fails.
        UserError: ``source`` has been cut short.
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
    """Refuse to write more than the disk has room for.

    Raises:
        UserError: fewer than ``needed`` bytes are free where ``folder`` lies.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {decimal(free)} free, but {decimal(needed)} are to be written: free "
            f"{decimal(needed - free)}, or choose an --out on another disk"
        )


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files, but not their permissions: the copies of a read-only source can be written."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _copy_through_memory(source: BinaryIO, target: BinaryIO, start: int, length: int) -> int:
    block = os.pread(source.fileno(), min(length, _CHUNK), start)
    return os.write(target.fileno(), block) if block else 0
