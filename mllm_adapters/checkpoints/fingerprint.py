"""Hashes that identify files and tensors: of all bytes, or of samples where reading everything costs too much.

A swap never reads a hard-linked shard of a language model, so its record is its size and one hash over its
header and the first and last 4 KiB of every tensor. This detects another file, a truncated one and a trained
one, but not a flipped bit in the middle of a tensor. The names of shards in a Hugging Face cache are their
full hashes.
"""

import re
from hashlib import sha256
from pathlib import Path

from mgll_encoder.common import files
from mgll_encoder.weights.spans import Span, spans
from mgll_encoder.weights.weight_file import is_safetensors
from mllm_adapters.checkpoints.data import Data

_EDGE = 4096
_BLOCK = 16 << 20
_BLOB = re.compile(r"[0-9a-f]{64}")


class FileRecord(Data):
    """The record of a file.

    Attributes:
        size: Bytes.
        sha256: Of the whole file, if it was read anyway or its hash is known without reading.
        sample: SHA-256 of a safetensors file's header and of both ends of its tensors.
    """

    size: int
    sha256: str | None = None
    sample: str | None = None


def whole(file: Path) -> FileRecord:
    """Record a file by its full hash."""
    return FileRecord(size=file.stat().st_size, sha256=files.sha256(file))


def sampled(file: Path) -> FileRecord:
    """Record a weight file by a sample."""
    size = file.stat().st_size
    sample = sample_hash(file) if is_safetensors(file) else None
    return FileRecord(size=size, sha256=blob_hash(file), sample=sample)


def sample_hash(file: Path) -> str:
    """Return the SHA-256 over the header of a safetensors file and both ends of each of its tensors."""
    found = sorted(spans(file).values(), key=lambda span: span.start)
    digest = sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(min((span.start for span in found), default=0)))
        for span in found:
            for start in sorted({span.start, max(span.start, span.start + span.length - _EDGE)}):
                stream.seek(start)
                digest.update(stream.read(min(_EDGE, span.start + span.length - start)))
    return digest.hexdigest()


def span_hash(span: Span) -> str:
    """Return the SHA-256 of a tensor's bytes in its file."""
    digest, left = sha256(), span.length
    with span.file.open("rb") as stream:
        stream.seek(span.start)
        while left and (block := stream.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def blob_hash(file: Path) -> str | None:
    """Return the SHA-256 in the name of a file in a Hugging Face cache (``blobs/<sha256>``), else None."""
    blob = file.resolve()
    in_cache = file.is_symlink() and blob.parent.name == "blobs"
    return blob.name if in_cache and _BLOB.fullmatch(blob.name) else None


def agrees(record: FileRecord, file: Path, *, read_whole: bool = True) -> bool:
    """Whether a file matches everything in a record.

    Args:
        record: The record.
        file: A file that exists.
        read_whole: Whether to read the whole file if its full hash is recorded.
    """
    if file.stat().st_size != record.size:
        return False
    if record.sha256 and (known := blob_hash(file)):
        return known == record.sha256
    if record.sha256 and read_whole:
        return files.sha256(file) == record.sha256
    return record.sample is None or sample_hash(file) == record.sample
