"""Loading a model for a run, and running a benchmark in one process or in several launched together."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mgll_encoder.common.errors import NotFoundError, UserError, unknown_name

if TYPE_CHECKING:
    import torch

    from eval_mcq.items.schema import Bench
    from eval_mcq.records.run_record import Run, RunRecord
    from eval_mcq.runs.run import Settings
    from eval_mcq.scoring.prompt import Mode
    from eval_mcq.scoring.score import Scorer

_logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
WayName = Literal["auto", "prefix", "tree", "plain"]

WAIT = 2.0
"""Seconds between checks whether the other processes are done."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    model: Path
    device: "torch.device"
    dtype: "torch.dtype"
    four_bit: bool

    @property
    def number_format(self) -> str:
        """Number format, for the record of a run."""
        return str(self.dtype).removeprefix("torch.") + (", nf4" if self.four_bit else "")

    def scorer(self, mode: "Mode" = "letters", way: WayName = "auto") -> "Scorer":
        """Load the model.

        Raises:
            UserError: it cannot be loaded, or not in this number format.
        """
        from eval_mcq.scoring.score import Scorer
        from mllm_adapters import load_mllm

        _logger.info(f"Loading {self.model} on {self.device} ...")
        model, processor = load_mllm(self.model, dtype=self.dtype, quantization=self._quantization())
        if self.four_bit and not getattr(model, "is_quantized", False):
            raise UserError(
                f"{self.model} is not in the transformers layout, so it cannot be loaded in 4 bit: convert it "
                "first with `convert()`"
            )
        return Scorer(model, processor, self.device, self.dtype, mode, way)

    def _quantization(self) -> Any:
        if not self.four_bit:
            return None
        from mgll_encoder.common.texts import read_json
        from mllm_adapters import nf4

        config = self.model / "config.json"
        return nf4(read_json(config) if config.is_file() else {}, self.model, self.dtype)


def loading(model: Path, device: str, dtype: Dtype, four_bit: bool) -> Loading:
    """Choose device and number format.

    Raises:
        UserError: there is no such device.
    """
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    automatic = f"cuda:{local % max(torch.cuda.device_count(), 1)}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(automatic if device == "auto" else device)
    except RuntimeError:
        raise unknown_name("device", device, ["auto", "cpu", "cuda", "cuda:1"]) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise NotFoundError(
            f"device '{device}' is not available: torch finds no GPU on this machine; use `device=cpu`"
        )
    if dtype == "auto":
        return Loading(model, chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32, four_bit)
    return Loading(model, chosen, getattr(torch, dtype), four_bit)


def answer(
    bench: "Bench", load: Callable[[], "Scorer"], record: "RunRecord", out: Path, settings: "Settings"
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
        raise UserError(
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
