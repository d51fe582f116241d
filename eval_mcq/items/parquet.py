"""Benchmarks as Parquet: the fields of the JSON Lines, the header as metadata, optionally the bytes of the images."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import BadDataError, NotFoundError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

SUFFIX = ".parquet"
HEADER = b"eval_mcq_header"
"""Metadata key of the header line."""

EMBEDDED = "image_bytes"
"""Column with the bytes of each image, in the order of the paths; not part of a question."""

BATCH = 256
"""Rows per row group: at most about 100 MB of photographs."""


def _schema(header: str, embed: bool) -> "pyarrow.Schema":
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    fields = {
        "id": text, "images": texts, "question": text, "options": texts, "answer": text, "category": text,
        "source": text, "patient": text, "tags": texts,
    } | ({EMBEDDED: pa.list_(pa.binary())} if embed else {})  # fmt: skip
    return pa.schema(list(fields.items()), metadata={HEADER: header.encode()})


def write_rows(path: Path, header: str, rows: Iterable[Mapping[str, Any]], embed: bool = False) -> None:
    """Write a benchmark, one row group at a time.

    Args:
        path: File to write.
        header: The header line, JSON.
        rows: Questions as plain data; with ``embed`` also their ``image_bytes``.
        embed: Whether to store the images in the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(header, embed)
    batch: list[Mapping[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def parquet_lines(path: Path) -> list[str]:
    """Read a benchmark as its JSON Lines; embedded images are ignored.

    Raises:
        UserError: there is no such file, or it is not Parquet, or not a benchmark.
    """
    with _opened(path) as file:
        header = _header(path, file)
        columns = [name for name in file.schema_arrow.names if name != EMBEDDED]
        rows = (row for part in file.iter_batches(columns=columns) for row in part.to_pylist())
        return [header, *(json.dumps(row, default=_foreign) for row in rows)]


def embedded_images(path: Path) -> Iterator[list[bytes] | None]:
    """Yield the image bytes of each question in the order of the file; None if it has none.

    Raises:
        UserError: as :func:`parquet_lines`.
    """
    import pyarrow as pa

    with _opened(path) as file:
        schema = file.schema_arrow
        if has := EMBEDDED in schema.names:
            kind = schema.field(EMBEDDED).type
            if kind not in (pa.list_(pa.binary()), pa.large_list(pa.large_binary())):
                raise BadDataError(
                    f"bench {path}: column '{EMBEDDED}' has type {kind}, expected {pa.list_(pa.binary())}"
                )
        for part in file.iter_batches(batch_size=BATCH, columns=[EMBEDDED] if has else ["id"]):
            yield from part.column(EMBEDDED).to_pylist() if has else [None] * len(part)


def has_embedded(path: Path) -> bool:
    """Return whether the file contains images.

    Raises:
        UserError: as :func:`parquet_lines`.
    """
    with _opened(path) as file:
        return EMBEDDED in file.schema_arrow.names


@contextmanager
def _opened(path: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Open the file; errors of the library within the block are reported in one line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise NotFoundError(f"bench {path} does not exist or is not a file")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadDataError(f"bench {path} cannot be read as Parquet: {error}") from None


def _foreign(value: Any) -> Any:
    raise ValueError(
        f"it contains a {type(value).__name__}, but a bench has only text, numbers and lists of them"
    )


def _header(path: Path, file: "pyarrow.parquet.ParquetFile") -> str:
    metadata = file.schema_arrow.metadata or {}
    if HEADER not in metadata:
        raise BadDataError(
            f"bench {path} has no header of eval-mcq: import it with `import_benchmark(format=hf)`, naming its columns"
        )
    return str(metadata[HEADER].decode())
