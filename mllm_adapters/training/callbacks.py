"""Training callbacks: progress bar, divergence checks, loss plot, and the best weights so far."""

import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mgll_encoder.common.errors import MissingPackageError, TrainingError
from mgll_encoder.common.extras import require
from mgll_encoder.common.files import write_text
from mgll_encoder.common.resuming import last_checkpoint, step_of
from mgll_encoder.common.texts import read_as
from mgll_encoder.weights.weight_file import open_weights

_logger = logging.getLogger(__name__)

BEST = "best.safetensors"
BEST_NOTE = "best.json"

RISE = 3.0
"""Factor over the lowest loss at which a loss above the first is reported as a possible divergence."""


class DivergedError(TrainingError):
    """The loss became NaN or infinite."""


class Evaluator(Protocol):
    """Scores a model in training, see `find_evaluator`."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return what must be equal for two scores to be comparable."""
        ...

    def __call__(self, model: Any, processor: Any) -> float:
        """Score a model; higher is better."""
        ...


class Trained(Protocol):
    """The interface of a trainer for `BestKeeper`."""

    def log(self, logs: dict[str, float]) -> None:
        """Log figures to the history and the loggers."""
        ...

    def trained_values(self) -> dict[str, Tensor]:
        """Return the full trained parameters, by name."""
        ...


class LossBar(ProgressCallback):
    """The Trainer's progress bar with loss and samples per second, instead of log lines on standard output."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        super().on_train_begin(args, state, control, **kwargs)
        self._began, self._first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 (the signature is the library's, here and below)
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Show the latest loss, and the speed since the start; the bar itself shows the remaining time."""
        if self.training_bar is not None and logs and "loss" in logs:
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            pace = (state.global_step - self._first) * per_step / (time.monotonic() - self._began)
            self.training_bar.set_postfix({"loss": f"{logs['loss']:.4f}", "samples/s": f"{pace:.1f}"})


class Watchdog(TrainerCallback):
    """Logs the last step for any logging interval, and stops a run whose loss is NaN or infinite.

    Args:
        work: Folder of the run's checkpoints.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.first = math.nan
        self.lowest = (math.inf, 0)
        self.warned = False

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Request a log entry at the last step."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Check the loss.

        Raises:
            DivergedError: it is infinite or NaN.
        """
        loss = kwargs["logs"].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise DivergedError(diverged(f"the loss became {loss}", state.global_step, self.work))
        self.first = loss if math.isnan(self.first) else self.first
        if loss > max(self.first, RISE * self.lowest[0]) and not self.warned:
            self.warned = True
            low, step = self.lowest
            if state.is_world_process_zero:
                _logger.warning(
                    f"the loss is {loss:.4g} at step {state.global_step}, after {low:.4g} at step {step}: "
                    "it may be diverging; a lower `learning_rate` is the first thing to try"
                )
        self.lowest = min(self.lowest, (loss, state.global_step))


def diverged(what: str, step: int, work: Path) -> str:
    """Return the message for a diverged run, with the step to continue from."""
    saved = last_checkpoint(work)
    again = (
        "; if the data or the machine was the cause, fix it, and `resume=True` continues from step "
        f"{step_of(saved)}, whose weights are valid"
        if saved
        else ""
    )
    return (
        f"{what} at step {step}: start over with a lower `learning_rate` "
        f"(and `force=True`, to replace this run's checkpoints){again}"
    )


@dataclass(frozen=True)
class Best:
    """The best score so far with its step, and all scores as (step, score)."""

    step: int
    score: float
    scores: tuple[tuple[int, float], ...]


class BestKeeper(TrainerCallback):
    """Scores the model at regular steps and at the last one, and keeps the best trained weights.

    Every process scores the whole benchmark, because with ZeRO-3 each holds only a part of the weights.

    Args:
        trainer: Provides the weights.
        processor: The model's processor.
        evaluate: Computes the score.
        every: Steps between two scores.
        work: Folder for the best weights.
        seeing: Restores the model's towers during scoring, if it trains without them.
    """

    def __init__(
        self,
        trainer: Trained,
        processor: Any,
        evaluate: Evaluator,
        every: int,
        work: Path,
        seeing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.trainer, self.processor, self.evaluate, self.every = trainer, processor, evaluate, every
        self.work, self.seeing = work, seeing
        self.best: Best | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Load the scores of an interrupted run; scores after its checkpoint will be computed again."""
        note = self.work / BEST_NOTE
        if state.global_step and note.is_file():
            found = read_as(Best, note, "note", f"remove {self.work} to start again")
            known = tuple((step, score) for step, score in found.scores if step <= state.global_step)
            sound = found.step <= state.global_step
            if sound:
                open_weights(self.work / BEST)  # report damaged weights now, not at the end
            self.best = Best(found.step, found.score, known) if sound else Best(0, -math.inf, known)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Score the model if it is due."""
        step = state.global_step
        if step % self.every and step < state.max_steps:
            return
        model = kwargs["model"]
        with self.seeing():
            score = self.evaluate(model.eval(), self.processor)
        model.train()
        due = control.should_log
        self.trainer.log({"eval_score": score})
        control.should_log = due  # logging the score has reset the flag for the loss
        scores = (*(self.best.scores if self.best else ()), (step, score))
        better = self.best is None or score > self.best.score
        self.best = Best(step, score, scores) if better else Best(self.best.step, self.best.score, scores)  # type: ignore[union-attr]
        values = self.trainer.trained_values() if better else {}
        if state.is_world_process_zero:
            if better:
                save_file(values, self.work / BEST)
            write_text(self.work / BEST_NOTE, json.dumps(asdict(self.best)), force=True)

    def values(self) -> dict[str, Tensor]:
        """Return the best trained weights."""
        return load_file(self.work / BEST)


def loss_plot(losses: Sequence[tuple[int, float]], scores: Sequence[tuple[int, float]] = ()) -> bytes:
    """Plot the loss over the steps as a PNG, with the evaluation scores on a second axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*losses, strict=True), marker="." if len(losses) < 50 else "", label="loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), color="tab:orange", marker="o", label="score")
        right.set_ylabel("evaluation score")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def find_evaluator(bench: Path) -> Evaluator:
    """Return the evaluator of an installed package for a benchmark (entry points ``mgll_mllm.evaluators``).

    This package is independent of benchmarks; `eval_mcq` provides the evaluator.

    Raises:
        UserError: none is installed, or the benchmark cannot be read.
    """
    from importlib.metadata import entry_points

    require("eval", f"`eval_bench={bench}`")
    found = list(entry_points(group="mgll_mllm.evaluators"))
    if not found:
        raise MissingPackageError(
            "`eval_bench`: no evaluator is installed: install this project again (pip install -e .)"
        )
    evaluator: Evaluator = found[0].load()(bench)
    return evaluator
