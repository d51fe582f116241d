"""Facts about image files before training: whether they decode, their size, and the hash of their content.

Each file is read once per machine: facts are cached under the reader's version, path, size, inode and
modification times. No program can reset the last of these (ctime), so a file that has changed is read again.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from joblib import cpu_count

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.files import appearing, cache_folder
from mgll_encoder.common.images import READER_VERSION, open_image
from mgll_encoder.common.picture_bytes import picture_digest
from mgll_encoder.common.progress import track
from mllm_adapters.checkpoints.locate import check_image_folder

SCHEMA = pa.schema(
    [
        ("key", pa.binary()),
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fault", pa.string()),
    ]
)

SHARD = 4096
"""Number of files whose facts are written at once: a killed run reads at most so many again."""


@dataclass(frozen=True, slots=True)
class ImageFact:
    """Facts about one file.

    Attributes:
        digest: Hash of the bytes that decide its pixels (`picture_digest`).
        width: In pixels.
        height: In pixels.
        fault: Why it cannot be used; empty if it can.
    """

    digest: str
    width: int
    height: int
    fault: str


def image_facts(names: Iterable[str], folder: Path) -> dict[str, ImageFact]:
    """Decode and hash every image that is not in the cache.

    Args:
        names: Paths below ``folder``, or absolute.
        folder: The image folder.

    Raises:
        UserError: the folder or images in it are missing; the message counts them.
    """
    check_image_folder(folder)
    keys, missing = {}, []
    for name in names:
        try:
            keys[name] = _key(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
    if missing:
        total = len(keys) + len(missing)
        raise BadDataError(f"{len(missing)} of {total} images are missing in {folder}, first: {missing[0]}")
    known = _known(set(keys.values()))
    unknown = [name for name, key in keys.items() if key not in known]
    if unknown:
        known |= _read(unknown, keys, folder)
    return {name: known[key] for name, key in keys.items()}


def _key(path: Path) -> bytes:
    state = path.stat()
    told = (
        READER_VERSION,
        str(path.absolute()),
        state.st_size,
        state.st_ino,
        state.st_mtime_ns,
        state.st_ctime_ns,
    )
    return hashlib.sha256(repr(told).encode()).digest()


def _known(wanted: set[bytes]) -> dict[bytes, ImageFact]:
    found = {}
    for shard in sorted(cache_folder("images").glob("*.arrow")):
        with pa.memory_map(str(shard)) as source:
            table = pa.ipc.open_file(source).read_all()
        for row in table.to_pylist():
            if (key := row.pop("key")) in wanted:
                found[key] = ImageFact(**row)
    return found


def _read(names: Sequence[str], keys: Mapping[str, bytes], folder: Path) -> dict[bytes, ImageFact]:
    """Compute the facts of files, and write them to the cache shard by shard."""
    return {
        keys[name]: fact for name, fact in track(_looks(names, keys, folder), "Checking images", len(names))
    }


def _looks(names: Sequence[str], keys: Mapping[str, bytes], folder: Path) -> Iterator[tuple[str, ImageFact]]:
    with ThreadPoolExecutor(cpu_count()) as pool:  # Pillow releases the GIL while decoding
        for start in range(0, len(names), SHARD):
            shard: dict[bytes, ImageFact] = {}
            part = names[start : start + SHARD]
            for name, fact in zip(part, pool.map(_look, (folder / name for name in part)), strict=True):
                shard[keys[name]] = fact
                yield name, fact
            _write(shard)


def _write(facts: Mapping[bytes, ImageFact]) -> None:
    rows = [
        {"key": key, "digest": f.digest, "width": f.width, "height": f.height, "fault": f.fault}
        for key, f in facts.items()
    ]
    name = hashlib.sha256(b"".join(facts)).hexdigest()
    table = pa.Table.from_pylist(rows, SCHEMA)
    with (
        appearing(cache_folder("images") / f"{name}.arrow") as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        writer.write_table(table)


def _look(path: Path) -> ImageFact:
    """Decode a whole file, as training will."""
    try:
        width, height = open_image(path).size
        return ImageFact(picture_digest(path), width, height, "")
    except UserError as error:
        return ImageFact("", 0, 0, str(error))
