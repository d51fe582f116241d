"""Running a benchmark in one process or in several launched together."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from eval_mcq.items.schema import Bench
    from eval_mcq.records.run_record import Run, RunRecord
    from eval_mcq.runs.run import Settings
    from eval_mcq.scoring.answerer import Answerer

_logger = logging.getLogger(__name__)

WAIT = 2.0
"""Seconds between checks whether the other processes are done."""


def answer(
    bench: "Bench", load: "Callable[[], Answerer[Any]]", record: "RunRecord", out: Path, settings: "Settings"
) -> "Run | None":
    """Run a benchmark in this process, or under ``accelerate launch`` or similar in all processes together.

    Each process answers a shard in its own folder; the first one waits for the others and merges. They share only the
    file system.

    Returns:
        The run; None in all processes but the first.

    Raises:
        UserError: see `run_bench`; or a shard was given with several processes.
    """
    from eval_mcq.records.answers_file import lock_run
    from eval_mcq.records.batching import Shard
    from eval_mcq.records.run_record import read_run
    from eval_mcq.runs.run import check_resumable, run_bench

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return run_bench(bench, load, record, out, settings)
    if settings.shard.count > 1 or settings.limit is not None:
        raise InvalidArgumentError(
            "`shard` and `limit` are for a single process: leave them out under accelerate launch"
        )
    check_resumable(out, record, settings.force)
    if out.exists() and not settings.force and (whole := read_run(out)).complete:
        return whole if rank == 0 else None
    folders = [out.with_name(f"{out.name}.shards") / f"{i}-of-{world}" for i in range(world)]
    shard = Shard(rank, world)
    own = record.model_copy(update={"shard": shard.name})

    def answer_own() -> None:
        run_bench(bench, load, own, folders[rank], replace(settings, shard=shard))

    if rank > 0:
        answer_own()
        return None
    with lock_run(out):
        answer_own()
        return _merged(folders, record, bench, out, settings)


def _merged(
    folders: list[Path], record: "RunRecord", bench: "Bench", out: Path, settings: "Settings"
) -> "Run":
    """Wait for all shards, merge them, and remove them (in the first process)."""
    import shutil

    from eval_mcq.records.answers_file import lock_run
    from eval_mcq.runs.merge import merge_held
    from eval_mcq.runs.run import answered, planned_rows

    _logger.info(f"Waiting for the other {len(folders) - 1} processes ...")
    expected = planned_rows(bench, record, settings, len(folders))
    while any(answered(f) < n for f, n in zip(folders, expected, strict=True)):
        time.sleep(WAIT)
    for folder in folders:
        with lock_run(folder, wait=True):  # its process still has to sort the answers
            pass
    run = merge_held(folders, out, bench.path, force=True)
    shutil.rmtree(folders[0].parent)
    return run
