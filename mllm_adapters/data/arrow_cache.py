"""Tables computed row by row with `datasets`: memory-mapped, cached, computed by several processes."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import torch
from datasets import (
    Dataset,
    Features,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from joblib import cpu_count

from mgll_encoder.common.files import cache_folder, made_once
from mgll_encoder.common.progress import counting

Work = Callable[[Mapping[str, Sequence[Any]]], dict[str, list[Any]]]

ROWS_PER_PROCESS = 10_000
"""Minimum rows per process: fewer are computed before another process has started."""


def compute_table(
    source: Dataset, work: Work, schema: pa.Schema, key: str = "", description: str = ""
) -> Dataset:
    """Apply a function to batches of rows, keeping their order.

    Args:
        source: The rows.
        work: Columns of a batch -> columns of ``schema``.
        schema: Columns of the result.
        key: Hash of everything that the result depends on; the result is then cached on disk. Without it the
            result stays in memory.
        description: Text of the progress bar.
    """
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": source.column_names,
        "features": Features.from_arrow_schema(schema),
    }
    hidden = are_progress_bars_disabled()
    disable_progress_bars()  # of the processes' own; ours is shown instead
    try:
        if not key:
            return source.map(work, keep_in_memory=True, new_fingerprint=uuid4().hex, **options)
        processes = max(1, min(cpu_count(), len(source) // ROWS_PER_PROCESS))

        def make(partial: Path) -> None:
            partial.mkdir()
            done = partial / "done"
            with _followed(done, description, len(source)):
                source.map(
                    OneThread(work, done),
                    cache_file_name=str(partial / "rows.arrow"),
                    new_fingerprint=key[:32],  # datasets appends to it for each process
                    num_proc=processes if processes > 1 else None,
                    **options,
                )
            done.unlink()

        folder = made_once(cache_folder("rows") / key, make)
        parts = [Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    finally:
        if not hidden:
            enable_progress_bars()


@contextmanager
def _followed(done: Path, description: str, total: int) -> Iterator[None]:
    """Show progress by the size of a file, to which every process appends a byte per row."""
    done.touch()
    ended = threading.Event()
    with counting(description, total) as advance:

        def follow() -> None:
            seen, last = 0, False
            while not last:
                last = ended.wait(1.0)
                size = done.stat().st_size
                advance(size - seen)
                seen = size

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class OneThread:
    """Work that does not use torch's threads: they do not survive a fork.

    Args:
        work: Computes the columns of a batch.
        done: File that gets a byte per row.
    """

    def __init__(self, work: Work, done: Path) -> None:
        self.work, self.done, self.home = work, done, os.getpid()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """See `compute_table`."""
        if os.getpid() != self.home:
            torch.set_num_threads(1)
        columns = self.work(batch)
        with self.done.open("ab") as stream:
            stream.write(bytes(len(next(iter(batch.values())))))
        return columns
