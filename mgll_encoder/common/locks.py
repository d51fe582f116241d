"""Locks of the operating system (flock): only one process can hold a lock, which is released when the process ends."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgll_encoder.common.errors import OutputTakenError

_logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""Errors of file systems without locks (NFS without lockd, some FUSE)."""

_held: set[int] = set()
_claimed: set[Path] = set()
"""Lock files that this process holds or is about to lock."""


def _leave_to_parent() -> None:
    """Release the locks in a forked child: a data loader's worker may outlive a killed training run by seconds."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    _claimed.clear()


def let_go() -> set[Path]:
    """Release the locks that an interrupted block still holds (a signal may arrive anywhere); return their files."""
    claimed = set(_claimed)
    _leave_to_parent()
    return claimed


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def locked(file: Path, otherwise: str | None) -> Iterator[bool]:
    """Hold a lock.

    Args:
        file: The lock; it exists only while it is held (after a kill, until it is next held).
        otherwise: The error message if another process holds it; None to wait for that process.

    Yields:
        Whether it is held. False, with a warning, if the file system has no locks.

    Raises:
        OutputTakenError: another process holds it, and ``otherwise`` was given.
        OSError: the file cannot be created.
    """
    _claimed.add(file)
    descriptor = _acquire(file, otherwise)
    if descriptor is None:
        _claimed.discard(file)
        yield False
        return
    try:
        yield True
    finally:
        if descriptor in _held:  # not so in a forked child
            # Unlinked while it is held: a waiting process notices that and creates a new file.
            file.unlink(missing_ok=True)
            _close(descriptor)
            _claimed.discard(file)


def _acquire(file: Path, otherwise: str | None) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(descriptor)
        try:
            _flock(descriptor, file, otherwise)
            if _is_still(descriptor, file):
                return descriptor
        except OSError as error:
            _close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            _tell_unlockable(file)
            return None
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)


def _close(descriptor: int) -> None:
    os.close(descriptor)
    _held.discard(descriptor)


def _flock(descriptor: int, file: Path, otherwise: str | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some network disks raise the latter
        if otherwise is not None:
            raise OutputTakenError(otherwise) from None

        _logger.info(f"waiting for another process (it holds the lock {file}) ...")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_still(descriptor: int, file: Path) -> bool:
    """Return whether the lock file that was opened is still the one that others will open."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _tell_unlockable(file: Path) -> None:
    file.unlink(missing_ok=True)
    _logger.warning(f"{file.parent} is on a disk without locks: make sure that no other process writes there")
