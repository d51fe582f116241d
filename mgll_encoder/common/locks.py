"""Locks of the operating system (flock): one process holds one, and gives it up however it ends."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgll_encoder.common.errors import UserError

_logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What file systems answer that have no locks (NFS without lockd, some FUSE)."""

_held: set[int] = set()
_claimed: set[Path] = set()
"""Locks that this process holds or is about to hold."""


def _leave_to_parent() -> None:
    """A forked child keeps no lock alive: a data loader's worker may outlive a killed training by seconds."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    _claimed.clear()


def let_go() -> set[Path]:
    """Give up what a signal has kept from being released: it may arrive between any two steps. The lock files."""
    claimed = set(_claimed)
    _leave_to_parent()
    return claimed


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def locked(file: Path, otherwise: str | None) -> Iterator[bool]:
    """Hold a lock.

    Args:
        file: The lock; it is there only while it is held (or after a kill, until it is next held).
        otherwise: What to tell the user where another process holds it; None to wait for that one.

    Yields:
        Whether it is held. False where the file system has no locks, which the user is told.

    Raises:
        UserError: another process holds it, and ``otherwise`` was given.
        OSError: the file cannot be made.
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
            # Unlinked while it is held: whoever waits for it finds that, and makes a new one.
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
    except (BlockingIOError, PermissionError):  # the latter is how some network disks say it
        if otherwise is not None:
            raise UserError(otherwise) from None

        _logger.info(f"waiting for another process (it holds the lock {file}) ...")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_still(descriptor: int, file: Path) -> bool:
    """Whether the lock that was opened is the one that others will open."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _tell_unlockable(file: Path) -> None:
    file.unlink(missing_ok=True)
    _logger.warning(f"{file.parent} is on a disk without locks: take care that no other process writes there")
