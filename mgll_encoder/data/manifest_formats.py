"""File formats of manifests: JSON lines or Parquet. Both give the same JSON texts to :mod:`.manifest`.

In Parquet the columns are the fields of a row (``texts`` is a map from granularity to a list of texts), and the header
is the value of ``mgll-manifest`` in the schema's metadata. Rows are stored in groups of 512 and read by group, so
memory does not grow with the length of a manifest.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.extras import require

PARQUET = ".parquet"
_MARK = b"PAR1"
_HEADER_KEY = b"mgll-manifest"
_GROUP = 512


class Format(Protocol):
    """The interface of a manifest format.

    Attributes:
        unit: What error messages call a row.
        header_place: What error messages call the location of the header.
    """

    unit: str
    header_place: str

    def header(self, path: Path) -> bytes:
        """Return the header, as JSON."""
        ...

    def rows(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """Yield the number of each row for the user, its place for :meth:`row`, and its JSON."""
        ...

    def row(self, path: Path, place: int) -> bytes:
        """Return the JSON of the row at a place."""
        ...

    def write(self, path: Path, header: str, rows: Iterable[str]) -> None:
        """Write a manifest from JSON texts."""
        ...


class JsonLines:
    """One JSON object per line, the header first; a row's place is the byte offset of its line."""

    unit = "line"
    header_place = "line 1"

    def header(self, path: Path) -> bytes:
        """See :class:`Format`."""
        with path.open("rb") as stream:
            return stream.readline()

    def rows(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """See :class:`Format`."""
        with path.open("rb") as stream:
            offset = len(stream.readline())
            for number, line in enumerate(stream, start=2):
                if line.strip():
                    yield number, offset, line
                offset += len(line)

    def row(self, path: Path, place: int) -> bytes:
        """See :class:`Format`."""
        with path.open("rb") as stream:
            stream.seek(place)
            return stream.readline()

    def write(self, path: Path, header: str, rows: Iterable[str]) -> None:
        """See :class:`Format`."""
        with path.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in (header, *rows))


class Parquet:
    """A Parquet file; a row's place is its index, its number counts from 1."""

    unit = "row"
    header_place = "metadata"

    def header(self, path: Path) -> bytes:
        """See :class:`Format`."""
        header: bytes = (_opened(path).schema_arrow.metadata or {}).get(_HEADER_KEY, b"")
        return header

    def rows(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """See :class:`Format`."""
        place = 0
        for rows in _batches(path):
            for row in rows:
                yield place + 1, place, _as_json(row)
                place += 1

    def row(self, path: Path, place: int) -> bytes:
        """See :class:`Format`."""
        with _readable(path):
            group, start = _group_of(str(path), os.getpid(), place)
            return _as_json(_group(str(path), os.getpid(), group).slice(place - start, 1).to_pylist()[0])

    def write(self, path: Path, header: str, rows: Iterable[str]) -> None:
        """See :class:`Format`."""
        _require_pyarrow()
        import pyarrow as pa
        from pyarrow import parquet

        texts = pa.map_(pa.string(), pa.list_(pa.string()))
        plain = [(name, pa.string()) for name in ("patient", "split", "source")]
        schema = pa.schema([("image", pa.string()), ("texts", texts), *plain]).with_metadata(
            {_HEADER_KEY: header}
        )
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            chunk: list[dict[str, Any]] = []
            for row in rows:
                chunk.append(json.loads(row))
                if len(chunk) == _GROUP:
                    writer.write_table(pa.Table.from_pylist(chunk, schema))
                    chunk = []
            if chunk:
                writer.write_table(pa.Table.from_pylist(chunk, schema))


def format_named(path: Path) -> Format:
    """Return the format for the name of a new manifest: Parquet for ``.parquet``, else JSON lines."""
    return Parquet() if path.suffix == PARQUET else JsonLines()


def format_of(path: Path) -> Format:
    """Detect the format of an existing manifest from its content.

    Raises:
        UserError: it is named ``.parquet``, but is not Parquet.
    """
    with path.open("rb") as stream:
        start = stream.read(len(_MARK))
    if start == _MARK:
        return Parquet()
    if path.suffix == PARQUET:
        raise BadDataError(f"manifest {path} is not a Parquet file: write or copy it again")
    return JsonLines()


@cache  # a file is opened many times, and the check takes as long as reading it
def _require_pyarrow() -> None:
    require("pretrain", "a manifest in Parquet", "pyarrow")


def _as_json(row: dict[str, Any]) -> bytes:
    """Convert a row to JSON: empty cells are omitted, a map's pairs become an object."""
    given = {name: value for name, value in row.items() if value is not None}
    if isinstance(given.get("texts"), list):
        with suppress(TypeError, ValueError):  # not pairs: reported when the row is checked
            given["texts"] = {str(name): texts for name, texts in given["texts"]}
    elif isinstance(given.get("texts"), dict):  # a struct with one field per granularity
        given["texts"] = {name: value for name, value in given["texts"].items() if value is not None}
    return json.dumps(given, ensure_ascii=False, default=str).encode()


def _opened(path: Path) -> Any:
    _require_pyarrow()
    from pyarrow import parquet

    with _readable(path):
        return parquet.ParquetFile(
            path
        )  # not memory-mapped: a file truncated in the meantime would kill the process


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    batches = iter(_opened(path).iter_batches(batch_size=_GROUP, use_threads=False))
    while True:
        with _readable(path):
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        if rows is None:
            return
        yield rows


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Report a damaged file in one line; such files raise errors of any kind, at any read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise BadDataError(f"manifest {path} is damaged Parquet ({error}): write or copy it again") from None


# opened files and groups are cached per process: a worker must not use its parent's


@lru_cache(maxsize=4)
def _file(path: str, process: int) -> tuple[Any, list[int]]:  # noqa: ARG001 - part of the key
    file = _opened(Path(path))
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return file, [0, *accumulate(sizes)]


def _group_of(path: str, process: int, place: int) -> tuple[int, int]:
    starts = _file(path, process)[1]
    group = bisect_right(starts, place) - 1
    return group, starts[group]


@lru_cache(maxsize=16)
def _group(path: str, process: int, group: int) -> Any:
    return _file(path, process)[0].read_row_group(group, use_threads=False)
