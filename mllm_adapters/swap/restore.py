"""Undoes a swap: restores the original tower and connector, or extracts the tower as a folder."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.common.trained_on import TOWER, trainings_of, write_trainings
from mgll_encoder.tower.architectures import ARCHITECTURES
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.checkpoints.locate import PROVENANCE
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied
from mllm_adapters.core.provenance import SwapRecord, is_input, read_record
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import components
from mllm_adapters.core.values import compute
from mllm_adapters.loading.load import check_complete, empty_model
from mllm_adapters.swap.apply import apply_plan
from mllm_adapters.swap.writer import copy_sides, published_config, write_checkpoint, write_weights

ORIGINAL = "original/"
"""Prefix of the original checkpoint's tensor names when both checkpoints are read."""

_REPLACED = {TOWER, "projector"}
"""Components that are replaced when undoing a swap."""

_NO_TOWER = "{folder} has no swapped tower: it was converted, not swapped"


def restore(
    folder: Path,
    original: Path,
    out: Path,
    *,
    parts: Mapping[str, Path] | None = None,
    force: bool = False,
    copy: bool = False,
) -> Path:
    """Write the checkpoint as it was before the swap, in the transformers layout.

    Tower, connector, configuration and processor come from ``original``; tensors that the swap did not
    change come from ``folder``, including later training.

    Args:
        folder: A swapped checkpoint.
        original: Its original checkpoint.
        out: Folder to write.
        parts: Paths of parts of ``original``, as for a swap.
        force: Replace ``out`` if it exists.
        copy: Copy unchanged files instead of hard-linking them.

    Raises:
        UserError: ``folder`` was not swapped, ``original`` is another checkpoint, or ``out`` cannot be
            written.
    """
    record = read_record(folder)
    if not record.plan["swapped"]:
        raise BadDataError(_NO_TOWER.format(folder=folder))
    source, family, layout = open_checkpoint(original, parts)
    if not is_input(record.inputs.source, source.folder):
        raise MismatchError(
            f"{original} is not the original of {folder} ({record.inputs.source.name}): its config.json or "
            "weights have other hashes than those in mgll_swap.json"
        )
    swapped = Checkpoint(folder)
    plan = None if layout == "transformers" else family.plan(source)
    steps = [copied(header) for header in source.tensors.values()] if plan is None else list(plan.steps)
    if plan is not None:
        check_complete(plan)
    both = _Both(swapped, source)
    merged = list(_merged(steps, record, vision_tensors(swapped, record)))
    own = {step.name: step for step in steps}

    def values(group: list[Step]) -> Iterable[tuple[Step, Tensor]]:
        theirs = _originals([own[s.name] for s in group if _is_original(s)], plan, source)
        for step in group:
            yield step, next(theirs) if _is_original(step) else swapped.read(step.sources[0])

    weights = partial(write_weights, source=both, steps=merged, compute=values, copy=copy)
    since = [training for training in trainings_of(folder) if set(training.parts) - _REPLACED]
    read = [folder, original]
    if plan is not None:
        return apply_plan(
            plan, family, source, out, weights=weights, trainings=since, read=read, force=force, checked=True
        )

    def sides(written: Path) -> None:
        copy_sides(source, written)
        write_trainings(written, [*trainings_of(source.folder), *since])

    return write_checkpoint(
        out,
        config=published_config(source.config, source.config_bytes),
        weights=weights,
        sides=sides,
        force=force,
        inputs=read,
    )


def to_encoder(folder: Path, out: Path, *, force: bool = False) -> Path:
    """Write the tower of a swapped checkpoint as an ordinary tower folder.

    It keeps the checkpoint's grid and normalization, so its features are the same.

    Args:
        folder: A swapped checkpoint.
        out: Folder to write.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: ``folder`` was not swapped, or ``out`` cannot be written.
    """
    from mgll_encoder import Tower, save_tower
    from mgll_encoder.tower.model import filled_model

    record = read_record(folder)
    steps = {step.sources[0]: step for step in record.tensors if step.kind.from_tower}
    if record.tower_spec is None or not steps or not record.plan["swapped"]:
        raise BadDataError(_NO_TOWER.format(folder=folder))
    checkpoint = Checkpoint(folder)
    after = record.plan_with(checkpoint.config).after
    fitted = {name: getattr(after, name) for name in ("mean", "std", "resize")}
    size = after.image_size // after.patch_size * after.patch_size
    spec = record.tower_spec.model_copy(update={**fitted, "image_size": size, "projection_dim": None})
    state = {key: checkpoint.read(step.name) for key, step in steps.items()}
    _check_tower(folder, ARCHITECTURES[spec.architecture].shapes(spec), state)
    model = filled_model(spec, state)
    made_of = record.inputs.tower.name if record.inputs.tower else None
    provenance = {"source": folder.absolute().name, "layout": "swapped checkpoint", "encoder": made_of}
    trainings = [training for training in trainings_of(folder) if TOWER in training.parts]
    return save_tower(Tower.from_model(model, spec), out, force, provenance, trainings=trainings)


def _check_tower(folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    shapes = [expected, {name: tuple(tensor.shape) for name, tensor in found.items()}]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        wanted, given = (state.get(name, "none") for state in shapes)
        if wanted != given:
            raise BadDataError(
                f"{folder / PROVENANCE}: the tower's tensor {name} has shape {given}, expected {wanted}: the record is "
                "damaged: swap again"
            )


class _Both:
    """Two checkpoints as one: names of the second have the prefix `ORIGINAL`."""

    def __init__(self, swapped: Checkpoint, original: Checkpoint) -> None:
        self._swapped = swapped
        self._original = original
        self.tensors: Mapping[str, TensorHeader] = swapped.tensors

    def header(self, name: str) -> TensorHeader:
        if name.startswith(ORIGINAL):
            return self._original.header(name.removeprefix(ORIGINAL))
        return self._swapped.header(name)

    def release(self, file: Path) -> None:
        self._swapped.release(file)
        self._original.release(file)


def _merged(steps: Iterable[Step], record: SwapRecord, vision: set[str]) -> Iterator[Step]:
    """Yield the steps, each from the swapped checkpoint if that has the same tensor."""
    same = {_origin(t): t.name for t in record.tensors if t.sources and t.name not in vision}
    for step in steps:
        name = same.get(_origin(step)) if step.sources and not step.kind.from_tower else None
        if name is not None:
            operation = "keep" if name == step.name else "rename"
            yield step.model_copy(update={"operation": operation, "sources": (name,), "arguments": {}})
        elif step.kind.from_tower:
            yield step
        else:
            yield step.model_copy(update={"sources": tuple(ORIGINAL + source for source in step.sources)})


def _origin(step: Step) -> tuple[object, ...]:
    """Return how a tensor is made and from what: tensors with the same recipe are equal."""
    operation = "copy" if step.kind.copies_bytes else step.operation
    return operation, step.sources, tuple(sorted(step.arguments.items())), step.dtype, step.shape


def _is_original(step: Step) -> bool:
    """Whether the value of a merged step comes from the original checkpoint, or has no source."""
    return step.kind.from_tower or not step.sources or step.sources[0].startswith(ORIGINAL)


def _originals(steps: list[Step], plan: Plan | None, source: Checkpoint) -> Iterator[Tensor]:
    if plan is None:
        return (source.read(step.sources[0]) for step in steps)
    return (value for _, value in compute(plan, source, steps))


def vision_tensors(swapped: Checkpoint, record: SwapRecord) -> set[str]:
    """Return the names on disk of the tower and the connector."""
    parts = components(empty_model(record.plan_with(swapped.config)))
    wanted = [name for name, part in parts.items() if part in ("tower", "projector")]
    return {t.name for t in record.tensors if any(f".{name}".endswith(f".{t.name}") for name in wanted)}
