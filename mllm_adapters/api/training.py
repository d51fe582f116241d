"""Retrain the projector, fine-tune with LoRA, and estimate the memory that it takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import OutputTakenError
from mgll_encoder.common.files import optional_path
from mllm_adapters.checkpoints.locate import beside
from mllm_adapters.training.runs import TrainingRequest, carry_out, estimate, settings_of

if TYPE_CHECKING:
    from mllm_adapters.training.engine import Outcome
    from mllm_adapters.training.memory import MemoryEstimate


def retrain_projector(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    *,
    out: str | Path | None = None,
    control: str | Path | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    **settings: Any,
) -> "Outcome":
    """Retrain a model's projector; tower and language model stay as they are.

    Args:
        model: Checkpoint folder in the transformers layout.
        data: LLaVA conversations, benchmarks of ``eval-mcq build`` or manifests; one file or several.
        images: Folder that the image paths of conversations start from.
        out: Folder to write; ``<model>-aligned`` if not given.
        control: The unswapped checkpoint: trained in the same way to ``<out>-control``.
        recipe: Recipe file (YAML).
        resume: Continue an interrupted run.
        force: Replace ``out``, and discard an interrupted run.
        **settings: Fields of `mllm_adapters.training.recipe.Recipe` and ``RunOptions`` (``epochs``, ``batch_size``,
            ``learning_rate``, ``seed`` ...) or of transformers' ``TrainingArguments``; they override the
            recipe file.

    Returns:
        The outcome; the control's folder is next to its output.

    Raises:
        UserError: a setting is unknown, data or model are not usable, or ``out`` exists.
    """
    request = TrainingRequest(
        command="retrain-projector",
        model=Path(model),
        data=_files(data),
        images=optional_path(images),
        out=optional_path(out) or beside(Path(model), "aligned"),
        recipe=optional_path(recipe),
        flags=settings,
        stages=("projector",),
        control=optional_path(control),
        resume=resume,
        force=force,
    )
    return _trained(request)


def finetune_lora(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    *,
    stage: str = "lora",
    out: str | Path | None = None,
    merge: bool = False,
    recipe: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    **settings: Any,
) -> "Outcome":
    """Fine-tune a model: its projector, and its language model through LoRA adapters.

    Args:
        model: Checkpoint folder in the transformers layout.
        data: As of `retrain_projector`.
        images: Likewise.
        stage: ``lora``, ``lora-vision`` (also adapters on the tower) or ``full``.
        out: Folder to write; ``<model>-<stage>`` if not given.
        merge: Also write ``<out>-merged``, a full checkpoint.
        recipe: Recipe file (YAML).
        resume: Continue an interrupted run.
        force: Replace ``out``, and discard an interrupted run.
        **settings: As of `retrain_projector`; also ``rank``, ``lora_alpha``, ``lora_dropout`` and ``qlora``.

    Raises:
        UserError: as `retrain_projector`.
    """
    request = TrainingRequest(
        command="finetune-lora",
        model=Path(model),
        data=_files(data),
        images=optional_path(images),
        out=optional_path(out) or beside(Path(model), stage),
        recipe=optional_path(recipe),
        flags=settings,
        defaults={"stage": stage},
        stages=("lora", "lora-vision", "full"),
        merge=merge,
        resume=resume,
        force=force,
    )
    return _trained(request)


def estimate_memory(
    model: str | Path, *, stage: str = "projector", recipe: str | Path | None = None, **settings: Any
) -> "dict[str, MemoryEstimate]":
    """Estimate a training's memory per device on several target machines. No weights are loaded and no data is read.

    Args:
        model: Checkpoint folder in the transformers layout.
        stage: ``projector``, ``lora``, ``lora-vision`` or ``full``.
        recipe: Recipe file (YAML).
        **settings: As for `retrain_projector` and `finetune_lora`.

    Returns:
        Target machine -> bytes of weights, gradients, optimizer, activations and logits.

    Raises:
        UserError: a setting is unknown, or the model cannot be read.
    """
    request = TrainingRequest(
        command="estimate_memory", model=Path(model), data=(), images=None, out=beside(Path(model), stage),
        recipe=optional_path(recipe), flags=settings, defaults={"stage": stage},
        stages=("projector", "lora", "lora-vision", "full"),
    )  # fmt: skip
    return estimate(request, settings_of(request))


def _trained(request: TrainingRequest) -> "Outcome":
    """Run a request and return its outcome."""
    outcomes = carry_out(request, settings_of(request))
    if not outcomes:
        raise OutputTakenError(f"output {request.out} is finished: there is nothing to resume")
    return outcomes[0]


def _files(data: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    return (Path(data),) if isinstance(data, str | Path) else tuple(map(Path, data))
