"""Training settings: those that affect the result, and those that do not, as validated dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from transformers.integrations import get_available_reporting_integrations

from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mllm_adapters.core.stages import STAGES, LoraSettings
from mllm_adapters.data.captions import ALL
from mllm_adapters.data.training_rows import DataOptions
from mllm_adapters.feature_cache.precompute import DTYPES

PRECISIONS = ("auto", "float32", "bfloat16")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, lt=2**31)]


@dataclass(frozen=True)
class Recipe:
    """Settings that affect the result of a training.

    Learning rate, schedule, warm-up and length are those of LLaVA's stages (haotian-liu/LLaVA,
    scripts/v1_5), which also average over 256 examples per step.

    Attributes:
        epochs: Passes over the data.
        batch_size: Examples per device and forward pass.
        gradient_accumulation: Forward passes per step.
        learning_rate: Peak of the schedule; the stage's own if None.
        max_steps: Stop after this number of steps, regardless of ``epochs``.
        seed: Seed of the order of the examples, and of new adapters.
        max_length: Longest example in tokens, image tokens included.
        warmup_ratio: Share of the steps with a rising learning rate.
        precision: Of the frozen weights and the forward pass: ``float32``, ``bfloat16``, or ``auto`` (bfloat16 on a
            GPU that supports it). Trained parameters are float32 (with DeepSpeed, their master copy is).
        stage: A key of `STAGES`, which selects the trained components.
        rank: Of LoRA's adapters.
        lora_alpha: Adapters are scaled by ``lora_alpha / rank``.
        lora_dropout: Of the adapters' inputs.
        qlora: Keep the language model in 4 bits (NF4) while its adapters train.
        answer: Training target for multiple-choice rows: ``letter``, ``text`` or ``both``.
        caption: Granularity of a manifest used as caption, or ``all`` for all of them in order.
        strict: Whether an image that cannot be read stops the run; otherwise its rows are left out and counted.
        arguments: Further fields of transformers' TrainingArguments.
    """

    epochs: Positive = 1.0
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    learning_rate: Positive | None = None
    max_steps: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # range of NumPy's generators
    max_length: Count = 2048
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    precision: str = "auto"
    stage: str = "projector"
    rank: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    qlora: bool = False
    answer: str = "letter"
    caption: str = ALL
    strict: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.precision == "float16":
            raise InvalidArgumentError("`precision=float16` overflows in training: use bfloat16, or float32")
        for kind, known in (("precision", PRECISIONS), ("stage", STAGES)):
            if getattr(self, kind) not in known:
                raise unknown_name(kind, getattr(self, kind), known)
        _ = self.rows  # validates its values
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", STAGES[self.stage].learning_rate)
        if self.qlora and not STAGES[self.stage].lora:
            raise InvalidArgumentError(
                f"`qlora=True` keeps the language model in 4 bits, but stage '{self.stage}' has no "
                "adapters: use stage lora or lora-vision"
            )

    @property
    def rows(self) -> DataOptions:
        """Return how rows are made from files."""
        return DataOptions(self.answer, self.caption, self.strict, self.seed)

    @property
    def lora(self) -> LoraSettings:
        """Return the settings of the adapters."""
        return LoraSettings(self.rank, self.lora_alpha, self.lora_dropout)


@dataclass(frozen=True)
class RunOptions:
    """Settings that do not change the result.

    Attributes:
        logging_steps: Steps between two log entries.
        save_steps: Steps between two checkpoints.
        report_to: Where the Trainer logs to: ``tensorboard``, ``wandb`` ...; empty for nowhere.
        workers: Processes that open images; 0 for the training process itself.
        gradient_checkpointing: Recompute the language model's activations instead of keeping them.
        deepspeed: DeepSpeed's configuration, a JSON file; None for none.
        save_on_signal: Save a checkpoint before ending on SIGTERM (Slurm) or Ctrl-C.
        feature_cache: Cache the frozen tower's features on disk.
        feature_precision: Number format of cached features: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the
            precision of the forward pass, which changes nothing.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPUs if there are any. Processes started by a
            launcher have theirs from it.
    """

    logging_steps: Count = 10
    save_steps: Count = 200
    report_to: tuple[str, ...] = ("tensorboard",)
    workers: Annotated[int, Field(ge=0)] = 0
    gradient_checkpointing: bool = False
    deepspeed: Path | None = None
    save_on_signal: bool = False
    feature_cache: bool = True
    feature_precision: str = "auto"
    device: str = AUTO

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.feature_precision not in ("auto", *DTYPES):
            raise unknown_name("`feature_precision`", self.feature_precision, ("auto", *DTYPES))
        known = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in known:
                raise unknown_name("`report_to` (or its package is not installed)", name, known)


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation during training.

    Attributes:
        eval_bench: A benchmark of ``eval-mcq build`` on a validation split; None for no evaluation.
        eval_every: Steps between two evaluations; the last step is evaluated in any case.
    """

    eval_bench: Path | None = None
    eval_every: Count = 200

    def __post_init__(self) -> None:
        _check_fields(self)


def check_value(kind: Any, value: Any, where: str) -> Any:
    """Convert a value to a field's type.

    Raises:
        UserError: it has another type; the message is one line that says where it was given.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should", "it must")
        raise InvalidArgumentError(f"{where} is {value}: {reason}") from None


def _check_fields(options: Any) -> None:
    kinds = get_type_hints(type(options), include_extras=True)
    for entry in fields(options):
        option = f"`{entry.name}`"
        value = check_value(kinds[entry.name], getattr(options, entry.name), option)
        object.__setattr__(options, entry.name, value)
