"""The steps of a training as log lines, where no progress bar is shown."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mgll_encoder.common.progress import Pace


class StepLines(TrainerCallback):
    """Tells now and then which step a training has reached, its latest loss, and the time that is left."""

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 (the signature is the library's, here and below)
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Start the clock."""
        self._first = state.global_step
        after = f" after step {self._first}" if self._first else ""
        self._pace = Pace(f"Training{after}", state.max_steps - self._first, unit="steps")

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Count a step."""
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        loss = next(losses, None)
        self._pace.advance(about="" if loss is None else f"loss {loss:.4f}")
