"""Work folders of a training run: locking, checkpoints to resume from, and saving on a signal."""

import logging
import pickle
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mgll_encoder.common import signals
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.locks import locked
from mgll_encoder.common.step_lines import StepLines
from mgll_encoder.common.texts import parse_json, read_text

_logger = logging.getLogger(__name__)


class ResumeError(UserError):
    """Training cannot be resumed from a checkpoint."""


STATE = "trainer_state.json"
"""The file that the Trainer writes last: a checkpoint without it is incomplete."""

_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, RuntimeError, EOFError, LookupError, ValueError,
    ArithmeticError, TypeError, AttributeError, FileNotFoundError, struct.error,
)  # fmt: skip
"""Exceptions of torch and transformers for a missing or damaged state."""


class _LogRow(BaseModel):
    model_config = ConfigDict(extra="allow")

    step: int
    epoch: float
    loss: float | None = None


_Callback = dict[str, dict[str, Any]]


class _Callbacks(BaseModel):
    __pydantic_extra__: dict[str, _Callback | list[_Callback]]
    model_config = ConfigDict(extra="allow")

    TrainerControl: _Callback


class _State(BaseModel):
    """The fields of a checkpoint's `STATE` that resuming depends on; the library checks the rest."""

    model_config = ConfigDict(extra="allow")

    global_step: int = Field(ge=0)
    epoch: float = Field(ge=0)
    max_steps: int
    num_train_epochs: int
    log_history: list[_LogRow]
    train_batch_size: int | None = None
    stateful_callbacks: _Callbacks


def only_run(out: Path) -> AbstractContextManager[bool]:
    """Hold the exclusive right to train into ``out``; it is released when the process ends.

    Raises:
        OutputTakenError: another process has it.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f".{out.name}.training.lock")
    return locked(
        file,
        f"another run is training into {out} (it holds the lock {file}): wait for it, or choose another `out`",
    )


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a work folder, oldest first. Truncated ones are ignored, with a warning."""
    complete = []
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE}"):
        try:
            parse_json(read_text(state, "state"), f"{state}", nan=True)  # the loss of a step may be NaN
        except UserError:
            _logger.warning(f"{state} is truncated: {state.parent.name} is ignored")
        else:
            complete.append(state.parent)
    return sorted(complete, key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a work folder, or None."""
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def clear_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed run."""
    complete = checkpoints(folder)
    for found in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if found not in complete:
            shutil.rmtree(found)


def forget(folder: Path, note: str) -> None:
    """Remove the work folder of an earlier run, if it is one: its checkpoints first, its note last."""
    found = list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    for checkpoint in found:
        (checkpoint / STATE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    if found or (folder / note).is_file():
        shutil.rmtree(folder)


def check_states(checkpoint: Path, *, weights: str, ranks: int = 1, deepspeed: bool = False) -> None:
    """Check that a checkpoint has everything that resuming needs, reading only tables of contents.

    Args:
        checkpoint: A complete checkpoint.
        weights: Name of the file with its weights.
        ranks: Number of training processes.
        deepspeed: Whether DeepSpeed saves weights and optimizer, in its own files.

    Raises:
        ResumeError: a state is missing or damaged.
    """
    state = checkpoint / STATE
    content = parse_json(read_text(state, "state"), f"{state}", nan=True)
    with telling_damage(checkpoint, STATE):
        _State.model_validate(content)
        TrainerState.load_from_json(str(state))
    generators = sorted(file.name for file in checkpoint.glob("rng_state*.pth"))
    expected = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    if generators and generators != sorted(expected):
        raise ResumeError(
            _unusable(
                checkpoint, f"it has random states of {len(generators)} processes, but now there are {ranks}"
            )
        )
    for name in [*([] if deepspeed else [weights, "optimizer.pt"]), "scheduler.pt", *expected]:
        file = checkpoint / name
        if not file.is_file():
            raise ResumeError(_unusable(checkpoint, f"{name} is missing"))
        if file.suffix != ".safetensors" and not zipfile.is_zipfile(file):
            raise ResumeError(_unusable(checkpoint, f"{name} is damaged"))
        if name in expected:  # small; the Trainer would read it only after starting its progress bar
            with telling_damage(checkpoint, "random state"), safe_globals():
                torch.load(file, weights_only=True)


@contextmanager
def telling_damage(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    """Report in one line that a state cannot be loaded, instead of torch's advice (to unpickle it anyway).

    Raises:
        ResumeError: it cannot be loaded.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except _DAMAGE as error:
        if checkpoint is None:
            raise
        raise ResumeError(_unusable(Path(checkpoint), f"damaged {what} ({type(error).__name__})")) from error


def _unusable(checkpoint: Path, why: str) -> str:
    earlier = [found for found in checkpoints(checkpoint.parent) if step_of(found) < step_of(checkpoint)]
    todo = (
        f"that folder to continue from {earlier[-1].name}"
        if earlier
        else f"{checkpoint.parent} to start over"
    )
    return f"cannot resume from {checkpoint}: {why}: remove {todo}"


class SaveOnSignal(TrainerCallback):
    """Save a checkpoint and stop after the step during which a signal arrives; see `signals.deferred`."""

    def __init__(self) -> None:
        self.stopping = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002 (the signature is the library's, here and below)
    ) -> None:
        """Request a checkpoint and the end of training, in every process at the same step."""
        if self.stopping or not _anyone(signals.received() is not None, args.device):
            return
        self.stopping = control.should_save = control.should_training_stop = True
        if state.is_world_process_zero:
            _logger.info(
                f"stopping: saving {PREFIX_CHECKPOINT_DIR}-{state.global_step}, from which `resume=True` continues"
            )

    def on_epoch_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Skip the evaluation of an interrupted epoch."""
        if self.stopping:
            control.should_log = control.should_evaluate = control.should_save = False


@contextmanager
def saving_on_signal(trainer: Trainer, *, wanted: bool) -> Iterator[None]:
    """Save a checkpoint before a signal ends the training, if wanted.

    Raises:
        Terminated: a signal arrived.
    """
    if not wanted:
        yield
        return
    callback = SaveOnSignal()
    trainer.add_callback(callback)
    with signals.deferred():
        yield
    if callback.stopping:
        trainer.accelerator.wait_for_everyone()  # a launcher kills the others as soon as the first one exits
        raise signals.Terminated


class SoundStates(Trainer):
    """A Trainer that reports missing or damaged checkpoint states in one line.

    Without a progress bar it tells its steps in log lines, instead of printing dictionaries.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            if self.is_world_process_zero():
                self.add_callback(StepLines)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with telling_damage(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with telling_damage(checkpoint, "state of optimizer and scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with telling_damage(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)


def _anyone(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set in any training process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
