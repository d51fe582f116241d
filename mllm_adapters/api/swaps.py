"""Plan, write, check and undo swaps."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mgll_encoder.common.devices import AUTO, Precision
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.common.files import optional_path
from mgll_encoder.common.progress import track
from mgll_encoder.weights.locate import check_tower
from mllm_adapters.checkpoints.locate import check_swapped
from mllm_adapters.core.hub_resolve import check_name, resolve

if TYPE_CHECKING:
    from mgll_encoder.tower.spec import Activation
    from mgll_encoder.weights.torch_file import WeightSet
    from mllm_adapters.core.contract import Family, Target
    from mllm_adapters.core.support_matrix import Support
    from mllm_adapters.swap.planned import Fitting, SwapPlan
    from mllm_adapters.swap.verify import Check

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
) -> Path:
    """Convert a checkpoint, including its tower, from its original layout to the transformers layout.

    Args:
        mllm: Checkpoint folder, hub id, or family name.
        out: Folder to write.
        parts: Paths of parts of the checkpoint that are not found next to it, name -> path.
        copy: Copy unchanged files instead of hard-linking them.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: see `plan_conversion` and `SwapPlan.write`.
    """
    return plan_conversion(mllm, parts=parts).write(out, copy=copy, force=force)


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
        track(
            Verification(Path(folder), optional_path(encoder), source, device).checks(quick=quick),
            "Verifying",
        )
    )


def restore(
    folder: str | Path,
    out: str | Path,
    *,
    mllm: str | Path | None = None,
    parts: Parts | None = None,
    copy: bool = False,
    force: bool = False,
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
    )


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
