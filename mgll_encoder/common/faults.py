"""Errors of the operating system (a full disk, a missing file, no permission), in one line with advice."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mgll_encoder.common.errors import StorageError, UserError

CACHE = "MGLL_CACHE_DIR"
"""Environment variable that names the cache folder."""

ADVICE: Mapping[int, str] = {
    errno.ENOSPC: "free space there, or choose a location on another disk",
    errno.EDQUOT: "free space within your quota, or choose a location on another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a disk that allows larger files",
    errno.EROFS: "choose a writable location",
    errno.EACCES: "check its permissions, or choose another location",
    errno.EPERM: "check its permissions, or choose another location",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
    errno.EISDIR: "expected a file",
    errno.EEXIST: "another process has just created it: choose another location, or repeat the command",
    errno.ENOTEMPTY: "another process is writing there: repeat the command",
    errno.ENAMETOOLONG: "choose a shorter name (255 bytes for each part of a path)",
    errno.ELOOP: "a link there points to itself: check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096)",
    errno.ENFILE: "the machine has too many open files: close other programs",
    errno.EIO: "the disk cannot be read or written: check it, or copy the data to another one",
    errno.ESTALE: "the network disk has lost it: repeat the command",
    errno.EBUSY: "another program uses it: repeat the command",
    errno.ETXTBSY: "another program uses it: repeat the command",
    errno.ENODEV: "expected a file on a disk",
    errno.ENXIO: "expected a file on a disk",
    errno.ENOMEM: "memory is full: close other programs",
}
"""Error number -> what to do about it. Other numbers are bugs in this project."""

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that occur only while writing."""

_NUMBER = re.compile(r"(?:\[Errno |\[errno |os error |Os \{ code: )(\d+)")
"""How libraries quote the error number: Python in a worker's traceback, Arrow, Rust (safetensors, tokenizers)."""

_UNWRITTEN = re.compile(
    r"iostream error|inline_container\.cc.*unexpected pos|PytorchStreamWriter failed writing"
)
"""What torch says when a write failed, without the reason."""


@dataclass(frozen=True)
class Fault:
    """An error of the operating system.

    Attributes:
        number: Its ``errno``.
        path: The file or folder, if known.
    """

    number: int
    path: str | None = None

    def line(self) -> str:
        """Say what happened, where, and what to do."""
        if self.path is None:
            return self.reason()
        path = Path(self.path)
        if self.number == errno.ENOENT and path.is_symlink():
            return f"{path} is a link to {path.readlink()}, which does not exist: {ADVICE[self.number]}"
        return f"{path}: {self.reason()}"

    def reason(self) -> str:
        """Say what happened, and what to do."""
        advice = ADVICE[self.number]
        cache = os.environ.get(CACHE, str(Path("~/.cache/mgll-mllm").expanduser()))
        if self.path and self.path.startswith(cache) and self.number != errno.ENOENT:
            advice = f"set {CACHE} to a writable folder"
        return f"{os.strerror(self.number)}: {advice}"


def find_fault(error: BaseException) -> Fault | None:
    """Find the error of the operating system behind an exception, whichever library wrapped it.

    An exception that was being handled when another was raised counts only if it is about writing: a missing file
    that was expected does not explain a later error.
    """
    fault = _own_fault(error)
    if fault or error.__cause__:
        return fault or (find_fault(error.__cause__) if error.__cause__ else None)
    if error.__context__ and not error.__suppress_context__:
        fault = find_fault(error.__context__)
    return fault if fault and fault.number in _WRITING else None


def _own_fault(error: BaseException) -> Fault | None:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        known = error.errno in ADVICE and (error.filename is not None or error.errno != errno.ENOENT)
        path = None if error.filename is None else os.fsdecode(error.filename)
        return Fault(error.errno, path) if known else None
    if _UNWRITTEN.search(text):
        return Fault(errno.ENOSPC)
    quoted = _NUMBER.search(text)
    return Fault(int(quoted[1])) if quoted and int(quoted[1]) in _WRITING else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the output if the disk refuses a write, whichever library raises the error.

    Raises:
        UserError: the disk is full or read-only, a limit is reached, or ``path`` or a hidden file next to it cannot be
            created.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = find_fault(error)
        if fault is None or not (fault.number in _WRITING or _is_of(path, fault)):
            raise
        raise StorageError(f"{path} cannot be written: {Fault(fault.number, str(path)).reason()}") from error


def _is_of(path: Path, fault: Fault) -> bool:
    """Return whether an error is about an output, its folder, or a hidden file next to it."""
    found, whole = Path(fault.path or "/"), path.absolute()
    hidden = any(part.startswith(f".{path.name}.") for part in found.parts)
    return hidden or (whole.is_relative_to(found.absolute()) and fault.path is not None)
