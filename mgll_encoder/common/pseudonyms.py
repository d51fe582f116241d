"""Pseudonyms of patients and files that only the holder of a key can link to the originals.

A plain hash of a patient id can be inverted by hashing every id that a hospital may have assigned; with a random key
it cannot. The key stays next to the input and never enters an output; manifests and benchmarks built from one table
use the same pseudonym for a patient.
"""

import hmac
import logging
import os
import re
import secrets
import tempfile
from functools import cached_property
from pathlib import Path

from mgll_encoder.common.errors import BadDataError, StorageError

_logger = logging.getLogger(__name__)

KEY_FILE = ".mgll-key"
"""Name of the key file next to the input; only its owner may read it."""

KEY_VARIABLE = "MGLL_KEY_FILE"
"""Environment variable for another key file, for read-only inputs and keys shared between machines."""

KEY_BYTES = 32
DIGITS = 16
"""Digits of a pseudonym: 64 bits, in hexadecimal."""

PATIENT, FILE = "pt", "im"
_FORM = re.compile(rf"({PATIENT}|{FILE})-[0-9a-f]{{{DIGITS}}}")


def is_pseudonym(name: str) -> bool:
    """Return whether a name has the form that :class:`Pseudonyms` writes, under any key."""
    return _FORM.fullmatch(name) is not None


class Pseudonyms:
    """Pseudonyms of the names in an input: their kind and 16 hexadecimal digits (truncated HMAC-SHA-256).

    The key is read, or generated and written, when the first pseudonym is needed.

    Args:
        source: The label table or folder that the names come from; the key is stored next to it.
    """

    def __init__(self, source: Path) -> None:
        self._source = source

    def patient(self, identity: str) -> str:
        """Return the pseudonym of a patient; a pseudonym is returned as it is.

        Raises:
            UserError: the key cannot be read or written.
        """
        return identity if is_pseudonym(identity) else self._of(PATIENT, identity)

    def file(self, name: str) -> str:
        """Return the pseudonym of a file, whose path may contain a patient's name.

        Raises:
            UserError: the key cannot be read or written.
        """
        return self._of(FILE, name)

    def _of(self, kind: str, name: str) -> str:
        digest = hmac.digest(self._key, f"{kind}\0{name}".encode(errors="surrogateescape"), "sha256")
        return f"{kind}-{digest.hex()[:DIGITS]}"

    @cached_property
    def _key(self) -> bytes:
        path = key_path(self._source)
        if not path.exists():
            _write_new_key(path)
        return _read_key(path)


def key_path(source: Path) -> Path:
    """Return the path of an input's key.

    The file named by `KEY_VARIABLE`; else next to the input or, if that is read-only, in the user's configuration
    folder, which is logged.
    """
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named).expanduser()
    adjacent = source.resolve().parent / KEY_FILE
    if adjacent.exists() or _writable(adjacent.parent):
        return adjacent
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = configuration / "mgll-mllm" / "pseudonyms.key"
    _logger.info(
        f"{adjacent.parent} is read-only: the key of the patients' pseudonyms is {path} ({KEY_VARIABLE} names another)"
    )
    return path


def _writable(folder: Path) -> bool:
    """Return whether a folder is writable; root may write anywhere, but should respect the mode."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _write_new_key(path: Path) -> None:
    """Write a new random key, atomically and readable only by its owner; keep one that another process just wrote."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{KEY_FILE}.", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_hex(KEY_BYTES) + "\n")
            _publish(Path(name), path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"the key of the patients' pseudonyms cannot be written to {path} ({error.strerror}): name a file of your "
            f"own with {KEY_VARIABLE}=FILE"
        ) from None


def _publish(new: Path, path: Path) -> None:
    try:
        os.link(new, path)  # unlike a rename, does not replace an existing key
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            new.rename(path)


def _read_key(path: Path) -> bytes:
    try:
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        key = bytes.fromhex(text)
    except PermissionError:
        raise StorageError(
            f"key {path} of the patients' pseudonyms is not readable by this user: ask its owner for a copy, and name "
            f"that with {KEY_VARIABLE}=FILE"
        ) from None
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise BadDataError(
            f"key {path} of the patients' pseudonyms is damaged: expected a file of {2 * KEY_BYTES} hexadecimal "
            f"digits; restore it, or name another with {KEY_VARIABLE}=FILE"
        )
    return key
