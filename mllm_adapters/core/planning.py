"""Shared parts of planning a swap."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import (
    BadDataError,
    IncompatibleTowerError,
    MismatchError,
    UnsupportedCheckpointError,
)
from mgll_encoder.tower.architectures import ARCHITECTURES, first_patch
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.spec import TowerSpec
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.core.contract import Dropped, Plan, VisionContract
from mllm_adapters.core.fates import ConnectorFate, Kept, Reinitialized
from mllm_adapters.core.operations import OperationName, Step

TowerDtype = Literal["float32", "float16", "bfloat16"]
"""Dtypes of a written tower."""

IMAGE_TOKEN = "<image>"
"""Placeholder that the processor expands to one id per visual token."""


LARGEST_STRETCH = 16
"""Maximum factor of a requested image size over the tower's own; a larger number is assumed to be a typo."""

REPLACED = "replaced by the new tower"
"""Why a swap drops the tensors of the old tower."""

VOCABULARY_MULTIPLE = 64
"""Extended vocabularies are rounded up to this, as in the published llava-hf checkpoints (32000 -> 32064)."""


def contract_of(spec: TowerSpec, feature_layer: int, class_token: bool) -> VisionContract:
    """Return a host's vision contract with this tower; a class token is read if it exists and ``class_token``."""
    leading = first_patch(spec)
    class_token = class_token and leading > 0
    return VisionContract(
        width=spec.width,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        tokens=spec.patches + class_token,
        feature_layer=feature_layer,
        class_token=class_token,
        activation=spec.activation,
        leading=leading,
        mean=spec.mean,
        std=spec.std,
        resize=spec.resize,
    )


def after_swap(
    before: VisionContract,
    tower: TowerHeader | None,
    image_size: int | None,
    *,
    tokens: Callable[[int], int] | None = None,
    multiple: int = 1,
) -> VisionContract:
    """Return the vision contract with the new tower.

    The host keeps its normalization (the difference is folded into the tower) and, unless ``image_size`` is
    given, its patch grid. The resize rule is the new tower's.

    Args:
        before: The host's contract; its ``feature_layer`` and ``class_token`` also apply to the new tower,
            so a family that reads the new tower elsewhere passes a modified copy.
        tower: The new tower.
        image_size: Requested input side in pixels.
        tokens: Patches along one side -> visual tokens; None for one per patch, plus the class token if it
            is read.
        multiple: Required divisor of the number of patches along one side.

    Raises:
        UserError: ``image_size`` does not give a valid grid, or the tower lacks the layer that the host
            reads.
    """
    if tower is None:
        return before
    spec = tower.spec
    if not -spec.depth - 1 <= before.feature_layer <= spec.depth:
        raise IncompatibleTowerError(
            f"{tower.source}: the host reads hidden layer {before.feature_layer}, but this tower has only "
            f"{spec.depth} blocks: take a deeper one"
        )
    unit = spec.patch_size * multiple
    size = ceil(before.grid / multiple) * unit if image_size is None else image_size
    most = max(LARGEST_STRETCH * spec.image_size // unit, 1) * unit
    if image_size is not None and image_size > most:
        raise IncompatibleTowerError(
            f"`image_size={image_size}` is more than {LARGEST_STRETCH} times the tower's own {spec.image_size}: "
            f"take {most} at most, or leave it out to keep the host's number of tokens"
        )
    if size % unit or size <= 0:
        near = max(1, round(size / unit)) * unit
        by = f"patch size {spec.patch_size}" + (f" times {multiple}" if multiple > 1 else "")
        raise IncompatibleTowerError(f"`image_size={size}` is not a multiple of the tower's {by}: try {near}")
    resized = spec.model_copy(update={"image_size": size, "mean": before.mean, "std": before.std})
    after = contract_of(resized, before.feature_layer, before.class_token)
    return after if tokens is None else after.model_copy(update={"tokens": tokens(after.grid)})


def check_positions(
    positions: TensorHeader, spec: TowerSpec, *, class_token: bool = True, by: str = "config.json"
) -> None:
    """Refuse a tower whose position table [..., tokens, width] does not have the described shape.

    Args:
        positions: The table.
        spec: The tower as it is described.
        class_token: Whether it has a row for one, if its architecture has one.
        by: What describes it.

    Raises:
        UserError: it is.
    """
    rows = spec.patches + (class_token and ARCHITECTURES[spec.architecture].leading)
    if positions.shape[-2:] != (rows, spec.width):
        raise MismatchError(
            f"{positions.file.parent}: {by} describes a tower of {spec.grid}x{spec.grid} patches and width "
            f"{spec.width}, but {positions.name} has shape {list(positions.shape)}"
        )


def swap_notes(tower: TowerHeader | None, after: VisionContract) -> tuple[str, ...]:
    """Return notes about what a swap changes in the tower itself."""
    if tower is None:
        return ()
    notes = []
    grid, target = tower.spec.grid, after.image_size // after.patch_size
    if grid != target:
        notes.append(
            f"the tower's position embedding is resampled from {grid}x{grid} to {target}x{target} patches"
        )
    if (tower.spec.mean, tower.spec.std) != (after.mean, after.std):
        notes.append(
            "the tower was trained with another mean and std than the host's image processor uses: the "
            "difference is folded into the tower's patch convolution and position embedding (exact)"
        )
    return tuple(notes)


def tower_steps(tower: TowerHeader, prefix: str, after: VisionContract, dtype: torch.dtype) -> list[Step]:
    """Return steps for a tower's tensors in a host, in the host's dtype.

    Args:
        tower: The tower.
        prefix: What precedes the names of a CLIP's tensors in the host; towers of other architectures lack what is
            CLIP's own in it.
        after: The vision contract of the target.
        dtype: The host's dtype.

    Raises:
        UserError: the host's tensors are quantized.
    """
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedCheckpointError(
            f"the host's weights are {dtype_name(dtype)}: use its unquantized checkpoint"
        )
    architecture = tower.architecture
    fitted = architecture.shapes(tower.spec.model_copy(update={"image_size": after.image_size}))
    root = prefix if architecture.inner else prefix.removesuffix(CLIP.inner)
    steps = [
        Step(
            name=root + architecture.written_name(key), dtype=dtype_name(dtype), shape=fitted[key], operation="tower",
            sources=(key,),
        )
        for key in tower.tensors
    ]  # fmt: skip
    unread = architecture.unread(tower.spec)
    zeros = [
        Step(name=root + key, dtype=dtype_name(dtype), shape=shape, operation="zeros")
        for key, shape in unread.items()
    ]
    return steps + zeros


def tower_root(checkpoint: Checkpoint, tower: str) -> tuple[str, torch.dtype]:
    """Return what precedes ``tower`` in a checkpoint's tensor names (it depends on the release), and their dtype.

    Raises:
        UserError: no name contains it.
    """
    first = next((header for header in checkpoint.tensors.values() if tower in header.name), None)
    if first is None:
        raise BadDataError(f"{checkpoint.folder} has no tensor of {tower.rstrip('.')}: is it complete?")
    return first.name.partition(tower)[0], first.dtype


def with_tower_dtype(plan: Plan, dtype: TowerDtype) -> Plan:
    """Return a plan whose tower is written in a dtype other than the host's."""
    tower = [step for step in plan.steps if step.kind.from_tower]
    hosts = sorted({step.dtype for step in tower})
    if hosts == [dtype]:
        return plan
    steps = [s.model_copy(update={"dtype": dtype}) if s.kind.from_tower else s for s in plan.steps]
    note = (
        f"the tower is written in {dtype} (`precision`), the host's own dtype is {' and '.join(hosts)}; what loads the "
        "model in one dtype, as transformers does by default, converts the tower to that"
    )
    return plan.model_copy(update={"steps": tuple(steps), "notes": (*plan.notes, note)})


def copied(header: TensorHeader, name: str | None = None) -> Step:
    """Return a step that copies a source tensor, optionally under another name."""
    name = name or header.name
    return Step(
        name=name,
        dtype=dtype_name(header.dtype),
        shape=header.shape,
        operation="keep" if name == header.name else "rename",
        sources=(header.name,),
    )


def extended(steps: Iterable[Step], names: Collection[str], rows: int) -> list[Step]:
    """Return the steps, with rows added to the tensors of these names; each new row is the mean of the old ones."""
    more: dict[str, Any] = {"operation": "extend_rows"}
    return [
        step.model_copy(update={**more, "shape": (rows, *step.shape[1:])})
        if step.name in names and step.shape[0] != rows
        else step
        for step in steps
    ]


def reinitialized(step: Step, shape: tuple[int, ...]) -> Step:
    """Return a step for a tensor in another shape: random init; ones for norm weights, zeros for biases."""
    flat: OperationName = "zeros" if step.name.endswith(".bias") else "ones"
    operation = flat if len(shape) == 1 else "reinit"
    replaces = next(iter(step.sources), None)
    return step.model_copy(
        update={"operation": operation, "shape": shape, "sources": (), "replaces": replaces}
    )


def replaced(names: Iterable[str]) -> tuple[Dropped, ...]:
    """Return the tensors of the old tower that a swap drops."""
    return tuple(Dropped(name=name, reason=REPLACED) for name in names)


def growth(vocabulary: int, rows: int) -> str:
    """Return a note about new vocabulary rows, to precede the placeholder's id; empty if there are none."""
    if rows == vocabulary:
        return ""
    return (
        f"the vocabulary grows from {vocabulary} to {rows} rows (each new row is the mean of the old ones); "
    )


def refit_connector(
    steps: Iterable[Step], connector: str, before: VisionContract, after: VisionContract, where: Path
) -> tuple[list[Step], dict[str, ConnectorFate]]:
    """Re-initialize a linear layer or normalization that reads vision features if the features' width changes.

    Args:
        steps: Steps so far.
        connector: Target name of the module, without ``.weight``. It may read several concatenated features.
        before: Vision contract of the source.
        after: Vision contract of the target.
        where: Name of the checkpoint in error messages.

    Returns:
        The steps, and the connector's fate.

    Raises:
        UserError: the connector is missing, or reads features of another width than the host's tower gives.
    """
    steps = list(steps)
    reads = next((step.shape[-1] for step in steps if step.name == f"{connector}.weight"), None)
    if reads is None:
        raise BadDataError(f"{where}: tensor {connector}.weight is missing: is this the language model only?")
    if reads % before.width:
        raise MismatchError(
            f"{where}: {connector}.weight reads features of width {reads}, but the host's tower has width "
            f"{before.width}: tower and projector do not belong together"
        )
    normalization = any(step.name == f"{connector}.weight" and len(step.shape) == 1 for step in steps)
    if before.width == after.width:
        return steps, {connector: Kept(width=after.width)}
    changed = []
    for step in steps:
        if step.name == f"{connector}.weight":
            step = reinitialized(step, (*step.shape[:-1], step.shape[-1] // before.width * after.width))
        elif step.name == f"{connector}.bias":
            # A normalization's bias has its input's width, a linear layer's its output's.
            step = reinitialized(
                step, (reads // before.width * after.width,) if normalization else step.shape
            )
        changed.append(step)
    return changed, {connector: Reinitialized(before=before.width, after=after.width)}


def image_row(tokenizer: Any | None, vocabulary: int, image_token: str = IMAGE_TOKEN) -> tuple[int, int]:
    """Return the id of the image placeholder, and the vocabulary size that includes it.

    Args:
        tokenizer: The checkpoint's tokenizer, or None.
        vocabulary: Rows of the embedding.
        image_token: The placeholder.
    """
    vocab: Mapping[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    image_token_id = vocab.get(image_token, vocabulary if tokenizer is None else len(tokenizer))
    if image_token_id < vocabulary:
        return image_token_id, vocabulary
    return image_token_id, ceil((image_token_id + 1) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def differences(headers: Mapping[str, Any], steps: Iterable[Step]) -> Iterator[tuple[str, str, str]]:
    """Yield tensors that differ from the plan: name, and descriptions of what was found and expected.

    Args:
        headers: Name -> what has the ``dtype`` and the ``shape`` of a tensor that is there.
        steps: The planned tensors.
    """
    found = {name: f"{dtype_name(header.dtype)} {list(header.shape)}" for name, header in headers.items()}
    planned = {step.name: f"{step.dtype} {list(step.shape)}" for step in steps}
    for name in sorted(found.keys() | planned.keys()):
        if found.get(name) != planned.get(name):
            yield name, found.get(name, "absent"), planned.get(name, "absent")


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
