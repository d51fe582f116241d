"""How a manifest lies on disk: JSON lines, or Parquet. Both give the same JSON texts to :mod:`.manifest`.

In Parquet the columns are the fields of a row (``texts`` is a map from granularity to a list of texts), and the
header is the value of ``mgll-manifest`` in the schema's metadata. Rows lie in groups of 512: a row is
read with its group, so a manifest of any length needs no memory to speak of.
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
    """What a format can do.

    Attributes:
        unit: What an error message calls a row.
        header_place: How an error message calls the place of the header.
    """

    unit: str
    header_place: str

    def header(self, path: Path) -> bytes:
        """The header, as JSON."""
        ...

    def rows(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """Number of the row for the user, its place for :meth:`row`, and its JSON."""
        ...

    def row(self, path: Path, place: int) -> bytes:
        """The JSON of the row at a place."""
        ...

    def write(self, path: Path, header: str, rows: Iterable[str]) -> None:
        """Write a manifest out of JSON texts."""
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
    """The format that the name of a new manifest asks for: Parquet for ``.parquet``, JSON lines for all others."""
    return Parquet() if path.suffix == PARQUET else JsonLines()


def format_of(path: Path) -> Format:
    """The format of a manifest that is there, by its content.

    Raises:
        UserError: it is called ``.parquet``, and is none.
    """
    with path.open("rb") as stream:
        start = stream.read(len(_MARK))
    if start == _MARK:
        return Parquet()
    if path.suffix == PARQUET:
        raise BadDataError(f"manifest {path} is no Parquet file: write or copy it again")
    return JsonLines()


@cache  # a file is opened many times, and looking at packages takes as long as reading it
def _require_pyarrow() -> None:
    require("pretrain", "a manifest in Parquet", "pyarrow")


def _as_json(row: dict[str, Any]) -> bytes:
    """A row; an empty cell is a field that is left out, a map's pairs are an object."""
    given = {name: value for name, value in row.items() if value is not None}
    if isinstance(given.get("texts"), list):
        with suppress(TypeError, ValueError):  # no pairs: whoever checks the row says so
            given["texts"] = {str(name): texts for name, texts in given["texts"]}
    elif isinstance(given.get("texts"), dict):  # a struct with one field per granularity
        given["texts"] = {name: value for name, value in given["texts"].items() if value is not None}
    return json.dumps(given, ensure_ascii=False, default=str).encode()


def _opened(path: Path) -> Any:
    _require_pyarrow()
    from pyarrow import parquet

    with _readable(path):
        return parquet.ParquetFile(path)  # not mapped: a file cut short meanwhile would end the process


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
    """Say in a line that a file is damaged; such files raise errors of any kind, wherever they are read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise BadDataError(f"manifest {path} is damaged Parquet ({error}): write or copy it again") from None


# opened files and groups are kept per process: a worker must not read through its parent's


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
