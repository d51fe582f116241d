"""Locks of the operating system (flock): one process holds one, and gives it up however it ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgll_encoder.common.errors import UserError

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What file systems answer that have no locks (NFS without lockd, some FUSE)."""

_held: set[int] = set()


def _leave_to_parent() -> None:
    """A forked child keeps no lock alive: a data loader's worker may outlive a killed training by seconds."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


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
    descriptor = _acquire(file, otherwise)
    if descriptor is None:
        yield False
        return
    _held.add(descriptor)
    try:
        yield True
    finally:
        if descriptor in _held:  # not so in a forked child
            # Unlinked while it is held: whoever waits for it finds that, and makes a new one.
            file.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(file: Path, otherwise: str | None) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _flock(descriptor, file, otherwise)
            if _is_still(descriptor, file):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            _tell_unlockable(file)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, file: Path, otherwise: str | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter is how some network disks say it
        if otherwise is not None:
            raise UserError(otherwise) from None
        from mgll_encoder.common.cli import note

        note(f"waiting for another process (it holds the lock {file}) ...")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_still(descriptor: int, file: Path) -> bool:
    """Whether the lock that was opened is the one that others will open."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _tell_unlockable(file: Path) -> None:
    from mgll_encoder.common.cli import warn

    file.unlink(missing_ok=True)
    warn(f"{file.parent} is on a disk without locks: take care that no other process writes there")
