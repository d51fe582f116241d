"""How a manifest lies on disk: JSON lines, or Parquet. Both give the same JSON texts to :mod:`.manifest`.

In Parquet the columns are the fields of a row (``texts`` is a map from granularity to a list of texts), and the
header is the value of ``mgll-manifest`` in the schema's metadata. Rows lie in groups of 512: a row is
read with its group, so a manifest of any length needs no memory to speak of.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.extras import require

PARQUET = ".parquet"
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
        return (_opened(path).schema_arrow.metadata or {}).get(_HEADER_KEY, b"")

    def rows(self, path: Path) -> Iterator[tuple[int, int, bytes]]:
        """See :class:`Format`."""
        place = 0
        for batch in _opened(path).iter_batches(batch_size=_GROUP, use_threads=False):
            for row in batch.to_pylist():
                yield place + 1, place, _as_json(row)
                place += 1

    def row(self, path: Path, place: int) -> bytes:
        """See :class:`Format`."""
        group, start = _group_of(str(path), os.getpid(), place)
        return _as_json(_group(str(path), os.getpid(), group).slice(place - start, 1).to_pylist()[0])

    def write(self, path: Path, header: str, rows: Iterable[str]) -> None:
        """See :class:`Format`."""
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


def format_of(path: Path) -> Format:
    """The format that a manifest's name asks for: Parquet for ``.parquet``, JSON lines for all others."""
    if path.suffix != PARQUET:
        return JsonLines()
    require("pretrain", f"manifest {path}", "pyarrow")
    return Parquet()


def _as_json(row: dict[str, Any]) -> bytes:
    """A row; an empty cell is a field that is left out, a map's pairs are an object."""
    given = {name: value for name, value in row.items() if value is not None}
    if isinstance(given.get("texts"), list):
        given["texts"] = dict(given["texts"])
    elif isinstance(given.get("texts"), dict):  # a struct with one field per granularity
        given["texts"] = {name: value for name, value in given["texts"].items() if value is not None}
    return json.dumps(given, ensure_ascii=False, default=str).encode()


def _opened(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"manifest {path} is no Parquet file ({error}): write or copy it again") from None


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
