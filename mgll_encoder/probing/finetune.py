"""Full fine-tuning as a probe: tower and linear head are trained on the training patients (transformers' Trainer).

The epoch to evaluate is chosen on a part of the training patients; the test split is not involved.
"""

import hashlib
import json
import logging
import math
import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from mgll_encoder.common.devices import AUTO, train_on
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, TrainingError
from mgll_encoder.common.faults import writing
from mgll_encoder.common.images import open_image
from mgll_encoder.common.locks import locked
from mgll_encoder.common.progress import counter
from mgll_encoder.common.resuming import SoundStates, check_states, last_checkpoint
from mgll_encoder.common.splits import assign_split
from mgll_encoder.data.batches import jitter, shrink
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.probing.features import images_digest, tower_digest, workers_for
from mgll_encoder.probing.linear import METRICS, kept_labels, metrics, mixed
from mgll_encoder.tower.model import Tower, pooled
from mgll_encoder.tower.preprocess import image_transform
from mgll_encoder.tower.spec import TowerSpec

_logger = logging.getLogger(__name__)

OPEN = -1
"""Replaces 0 or 1 for an unknown label."""

CHOSEN_BY = METRICS[0]
"""The validation metric by which the epoch is chosen."""


@dataclass(frozen=True)
class FinetuneOptions:
    """Settings that determine the result of fine-tuning.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Peak learning rate, after 10 % of warm-up; cosine decay to 0.
        weight_decay: Weight decay of weight matrices.
        val_share: Share of the training patients used to choose the epoch, if the table marks none.
        augment: Rotate, scale, shift and change colors slightly; never flip.
        seed: Seed of the head, the order, the augmentation and the validation part.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    val_share: float = 0.15
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if value <= 0 or not math.isfinite(value):
                raise InvalidArgumentError(f"`{name}` is {value}: it must be greater than 0")
        if not 0 < self.val_share < 1:
            raise InvalidArgumentError(f"`val_share` is {self.val_share}: it must be between 0 and 1")


@dataclass(frozen=True)
class Finetuned:
    """Result of fine-tuning.

    Attributes:
        scores: Probabilities of the test images, [test images, kept labels].
        kept: Indices of those labels.
        tower: The tower of the chosen epoch, without the projection, which belongs to the original tower.
        trained_on: The training images.
        validation: Value of `CHOSEN_BY` on the validation part at that epoch, in %.
        record: Inputs and settings.
    """

    scores: NDArray[np.float64]
    kept: list[int]
    tower: Tower
    trained_on: tuple[Path, ...]
    validation: float
    record: dict[str, Any]


class TowerWithHead(nn.Module):
    """A tower with a linear classifier on top.

    Args:
        tower: The tower; its model is trained in place.
        data: The training images; the bias of the head is initialized from their label frequencies.
        exclusive: Whether labels are classes (cross-entropy), or findings (binary cross-entropy of each).
    """

    def __init__(self, tower: Tower, data: LabeledImages, exclusive: bool) -> None:
        super().__init__()
        self.vision, self.spec, self.exclusive = tower.model, tower.spec, exclusive
        self.head = nn.Linear(tower.spec.width, len(data.names))
        nn.init.normal_(self.head.weight, std=0.01)
        true, false = data.truth.sum(axis=0), data.false.sum(axis=0)
        frequency = torch.from_numpy((true + 0.5) / (true + false + 1)).float()
        self.head.bias.data.copy_(frequency.log() if exclusive else torch.logit(frequency))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits [N, labels] of pixels [N, 3, S, S] with labels (0, 1, or `OPEN`) [N, labels]."""
        logits = self.head(pooled(self.vision, self.spec, pixel_values))
        if self.exclusive:
            loss = functional.cross_entropy(logits, labels.argmax(dim=1))
        else:
            known = (labels != OPEN).to(logits.dtype)
            mean = functional.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), known)
            loss = mean * (known.numel() / known.sum().clamp(min=1))
        return {"loss": loss, "logits": logits}

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert logits to probabilities: of classes, which sum to 1, or of each finding; [n, labels]."""
        found = torch.from_numpy(logits).double()
        return (found.softmax(dim=1) if self.exclusive else found.sigmoid()).numpy()


class LabeledPixels(Dataset[dict[str, Tensor]]):
    """Pixels and labels, read on demand.

    Args:
        data: The images, all readable.
        spec: Specification of the tower.
        augment: Whether to jitter, differently in every epoch.
        seed: Seed of the augmentation.
    """

    def __init__(self, data: LabeledImages, spec: TowerSpec, augment: bool, seed: int) -> None:
        self._images = data.images
        self._truth = torch.from_numpy(np.where(data.truth | data.false, data.truth, OPEN)).float()
        self._transform, self._size = image_transform(spec), spec.image_size
        self._augment, self._seed, self._epoch = augment, seed, 0

    def __len__(self) -> int:
        return len(self._images)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the training loop."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = open_image(self._images[index])
        if self._augment:
            image = jitter(
                shrink(image, 2 * self._size), np.random.default_rng((self._seed, self._epoch, index))
            )
        return {"pixel_values": self._transform(image), "labels": self._truth[index]}


def finetune(
    tower: Tower,
    data: LabeledImages,
    options: FinetuneOptions,
    cache: Path,
    *,
    positives: int = 1,
    workers: int | None = None,
    device: str = AUTO,
) -> Finetuned:
    """Train a copy of a tower with a linear head, and score the test images.

    Checkpoints are in ``cache`` until the end; after a kill, the same call continues from the last complete epoch.

    Args:
        tower: The initial tower; it is not changed.
        data: Labeled images, all readable.
        options: Settings that determine the result.
        cache: Folder for checkpoints.
        positives: Minimum number of positive test images of an evaluated label.
        workers: Processes that read images; None for one per core.
        device: See `mgll_encoder.common.devices.train_on`.

    Raises:
        UserError: no label can be evaluated or used to choose the epoch, the same fine-tuning is running, or the loss
            diverges.
    """
    use_cpu = train_on(device)
    kept = kept_labels(data, positives)
    val = validation_part(data, options.val_share, options.seed)
    learn = data.subset(~data.test & ~val)
    choose, asked = data.subset(val), data.subset(data.test)
    if not len(learn.images) or not mixed(choose).any():
        raise BadDataError(
            f"the validation part ({len(choose.images)} of {len(learn.images) + len(choose.images)} training images) "
            "has no label with positive and negative images: give a larger `val_share`, or more patients"
        )
    record = {
        **asdict(options),
        "tower_sha256": tower_digest(tower),
        "images_sha256": images_digest(data.images),
        "labels": list(data.names),
        "truth_sha256": hashlib.sha256(
            data.truth.tobytes()
            + data.test.tobytes()
            + val.tobytes()
            + (b"" if data.known is None else data.known.tobytes())
        ).hexdigest(),
        "training_images": len(learn.images),
        "validation_images": len(choose.images),
    }
    folder = cache / hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]
    cache.mkdir(parents=True, exist_ok=True)
    lock = folder.with_suffix(".lock")
    running = f"the same fine-tuning is running in another process (it holds the lock {lock}): wait for it, or stop it"
    with locked(lock, running), writing(folder):
        set_seed(options.seed)
        model = TowerWithHead(_copy(tower), learn, data.exclusive)
        trainer = _trainer(model, learn, choose, tower.spec, options, folder, workers, use_cpu)
        last = last_checkpoint(folder)
        if last:
            check_states(last, weights=SAFE_WEIGHTS_NAME)
        outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
        if not math.isfinite(outcome.training_loss):
            raise TrainingError(
                f"the loss is not finite after {outcome.global_step} steps: use a smaller `learning_rate`"
            )
        logits = trainer.predict(LabeledPixels(asked, tower.spec, False, options.seed)).predictions
        best = math.nan if trainer.state.best_metric is None else float(trainer.state.best_metric)
        shutil.rmtree(folder, ignore_errors=True)
    spec = tower.spec.model_copy(update={"projection_dim": None})
    trained = Tower.from_model(model.vision.cpu(), spec)
    return Finetuned(
        model.probabilities(np.asarray(logits))[:, kept], kept, trained, learn.images, best, record
    )


def validation_part(data: LabeledImages, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which images choose the epoch, [n]: those marked in the table, else those of some training patients."""
    if data.val is not None:
        return data.val & ~data.test
    split = [assign_split(f"validation of {patient}", test=share, seed=seed) for patient in data.patients]
    chosen: NDArray[np.bool_] = np.array(split) == "test"
    return ~data.test & chosen


def _copy(tower: Tower) -> Tower:
    return Tower(tower.header, deepcopy(tower.model), None)


def _trainer(
    model: TowerWithHead,
    learn: LabeledImages,
    choose: LabeledImages,
    spec: TowerSpec,
    options: FinetuneOptions,
    folder: Path,
    workers: int | None,
    use_cpu: bool,
) -> Trainer:
    cuda = torch.cuda.is_available() and not use_cpu
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        dataloader_num_workers=workers_for(len(learn.images), workers),
        dataloader_pin_memory=cuda,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=use_cpu,
        seed=options.seed,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=CHOSEN_BY,
        greater_is_better=True,
        remove_unused_columns=False,
        disable_tqdm=counter() is None,
        report_to=[],
    )

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        scores = model.probabilities(np.asarray(prediction.predictions))
        labels = np.asarray(prediction.label_ids)
        once = np.ones((1, len(labels)))
        macro = np.nanmean(metrics(scores, labels > 0.5, model.exclusive, once, labels != OPEN)[0], axis=0)
        return dict(zip(METRICS, map(float, macro), strict=True))

    return SoundStates(
        model=model,
        args=arguments,
        train_dataset=LabeledPixels(learn, spec, options.augment, options.seed),
        eval_dataset=LabeledPixels(choose, spec, False, options.seed),
        compute_metrics=compute,
        callbacks=[_LogEpoch()],
    )


class _LogEpoch(TrainerCallback):
    """Log one line per epoch if there is no progress bar."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the library's signature
        **given: Any,
    ) -> None:
        if args.disable_tqdm:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            _logger.info(
                f"epoch {round(state.epoch or 0)}/{round(args.num_train_epochs)}: training loss {losses[-1]:.4f}, "
                f"validation {CHOSEN_BY} {given['metrics'][f'eval_{CHOSEN_BY}']:.1f}"
            )
