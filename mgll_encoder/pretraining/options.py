"""Options of pretraining."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mgll_encoder.common.deepspeed import read_deepspeed
from mgll_encoder.common.devices import Precision
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, unknown_name
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES
from mgll_encoder.pretraining.initialization import AUTO
from mgll_encoder.pretraining.losses import PLAIN_CLIP, Alphas
from mgll_encoder.tower.spec import Activation, Pooling
from mgll_encoder.weights.torch_file import WeightSet

Loss = Literal["mgll", "clip"]
Select = Literal["auto", "best", "last"]


@dataclass(frozen=True)
class PretrainOptions:
    """Settings that determine the result of a training run.

    Attributes:
        loss: ``mgll``, or ``clip``: the control, with all texts of an image joined into one string.
        tower_size: Geometry of new towers, a key of ``TOWER_SIZES``.
        init: Initial weights: ``openai``, or anything that ``load_tower`` reads; None for random weights.
        activation: Activation of ``init``, if it does not specify it.
        image_size: Image size in pixels that ``init`` is trained at; None for its own.
        pooling: Pooling of the image features of ``init``, see `TowerSpec`; None for its own.
        init_weights: ``raw`` or ``ema``, if ``init`` is stored with a moving average of its weights.
        text_tower: ``auto`` (that of ``init`` if it has one, else a new one), ``new``, or a transformers folder or hub
            id.
        freeze_text: Train only the projection of the text tower.
        train_blocks: Train only this many of the last blocks of ``init``; 0 for its projection and the text tower
            alone; None for the whole image tower.
        granularities: Granularities to use; empty for all.
        alphas: Weights of the terms of ``mgll``.
        epochs: Passes over the training rows.
        batch_size: Images per step and process.
        learning_rate: Peak learning rate, after 5 % of warm-up; cosine decay to 0.
        tower_learning_rate: Peak learning rate of the image tower if different: a trained one needs less than a new
            text tower.
        weight_decay: Weight decay of weight matrices; none for norms, biases, embeddings and the temperature.
        select: ``best``: keep the epoch with the highest mAP on the ``val`` rows; ``last``; ``auto``: best if there are
            such rows.
        precision: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 on a GPU that supports it, else
            float32.
        gradient_checkpointing: Save memory at a third more time.
        deepspeed: A DeepSpeed configuration (ZeRO 0 to 2).
        flip: Mirror half of the training images, except those whose texts name a side.
        seed: Seed of weights, order and augmentation.
    """

    loss: Loss = "mgll"
    tower_size: str = "small"
    init: str | Path | None = None
    activation: Activation | None = None
    image_size: int | None = None
    pooling: Pooling | None = None
    init_weights: WeightSet | None = None
    text_tower: str = AUTO
    freeze_text: bool = False
    train_blocks: int | None = None
    granularities: tuple[str, ...] = ()
    alphas: Alphas = field(default_factory=Alphas)
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 5e-4
    tower_learning_rate: float | None = None
    weight_decay: float = 0.05
    select: Select = "auto"
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    deepspeed: Path | None = None
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "tower_size": (self.tower_size, tuple(TOWER_SIZES)),
            "loss": (self.loss, get_args(Loss)),
            "select": (self.select, get_args(Select)),
            "precision": (self.precision, get_args(Precision)),
            "weights": (self.init_weights or "raw", get_args(WeightSet)),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise unknown_name(name, value, known)
        tower_rate = self.learning_rate if self.tower_learning_rate is None else self.tower_learning_rate
        for option, number in (
            ("`epochs`", self.epochs),
            ("`batch_size`", self.batch_size),
            ("`learning_rate`", self.learning_rate),
            ("`tower_learning_rate`", tower_rate),
        ):
            if number <= 0 or not math.isfinite(number):
                raise InvalidArgumentError(f"{option} is {number}: it must be greater than 0")
        for name in ("activation", "image_size", "pooling"):
            if getattr(self, name) is not None and self.init is None:
                what = name.replace("_", " ")
                raise InvalidArgumentError(
                    f"`{name}` is for `init`: a new tower has the {what} of its `tower_size`"
                )
        if self.train_blocks is not None and self.init is None:
            raise InvalidArgumentError(
                "`train_blocks` is for `init`: all blocks of a new tower have to be trained"
            )
        if self.init_weights is not None and self.init is None:
            raise InvalidArgumentError("`init_weights` is for `init`: a new tower has one set of weights")
        if self.deepspeed is not None:
            _check_deepspeed(self.deepspeed)

    @property
    def weights(self) -> Alphas:
        """The effective loss weights."""
        return PLAIN_CLIP if self.loss == "clip" else self.alphas


def _check_deepspeed(path: Path) -> None:
    """Refuse a DeepSpeed configuration that cannot be used.

    Raises:
        UserError: it cannot be read (see `read_deepspeed`), or asks for ZeRO 3 or gradient accumulation.
    """
    content = read_deepspeed(path)
    if content.zero_optimization.stage == 3:
        raise BadDataError(
            f"{path}: field 'zero_optimization.stage' is 3: expected 0, 1 or 2; both towers fit on one GPU, "
            "from which they are saved"
        )
    steps = content.gradient_accumulation_steps
    if steps not in (1, "auto"):
        raise BadDataError(
            f"{path}: field 'gradient_accumulation_steps' is {steps}: expected 1; negatives are not shared across "
            "accumulation steps; raise `batch_size` or the number of processes, with `gradient_checkpointing=True`"
        )
