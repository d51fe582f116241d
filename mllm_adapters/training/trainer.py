"""transformers' Trainer for mostly frozen models: small checkpoints, a tower in evaluation mode, optional DeepSpeed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProgressCallback, TrainingArguments

from mgll_encoder.common.errors import MismatchError
from mgll_encoder.common.resuming import SoundStates, telling_damage
from mllm_adapters.core.stages import outermost_modules
from mllm_adapters.training.callbacks import DivergedError, LossBar, diverged

WEIGHTS = "trained.safetensors"
"""Weights in a Trainer checkpoint. Not ``model.safetensors``: the folder must not be taken for a whole model."""


class FrozenTrainer(SoundStates):
    """A Trainer whose checkpoints contain only the trained parameters.

    The frozen ones are those of the original model, so a checkpoint of a 7B model's projector takes megabytes
    instead of gigabytes, and resuming is exact. DeepSpeed's engine writes and reads the optimizer states and
    the sharded weights, also without the frozen ones.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        # Every family's loss divides by the answer tokens of the whole step. Qwen2-VL and its successors
        # declare otherwise (`accepts_loss_kwargs`), and the library would then average the means of unequal
        # batches.
        self.model_accepts_loss_kwargs = True
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LossBar)
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        towers = outermost_modules(model, "tower")
        self.quiet = [tower for tower in towers if not any(p.requires_grad for p in tower.parameters())]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's own loss, with a frozen tower in evaluation mode.

        The Trainer puts the whole model into training mode at every step. The language model stays in it,
        because gradient checkpointing works only in training mode.
        """
        for tower in self.quiet:
            tower.eval()
        return super().compute_loss(*args, **kwargs)

    def trained_values(self) -> dict[str, Tensor]:
        """Gather the trained parameters in float32 on the CPU. Every process must call it; rank 0 gets the result."""
        values = {}
        for name, parameter in self.trained.items():
            value = self._whole(parameter)
            if self.args.should_save:
                values[name] = value.detach().cpu().contiguous().clone()
        return values

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters.

        Raises:
            DivergedError: a weight is NaN or infinite; the checkpoint stays incomplete.
        """
        del _internal_call  # means: do not upload
        values = self.trained_values()
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if not all(value.isfinite().all() for value in values.values()):
            step = self.state.global_step
            raise DivergedError(diverged("trained weights became nan or inf", step, folder.parent))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / WEIGHTS)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's value, from DeepSpeed's full-precision copy if there is one."""
        if not self.is_deepspeed_enabled:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        return parameter if value is None else value

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped
        engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """With DeepSpeed, load a checkpoint without frozen parameters, which the library would require."""
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine: Any = self.model_wrapped
        with telling_damage(resume_from_checkpoint, "state of DeepSpeed"):
            loaded, _ = engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        if loaded is None:
            raise MismatchError(
                f"{resume_from_checkpoint} is not a checkpoint of this DeepSpeed configuration: resume with "
                "the original configuration"
            )
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model  # a wrapper around the parameters that self.trained holds
        with telling_damage(resume_from_checkpoint, "weights"):
            saved: Mapping[str, Tensor] = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if saved.keys() != self.trained.keys():
            differing = sorted(saved.keys() ^ self.trained.keys())
            raise MismatchError(
                f"{resume_from_checkpoint} belongs to another run: only one of the two trains {differing[0]}"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(saved[name])
