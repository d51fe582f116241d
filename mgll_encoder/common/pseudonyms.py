"""Names for patients and files that only the holder of a key can link to the originals.

A bare hash of a patient id is undone by hashing every id that a hospital may have given; with a random key it is not.
The key stays beside the input and never enters an output; manifests and benches of one table name a patient alike.
"""

import hmac
import logging
import os
import re
import secrets
import tempfile
from functools import cached_property
from pathlib import Path

from mgll_encoder.common.errors import UserError

_logger = logging.getLogger(__name__)

KEY_FILE = ".mgll-key"
"""Name of the key beside the input; only its owner may read it."""

KEY_VARIABLE = "MGLL_KEY_FILE"
"""Environment variable that names a key file instead, for read-only inputs and keys shared between machines."""

KEY_BYTES = 32
DIGITS = 16
"""Of a pseudonym: 64 bits, in hexadecimal."""

PATIENT, FILE = "pt", "im"
_FORM = re.compile(rf"({PATIENT}|{FILE})-[0-9a-f]{{{DIGITS}}}")


def is_pseudonym(name: str) -> bool:
    """Whether this is what :class:`Pseudonyms` writes, under any key."""
    return _FORM.fullmatch(name) is not None


class Pseudonyms:
    """Pseudonyms of whatever an input names: its kind and 16 hexadecimal digits (HMAC-SHA-256, cut).

    The key is read, or drawn and written, when the first pseudonym is asked for.

    Args:
        source: The label table or the folder that the names come from; the key is kept beside it.
    """

    def __init__(self, source: Path) -> None:
        self._source = source

    def patient(self, identity: str) -> str:
        """The pseudonym of a patient; one that is given stays.

        Raises:
            UserError: the key cannot be read or written.
        """
        return identity if is_pseudonym(identity) else self._of(PATIENT, identity)

    def file(self, name: str) -> str:
        """The pseudonym of a file, whose path may hold a patient's name.

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
            _draw_key(path)
        return _read_key(path)


def key_path(source: Path) -> Path:
    """Where the key of an input is kept.

    The file that `KEY_VARIABLE` names; else beside the input or, where that is read-only, in the user's configuration
    folder, which is said.
    """
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named).expanduser()
    beside = source.resolve().parent / KEY_FILE
    if beside.exists() or _writable(beside.parent):
        return beside
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = configuration / "mgll-mllm" / "pseudonyms.key"
    _logger.info(
        f"{beside.parent} is read-only: the key of the patients' pseudonyms is {path} ({KEY_VARIABLE} names another)"
    )
    return path


def _writable(folder: Path) -> bool:
    """Whether a file may be put there; root may write anywhere, but should not where nobody else may."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _draw_key(path: Path) -> None:
    """Write a new random key, whole and for its owner alone; one that another process has just written stays."""
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
        raise UserError(
            f"the key of the patients' pseudonyms cannot be written to {path} ({error.strerror}): name a file of your "
            f"own with {KEY_VARIABLE}=FILE"
        ) from None


def _publish(drawn: Path, path: Path) -> None:
    try:
        os.link(drawn, path)  # unlike a rename, leaves a key alone that is there by now
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            drawn.rename(path)


def _read_key(path: Path) -> bytes:
    try:
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        key = bytes.fromhex(text)
    except PermissionError:
        raise UserError(
            f"key {path} of the patients' pseudonyms may not be read by this user: ask its owner for a copy, and name "
            f"that with {KEY_VARIABLE}=FILE"
        ) from None
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(
            f"key {path} of the patients' pseudonyms is damaged: expected a file of {2 * KEY_BYTES} hexadecimal "
            f"digits; restore it, or name another with {KEY_VARIABLE}=FILE"
        )
    return key
