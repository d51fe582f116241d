"""Tables computed row by row with `datasets`: memory-mapped, cached, computed by several processes."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
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
from mgll_encoder.common.progress import counter

_logger = logging.getLogger(__name__)

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
    disable_progress_bars()
    try:
        if not key:
            return source.map(work, keep_in_memory=True, new_fingerprint=uuid4().hex, **options)
        processes = max(1, min(cpu_count(), len(source) // ROWS_PER_PROCESS))

        def make(partial: Path) -> None:
            partial.mkdir()
            _logger.info(f"{description} ({len(source)}) ...")
            if counter():
                enable_progress_bars()
            source.map(
                OneThread(work),
                cache_file_name=str(partial / "rows.arrow"),
                new_fingerprint=key[:32],  # datasets appends to it for each process
                num_proc=processes if processes > 1 else None,
                desc=description,
                **options,
            )

        folder = made_once(cache_folder("rows") / key, make)
        parts = [Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    finally:
        (disable_progress_bars if hidden else enable_progress_bars)()


class OneThread:
    """Work that does not use torch's threads: they do not survive a fork."""

    def __init__(self, work: Work) -> None:
        self.work, self.home = work, os.getpid()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """See `compute_table`."""
        if os.getpid() != self.home:
            torch.set_num_threads(1)
        return self.work(batch)
