"""transformers' Trainer for a model that is mostly frozen: small checkpoints, a quiet tower, early alarms."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mgll_encoder.common.errors import UserError
from mllm_adapters.stages import outermost_modules

WEIGHTS = "trained.safetensors"
"""Weights in a Trainer checkpoint. Not ``model.safetensors``: the folder must not pass for a whole model."""

STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint: a folder without it is not complete."""


class DivergedError(UserError):
    """The loss is no longer a number: the run is lost, and going on from its checkpoints would not mend it."""


class FrozenTrainer(Trainer):
    """A Trainer whose checkpoints hold the parameters that train and no others.

    The frozen ones are those of the model that the run began with, so a checkpoint of a 7B model's projector
    takes megabytes instead of gigabytes, and resuming is exact.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.add_callback(LossBar)
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        towers = outermost_modules(model, "tower")
        self.quiet = [tower for tower in towers if not any(p.requires_grad for p in tower.parameters())]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, with the tower in evaluation mode where it is frozen.

        The Trainer puts the whole model into training mode at every step. The language model stays in it:
        gradient checkpointing works in training mode only.
        """
        for tower in self.quiet:
            tower.eval()
        return super().compute_loss(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        values = self.trained if state_dict is None else state_dict
        save_file({name: values[name].detach().contiguous() for name in self.trained}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model  # a wrapper around the parameters that self.trained holds
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if saved.keys() != self.trained.keys():
            differing = sorted(saved.keys() ^ self.trained.keys())
            raise UserError(
                f"{resume_from_checkpoint} is of another run: one of the two trains {differing[0]}"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(saved[name])


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss in it, instead of log lines on standard output."""

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 (the signature is the library's, here and below)
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Show the newest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class Watchdog(TrainerCallback):
    """Logs the last step, whatever the logging interval, and stops a run whose loss is no longer a number."""

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Ask for a log entry at the last step."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Look at the loss.

        Raises:
            DivergedError: it is infinite or not a number.
        """
        loss = kwargs["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} at step {state.global_step}: start anew with a lower --learning-rate "
                "(and --force, to replace this run's checkpoints)"
            )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete Trainer checkpoint in a folder, or None."""
    complete = [state.parent for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
