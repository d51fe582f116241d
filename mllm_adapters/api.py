"""The public API. Paths are checked before anything heavy is imported."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mgll_encoder.common.devices import AUTO, Precision
from mgll_encoder.common.errors import InvalidArgumentError, OutputTakenError, unknown_name
from mgll_encoder.common.extras import require
from mgll_encoder.common.progress import Counter, no_bar, track
from mgll_encoder.weights.locate import check_tower
from mllm_adapters.checkpoints.locate import beside, check_delta, check_swapped
from mllm_adapters.core.hub_resolve import check_name, resolve
from mllm_adapters.training.runs import TrainingRequest, carry_out, estimate, settings_of

if TYPE_CHECKING:
    from mgll_encoder.tower.spec import Activation
    from mgll_encoder.weights.torch_file import WeightSet
    from mllm_adapters.core.contract import Family, Target
    from mllm_adapters.core.support_matrix import Support
    from mllm_adapters.export.exporting import GGUFExport
    from mllm_adapters.swap.planned import Fitting, SwapPlan
    from mllm_adapters.swap.verify import Check
    from mllm_adapters.swap.writer import Progress
    from mllm_adapters.training.engine import Outcome
    from mllm_adapters.training.memory import MemoryEstimate

Parts = Mapping[str, Path]


def plan_swap(
    mllm: str | Path,
    encoder: str | Path,
    *,
    image_size: int | None = None,
    tokens: int | None = None,
    layout: str = "own",
    activation: "Activation | str | None" = None,
    weights: "WeightSet | str | None" = None,
    precision: "Precision" = AUTO,
    parts: Parts | None = None,
) -> "SwapPlan":
    """Plan to put a vision tower into a multimodal LLM. Only headers are read, and nothing is written.

    Args:
        mllm: Checkpoint folder, hub id, or family name (which stands for its published checkpoint).
        encoder: The tower: anything that `mgll_encoder.inspect_tower` reads, or a hub id.
        image_size: Input side in pixels; None for the one that keeps the host's number of visual tokens.
        tokens: Visual tokens per image or tile, which determine the size; excludes ``image_size``.
        layout: Output layout: ``own``, or ``llava`` (loads with stock transformers) for families that
            support it.
        activation: ``gelu`` or ``quick_gelu``, for towers that do not record it.
        weights: ``raw`` or ``ema``, for towers that also contain a moving average of the weights.
        precision: Number format of the written tower: ``auto`` (the host's), ``float32``, ``bfloat16`` or ``float16``.
        parts: Paths of parts of the checkpoint that are not found next to it, name -> path.

    Raises:
        UserError: the checkpoint or the tower cannot be read, or they do not fit together.

    Example:
        >>> plan = plan_swap("llava-med", "mgll-fundus.pt")  # doctest: +SKIP
        >>> print(plan.report()); plan.write("llava-med-mgll")  # doctest: +SKIP
    """
    check_tower(Path(encoder))
    check_name(str(mllm))
    from mgll_encoder.tower.load import inspect_tower
    from mllm_adapters.core.planning import with_tower_dtype
    from mllm_adapters.core.registry import open_checkpoint
    from mllm_adapters.core.sizes import plan_at_size
    from mllm_adapters.swap.planned import SwapPlan

    if precision not in get_args(Precision):
        raise unknown_name("`precision`", precision, get_args(Precision))
    choices: dict[str, Any] = {"activation": activation, "weights": weights}  # checked there
    tower = inspect_tower(Path(encoder), **choices)
    checkpoint, family, _ = open_checkpoint(resolve(str(mllm)), parts)
    kind = _target(layout, family)
    plan, unsuited = plan_at_size(family, checkpoint, tower, kind, image_size=image_size, tokens=tokens)
    if precision != AUTO:
        plan = with_tower_dtype(plan, precision)
    given = _named(encoder)
    name = f"{_named(mllm).name}-{given.name if tower.source.is_dir() else given.stem}"
    warnings = (*tower.warnings, *([unsuited] if unsuited else []))
    return SwapPlan(plan, family, checkpoint, name, warnings)


def plan_conversion(mllm: str | Path, *, parts: Parts | None = None) -> "SwapPlan":
    """Plan to convert a checkpoint, including its tower, from its original layout to the transformers layout.

    Raises:
        UserError: the checkpoint cannot be read, or is already in the transformers layout.
    """
    check_name(str(mllm))
    from mllm_adapters.core.registry import open_checkpoint
    from mllm_adapters.swap.planned import SwapPlan

    checkpoint, family, _ = open_checkpoint(resolve(str(mllm)), parts)
    return SwapPlan(family.plan(checkpoint), family, checkpoint, f"{_named(mllm).name}-hf")


def convert(
    mllm: str | Path,
    out: str | Path,
    *,
    parts: Parts | None = None,
    copy: bool = False,
    force: bool = False,
    progress: "Progress" = lambda _: None,
) -> Path:
    """Convert a checkpoint, including its tower, from its original layout to the transformers layout.

    Args:
        mllm: Checkpoint folder, hub id, or family name.
        out: Folder to write.
        parts: Paths of parts of the checkpoint that are not found next to it, name -> path.
        copy: Copy unchanged files instead of hard-linking them.
        force: Replace ``out`` if it exists.
        progress: Called with the number of bytes written, tensor by tensor.

    Raises:
        UserError: see `plan_conversion` and `SwapPlan.write`.
    """
    return plan_conversion(mllm, parts=parts).write(out, copy=copy, force=force, progress=progress)


def align(
    plan: "SwapPlan",
    images: str | Path,
    *,
    samples: int | None = None,
    device: str = AUTO,
) -> "SwapPlan":
    """Fit the connector on unlabeled images, in closed form.

    Args:
        plan: A planned swap.
        images: Folder of images, searched recursively, or a manifest.
        samples: Maximum number of images (500 if not given), sampled with a fixed seed.
        device: Device of the towers: ``auto``, or a torch device.

    Returns:
        The plan with fitted connectors; ``alignment`` says how well each was fitted.

    Raises:
        UserError: too few images, or the old tower is not found.
    """
    return plan.to_fit(fitting(images, samples, device)).fit()


def fitting(images: str | Path, samples: int | None = None, device: str | None = None) -> "Fitting":
    """Return settings for fitting the connector on images, with the defaults of `align`."""
    from mllm_adapters.alignment.align import SAMPLES
    from mllm_adapters.swap.planned import Fitting

    return Fitting(Path(images), samples or SAMPLES, device or AUTO)


def verify(
    folder: str | Path,
    *,
    encoder: str | Path | None = None,
    mllm: str | Path | None = None,
    device: str = AUTO,
    quick: bool = False,
) -> "list[Check]":
    """Check that a swapped checkpoint is unchanged (files, tensors, tower), and that its output depends on images.

    Args:
        folder: The swapped checkpoint.
        encoder: The new tower; searched for by name and hash if not given.
        mllm: The original checkpoint; likewise.
        device: Device of the model: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPU if there is one.
        quick: Skip the checks that load the model.

    Returns:
        The checks; ``passed`` is None for those that could not be made.

    Raises:
        UserError: the folder has no record of a swap, or a given path cannot be read.
    """
    check_swapped(Path(folder))
    from mllm_adapters.swap.verify import Verification

    source = None if mllm is None else resolve(str(mllm))
    return list(
        track(Verification(Path(folder), _maybe(encoder), source, device).checks(quick=quick), "verifying")
    )


def restore(
    folder: str | Path,
    out: str | Path,
    *,
    mllm: str | Path | None = None,
    parts: Parts | None = None,
    copy: bool = False,
    force: bool = False,
    progress: "Progress" = lambda _: None,
) -> Path:
    """Undo a swap: restore the original tower and connector, or extract the new tower.

    Args:
        folder: The swapped checkpoint.
        out: Folder to write.
        mllm: The original checkpoint (folder, hub id or family name); None to write only the tower, as an
            ordinary tower folder.
        parts: Paths of parts of the original that are not found next to it, name -> path.
        copy: Copy unchanged files instead of hard-linking them.
        force: Replace ``out`` if it exists.
        progress: Called with the number of bytes written, tensor by tensor.

    Raises:
        UserError: the folder was not swapped, ``mllm`` is another checkpoint, or ``out`` exists.
    """
    check_swapped(Path(folder))
    if mllm is not None:
        check_name(str(mllm))
    from mllm_adapters.swap import restore as undo

    if mllm is None:
        return undo.to_encoder(Path(folder), Path(out), force=force)
    return undo.restore(
        Path(folder),
        resolve(str(mllm)),
        Path(out),
        parts=parts,
        force=force,
        copy=copy,
        progress=progress,
    )


def compose(
    delta: str | Path,
    out: str | Path,
    *,
    mllm: str | Path | None = None,
    encoder: str | Path | None = None,
    parts: Parts | None = None,
    copy: bool = False,
    force: bool = False,
    bar: Counter = no_bar,
) -> Path:
    """Write the whole checkpoint that a delta and its base define.

    Args:
        delta: Folder of `SwapPlan.write_delta` or `extract`.
        out: Folder to write.
        mllm: The base (folder, hub id or family name); found by name and hash next to the delta if None.
        encoder: The tower of a delta that only refers to it; found by name and hash if None.
        parts: Paths of parts of the base that are not next to it, name -> path.
        copy: Copy unchanged files instead of hard-linking them.
        force: Replace ``out`` if it exists.
        bar: Shows progress in bytes.

    Raises:
        UserError: the delta is damaged, its base or its encoder is missing or a different one, or ``out`` is taken.
    """
    check_delta(Path(delta))
    if mllm is not None:
        check_name(str(mllm))
    from mllm_adapters.loading.delta import ENCODER_PART, open_delta
    from mllm_adapters.swap import delta_files
    from mllm_adapters.swap.report import total_bytes
    from mllm_adapters.swap.writer import check_output

    check_output(Path(out), force, [Path(delta)])
    given = {**(parts or {}), **({} if encoder is None else {ENCODER_PART: Path(encoder)})}
    opened = open_delta(Path(delta), None if mllm is None else resolve(str(mllm)), given)
    with bar("writing", total_bytes(opened.plan)) as advance:
        return delta_files.compose(opened, Path(out), force=force, copy=copy, progress=advance)


def extract(
    folder: str | Path,
    mllm: str | Path,
    out: str | Path,
    *,
    parts: Parts | None = None,
    reference_tower: bool = False,
    force: bool = False,
    bar: Counter = no_bar,
) -> Path:
    """Extract a delta from a swapped checkpoint, retrained or not. All other tensors are compared with the base.

    Args:
        folder: The swapped checkpoint.
        mllm: Its base (folder, hub id or family name).
        out: Folder to write.
        parts: Paths of parts of the base that are not next to it, name -> path.
        reference_tower: Refer to the tower by its hashes instead of storing it, unless it was trained.
        force: Replace ``out`` if it exists.
        bar: Shows progress in bytes.

    Raises:
        UserError: ``mllm`` is not its base, other tensors than those of a swap or training differ from the base's, or
            ``out`` is taken.
    """
    check_swapped(Path(folder))
    check_name(str(mllm))
    from mllm_adapters.core.provenance import read_record
    from mllm_adapters.core.streaming import nbytes
    from mllm_adapters.swap import delta_files
    from mllm_adapters.swap.writer import check_output

    check_output(Path(out), force, [Path(folder)])
    with bar("comparing", sum(map(nbytes, read_record(Path(folder)).tensors))) as advance:
        return delta_files.extract(
            Path(folder), resolve(str(mllm)), Path(out), parts=parts, reference_tower=reference_tower, force=force,
            progress=advance,
        )  # fmt: skip


def plan_gguf(
    model: str | Path, *, precision: str = "float16", converter: str | Path | None = None
) -> "GGUFExport":
    """Plan to write a LLaVA for llama.cpp and Ollama. Headers are read, and nothing is written.

    Args:
        model: A LLaVA in the transformers layout: a result on LLaVA or LLaVA-Med, or one with ``layout="llava"``. Its
            language model is LLaMA, Mistral, Qwen2 or Qwen3, its tower CLIP or SigLIP.
        precision: Dtype of matrices in the files: ``float16`` or ``float32``.
        converter: llama.cpp's convert_hf_to_gguf.py, to write the language model; None for this project's writer.

    Raises:
        UserError: the model cannot be read, or llama.cpp cannot compute it.

    Example:
        >>> plan = plan_gguf("llava-med-mgll")  # doctest: +SKIP
        >>> print(plan.notes); plan.write("llava-med-mgll-gguf")  # doctest: +SKIP
    """
    require("gguf", "a GGUF file")
    from mllm_adapters.export.exporting import plan

    return plan(resolve(str(model)), precision, _maybe(converter))


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    precision: str = "float16",
    converter: str | Path | None = None,
    force: bool = False,
    bar: Counter = no_bar,
) -> Path:
    """Write a LLaVA for llama.cpp and Ollama: language model, tower with projector, Modelfile, README.

    Args:
        model: As of `plan_gguf`.
        out: Folder to write.
        precision: As of `plan_gguf`.
        converter: Likewise.
        force: Replace ``out`` if it exists.
        bar: Shows progress in bytes.

    Raises:
        UserError: as `plan_gguf`; or ``out`` exists or cannot be written, a value is too large for the precision, or
            the converter fails.
    """
    planned = plan_gguf(model, precision=precision, converter=converter)
    with bar("writing", sum(planned.sizes.values())) as advance:
        return planned.write(out, force=force, progress=advance)


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
        images=_maybe(images),
        out=_maybe(out) or beside(Path(model), "aligned"),
        recipe=_maybe(recipe),
        flags=settings,
        stages=("projector",),
        control=_maybe(control),
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
        images=_maybe(images),
        out=_maybe(out) or beside(Path(model), stage),
        recipe=_maybe(recipe),
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
        recipe=_maybe(recipe), flags=settings, defaults={"stage": stage},
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


def _maybe(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def list_families() -> "list[Support]":
    """Return the supported families: layouts, tokens per image, connectors, and how results load."""
    from mllm_adapters.core.support_matrix import support

    return support()


def _named(path: str | Path) -> Path:
    """Make a path absolute if its last component is not a name ("." and "..")."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _target(layout: str, family: "Family") -> "Target":
    from mllm_adapters.core.contract import Target

    if layout not in get_args(Target):
        raise unknown_name("`layout`", layout, get_args(Target))
    if layout in family.spec.targets:
        return layout
    if family.spec.not_llava:
        raise InvalidArgumentError(f"`layout={layout}`: {family.spec.not_llava}; use `layout=own`")
    return "own"  # which is a LLaVA
