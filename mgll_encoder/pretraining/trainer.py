"""transformers' Trainer for two towers: unreadable images are counted, validation ranks texts for images."""

import logging
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from mgll_encoder.common.errors import BadDataError, TrainingError
from mgll_encoder.common.resuming import SoundStates
from mgll_encoder.common.skipped import UNREADABLE, Skipped
from mgll_encoder.data.batches import ManifestImages, SplitRows
from mgll_encoder.pretraining.dual_encoder import TwoTowers
from mgll_encoder.pretraining.losses import Alphas
from mgll_encoder.pretraining.validation_metrics import ranking_metrics
from mgll_encoder.tower.spec import TowerSpec

_logger = logging.getLogger(__name__)

VALIDATION_IMAGES = 2048
"""Maximum number of validation images, evenly spaced over the split."""


class Validation:
    """Validation images and the vocabulary of their texts.

    Args:
        plan: The rows of the ``val`` split.
        spec: Specification of the image tower.
        workers: Processes that open images.
    """

    def __init__(self, plan: SplitRows, spec: TowerSpec, workers: int) -> None:
        self._plan, self._workers = plan.sample(VALIDATION_IMAGES), workers
        self._spec = spec
        rows = [self._plan.texts(self._plan.row(i)) for i in range(len(self._plan))]
        self.names = ("joined",) if plan.joined else plan.granularities
        self.texts = list(dict.fromkeys(text for row in rows for level in row for text in level))
        column = {text: u for u, text in enumerate(self.texts)}
        self.truth = np.zeros((len(self.names), len(rows), len(self.texts)), bool)
        for i, row in enumerate(rows):
            for g, level in enumerate(row):
                self.truth[g, i, [column[text] for text in level]] = True

    def __len__(self) -> int:
        return len(self._plan)

    @property
    def informative(self) -> bool:
        """Whether some text is true of some images and not of others, so that a ranking is defined."""
        return bool(any((level.any(0) & ~level.all(0)).any() for level in self.truth))

    def evaluate(self, towers: TwoTowers, batch_size: int) -> tuple[dict[str, float], list[str]]:
        """Return the metrics of :func:`ranking_metrics`, and one line for each unreadable image."""
        weight = towers.projection.weight
        data = ManifestImages(self._plan, self._spec, seed=0, augment=False)
        # a separate generator, so that the loader does not change the random numbers of training
        loader = DataLoader(
            data,
            batch_size,
            num_workers=self._workers,
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),
        )
        images, readable, troubles = [], [], []
        with torch.no_grad():
            for items in loader:
                readable += ["trouble" not in item for item in items]
                troubles += [item["trouble"] for item in items if "trouble" in item]
                if pixels := [item["pixels"] for item in items if "trouble" not in item]:
                    batch = torch.stack(pixels).to(weight.device, weight.dtype)
                    images.append(F.normalize(towers.image_features(batch).float(), dim=-1))
            if not images:
                raise BadDataError(f"no validation image can be read; first: {troubles[0]}")
            texts = F.normalize(towers.text.features(self.texts).float(), dim=-1)
        scores = (torch.cat(images) @ texts.T).cpu().numpy()
        if not np.isfinite(scores).all():
            raise TrainingError("the towers' features are no longer finite: use a smaller `learning_rate`")
        return ranking_metrics(scores, self.truth[:, np.array(readable)], self.names), troubles


class EpochOfData(TrainerCallback):
    """Set the epoch of the data set; with several processes accelerate sets only that of the sampler."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Set it before the first batch of an epoch is requested."""
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch))


class TowerTrainer(SoundStates):
    """transformers' Trainer; weight decay on weight matrices only (CLIP's rule), loss terms logged.

    Args:
        towers: The model.
        skipped: Counts unreadable images, each once; stops at the first if strict.
        validation: What to evaluate after each epoch, if anything.
        tower_learning_rate: Peak learning rate of the image tower; None for that of ``settings``.
        settings: Arguments of transformers' Trainer.
    """

    def __init__(
        self,
        towers: TwoTowers,
        skipped: Skipped,
        validation: Validation | None,
        tower_learning_rate: float | None = None,
        **settings: Any,
    ) -> None:
        # the Trainer requires a data set to evaluate; `evaluate` below uses `validation` directly
        super().__init__(model=towers, eval_dataset=validation, **settings)
        self.add_callback(EpochOfData)
        self.towers, self.skipped, self._validation = towers, skipped, validation
        self._tower_rate = tower_learning_rate
        self._terms: list[dict[str, Tensor]] = []
        self._troubles: dict[str, None] = {}

    @property
    def epoch_losses(self) -> list[float]:
        """Mean training loss of each epoch."""
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of weight matrices other than embeddings."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer, with the image tower's own learning rate if one was given."""
        if self.optimizer is None and self._tower_rate is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self._groups(self._tower_rate), **settings)
        return super().create_optimizer(model)

    def _groups(self, tower_rate: float) -> list[dict[str, Any]]:
        """Group parameters by learning rate and weight decay."""
        decaying = set(self.get_decay_parameter_names(self.towers))
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.towers.named_parameters():
            rate = tower_rate if name.startswith("vision.") else self.args.learning_rate
            decay = self.args.weight_decay if name in decaying else 0.0
            if parameter.requires_grad:
                found.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in found.items()
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch, and count its unreadable images."""
        troubles = inputs.pop("troubles")
        self._count(troubles)
        if not inputs:
            raise BadDataError(
                f"none of the {len(troubles)} images of a batch can be read; first: {troubles[0]}; fix them or "
                "remove them from the manifest"
            )
        loss, terms = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._terms.append({name: value for name, value in terms.items() if name != "loss"})
        return (loss, terms) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ARG002 - the signature is transformers'
        ignore_keys: list[str] | None = None,  # noqa: ARG002
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the validation texts for the validation images; every process evaluates all of them."""
        assert self._validation is not None  # the Trainer evaluates only with an eval_dataset
        self.towers.eval()
        with self.compute_loss_context_manager():
            figures, troubles = self._validation.evaluate(self.towers, self.args.eval_batch_size)
        self.towers.train()
        self._count(troubles)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the terms of the loss; as a line of text if there is no progress bar."""
        if self._terms and "loss" in logs:
            for name in self._terms[0]:
                logs[name] = round(float(torch.stack([terms[name] for terms in self._terms]).mean()), 4)
            self._terms.clear()
        super().log(logs, start_time)
        if not (self.args.disable_tqdm and self.is_world_process_zero()):
            return
        epoch = f"epoch {round(self.state.epoch or 0)}/{round(self.args.num_train_epochs)}"
        if "loss" in logs:
            terms = ", ".join(f"{name} {logs[name]:.4f}" for name in asdict(Alphas()) if name in logs)
            _logger.info(f"{epoch}: training loss {logs['loss']:.4f} ({terms})")
        if "eval_mAP" in logs:
            figures = ", ".join(
                f"{name.removeprefix('eval_')} {value:.3f}"
                for name, value in logs.items()
                if name.startswith(("eval_mAP", "eval_recall")) and value is not None
            )
            _logger.info(f"{epoch}: validation {figures}")

    def gather_skipped(self) -> None:
        """Collect the unreadable images of all processes in the first one."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, list(self._troubles))
            self._count([line for lines in everyone for line in lines])

    def _count(self, troubles: list[str]) -> None:
        for line in troubles:
            if line not in self._troubles:
                self._troubles[line] = None
                self.skipped.add(UNREADABLE, line)
