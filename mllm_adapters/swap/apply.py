"""Executes a plan on disk: shard by shard, tensor by tensor, in a hidden folder that is renamed at the end."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import OutputTakenError, UserError
from mgll_encoder.common.files import appearing, check_free, new_folder, sync_file
from mgll_encoder.common.local_paths import without_local
from mgll_encoder.common.texts import read_json
from mgll_encoder.common.trained_on import (
    TRAINED_ON,
    Training,
    trainings_of,
    without_tower,
    write_trainings,
)
from mgll_encoder.weights.spans import Span, spans, truncated
from mgll_encoder.weights.weight_file import is_safetensors
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.checkpoints.file_copy import best_way, check_space, copy_files, transfer
from mllm_adapters.checkpoints.fingerprint import FileRecord, sampled, whole
from mllm_adapters.checkpoints.locate import PROVENANCE
from mllm_adapters.checkpoints.side_files import remove_paths
from mllm_adapters.core.contract import Family, Plan, Step
from mllm_adapters.core.planning import dtype_name
from mllm_adapters.core.provenance import input_record, record_of
from mllm_adapters.core.streaming import DTYPE_CODES, nbytes, write_safetensors
from mllm_adapters.core.values import compute, open_tower
from mllm_adapters.loading.load import GENERATION, check_complete
from mllm_adapters.swap.card import CARD, model_card

_logger = logging.getLogger(__name__)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
REWRITTEN = (
    CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "adapter_config.json",
    CARD,
    PROVENANCE,
    TRAINED_ON,
)
"""Side files that a swap rewrites or, when merging an adapter, drops; the source's others are copied."""

_NAMED = 12
"""Maximum number of names of left-behind files in a message."""


class TensorSource(Protocol):
    """The interface of a source of kept tensors, such as a `Checkpoint`."""

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """Return the headers of all tensors by name."""

    def header(self, name: str) -> TensorHeader:
        """Return the header of one tensor."""

    def release(self, file: Path) -> None:
        """Release the memory held for a weight file."""


@dataclass(frozen=True)
class Written:
    """The result of `write_weights`.

    Attributes:
        files: Records of the weight files by name.
        hashes: SHA-256 of every computed tensor, by name.
    """

    files: dict[str, FileRecord]
    hashes: dict[str, str]


def apply_plan(
    plan: Plan,
    family: Family,
    checkpoint: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    copy: bool = False,
    checked: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    fitted: Mapping[str, Tensor] | None = None,
    trainings: Sequence[Training] = (),
) -> Path:
    """Write the planned checkpoint.

    Args:
        plan: The plan.
        family: The family that made the plan; it makes the processor.
        checkpoint: The plan's source.
        out: Folder that appears when everything is written and checked.
        force: Replace ``out`` if it exists.
        copy: Copy unchanged files instead of hard-linking them (sharing blocks if the file system can).
        checked: The plan has already passed `check_complete`.
        progress: Called with the number of bytes written, tensor by tensor.
        fitted: Values of the fitted tensors, by name (`mllm_adapters.alignment.align`).
        trainings: Records of the images that they were fitted on.

    Raises:
        UserError: ``out`` cannot be written, the source cannot be read, or the planned tensors are not those
            of the planned model.
    """
    if not checked:
        check_complete(plan)

    def write(partial: Path) -> Written:
        return write_weights(
            partial,
            checkpoint,
            plan.steps,
            lambda steps: compute(plan, checkpoint, steps, fitted),
            progress,
            copy=copy,
        )

    with new_checkpoint(out, force, inputs(plan)) as partial:
        complete_folder(partial, plan, family, checkpoint, write, trainings)
    return out


def complete_folder(
    folder: Path,
    plan: Plan,
    family: Family,
    checkpoint: Checkpoint,
    write: Callable[[Path], Written],
    trainings: Sequence[Training] = (),
) -> None:
    """Write the complete planned checkpoint into a folder, config.json last.

    Args:
        folder: Existing folder.
        plan: The plan.
        family: The family that made the plan.
        checkpoint: The plan's source.
        write: Writes the weights into a folder.
        trainings: Its training data in addition to those of its source and tower.

    Raises:
        UserError: the processor cannot be made, or ``write`` fails.
    """
    write_processor = family.processor_writer(plan)
    tower = open_tower(plan)
    config = json.dumps(without_local(plan.config), indent=2) + "\n"
    with ThreadPoolExecutor(1) as aside:
        # Training checkpoints are large, and are hashed completely, in parallel to the writing.
        hashing = aside.submit(input_record, tower.source, hashed_files(tower)) if tower else None
        written = write(folder)
        tower_record = hashing.result() if hashing else None
    copy_files((f for f in checkpoint.side_files if f.name not in REWRITTEN), folder)
    _update_generation(folder / GENERATION, plan)
    write_processor(folder)
    remove_paths(folder)
    tell_left_behind(checkpoint)
    write_trainings(folder, [*_inherited(plan, checkpoint), *trainings])
    files = {**side_records(folder, written.files), CONFIG: record_of_text(config), **written.files}
    record = record_of(plan, checkpoint, tower_record, tower.spec if tower else None, files, written.hashes)
    (folder / PROVENANCE).write_text(record.dump(), encoding="utf-8")
    (folder / CARD).write_text(model_card(plan, record), encoding="utf-8")
    # Last, so that a folder left behind by a kill is not a checkpoint; `new_folder` syncs to disk.
    with appearing(folder / CONFIG) as file:
        file.write_text(config, encoding="utf-8")


def tell_left_behind(checkpoint: Checkpoint) -> None:
    """List the files of a checkpoint's folder that are not copied to the output."""
    if names := checkpoint.left_behind:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        _logger.info(
            f"not copied from {checkpoint.folder}, because not part of a model: "
            f"{', '.join(names[:_NAMED])}{more}"
        )


def _inherited(plan: Plan, checkpoint: Checkpoint) -> tuple[Training, ...]:
    """Return the training data that the planned checkpoint inherits from its source and its tower."""
    before = trainings_of(checkpoint.folder)
    return (*without_tower(before), *trainings_of(plan.tower)) if plan.tower else before


def inputs(plan: Plan) -> tuple[Path, ...]:
    """Return the files and folders that a plan reads."""
    return (plan.source, *([plan.tower] if plan.tower else []), *plan.parts.values())


def check_output(out: Path, force: bool, inputs: Iterable[Path]) -> None:
    """Refuse an output path that exists, or (even with ``force``) that is or contains an input.

    Raises:
        UserError: it exists, or is or contains an input.
    """
    for given in inputs:
        if given.resolve().is_relative_to(out.resolve()):
            what = "is" if given.resolve() == out.resolve() else "holds"
            raise OutputTakenError(f"output {out} {what} the input {given}: choose another `out`")
    check_free(out, force)


@contextmanager
def new_checkpoint(out: Path, force: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """Create a `new_folder` for a checkpoint made from others, which it never replaces.

    Raises:
        UserError: ``out`` exists, is or contains an input, or cannot be written.
    """
    check_output(out, force, inputs)
    try:
        with new_folder(out, force) as partial:
            yield partial
    except OSError as error:
        where = error.filename or out
        raise UserError(f"{out} cannot be written ({where}: {error.strerror or error})") from error


def write_weights(
    folder: Path,
    source: TensorSource,
    steps: Iterable[Step],
    compute: Callable[[list[Step]], Iterable[tuple[Step, Tensor]]],
    progress: Callable[[int], None] = lambda _: None,
    *,
    copy: bool = False,
) -> Written:
    """Write shards and their index; unchanged source files are hard-linked.

    Args:
        folder: Existing folder to write into.
        source: Checkpoint that kept tensors come from.
        steps: Every tensor of the target.
        compute: Computes the values of the given steps.
        progress: Called with the number of bytes written, tensor by tensor.
        copy: Copy such files instead (see `mllm_adapters.checkpoints.file_copy.best_way`).

    Raises:
        UserError: there is not enough disk space.
    """
    groups: dict[Path | None, list[Step]] = {}
    for step in steps:
        groups.setdefault(_home(step, source), []).append(step)
    whole_files = [file for file, group in groups.items() if file and _untouched(file, group, source)]
    ways = {file: best_way(file, folder, copy=copy) for file in whole_files}
    shared = {file for file, way in ways.items() if way != "copy"}
    check_space(folder, sum(sum(map(nbytes, group)) for file, group in groups.items() if file not in shared))
    weight_map: dict[str, str] = {}
    files: dict[str, FileRecord] = {}
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(1) as aside:
        syncing = []
        for number, (file, group) in enumerate(groups.items(), start=1):
            single = len(groups) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            if file in ways:
                transfer(file, folder / name, ways[file])
                progress(sum(map(nbytes, group)))
                files[name] = sampled(file)
            else:
                values = _values(group, source, compute)
                hashes |= write_safetensors(folder / name, group, reporting(values, progress))
                syncing.append(aside.submit(sync_file, folder / name))  # while the next one is written
                files[name] = sampled(folder / name)
                if file:
                    source.release(file)
            _check_written(folder / name, group, file)
            weight_map |= dict.fromkeys((step.name for step in group), name)
        for waiting in syncing:
            waiting.result()
    if len(groups) > 1:
        total = sum(nbytes(step) for group in groups.values() for step in group)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
        files[INDEX] = record_of_text(text)
    return Written(files, hashes)


def bytes_linked(plan: Plan, source: Checkpoint) -> int:
    """Return the bytes of the plan that need not be written, because their source file is unchanged."""
    groups: dict[Path, list[Step]] = {}
    for step in plan.steps:
        if step.kind.in_place:
            groups.setdefault(source.header(step.sources[0]).file, []).append(step)
    return sum(sum(map(nbytes, g)) for file, g in groups.items() if _untouched(file, g, source))


def side_records(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Record all files in and below a folder that are not yet known, by their names relative to it."""
    found = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return {name: whole(file) for name, file in found.items() if name not in known}


def record_of_text(text: str) -> FileRecord:
    """Return the record of a file with this text."""
    return FileRecord(size=len(text.encode()), sha256=sha256(text.encode()).hexdigest())


def hashed_files(tower: TowerHeader) -> list[Path]:
    """Return the files of a tower whose hashes are recorded: weights, and the configurations next to them."""
    folder = tower.source
    texts = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return list(dict.fromkeys([*tower.files, *texts]))


def _update_generation(file: Path, plan: Plan) -> None:
    if plan.generation:
        source = read_json(file) if file.is_file() else {}
        file.write_text(json.dumps({**source, **plan.generation}, indent=2) + "\n", encoding="utf-8")


def _untouched(file: Path, group: list[Step], source: TensorSource) -> bool:
    held = {header.name for header in source.tensors.values() if header.file == file}
    kept = {step.name for step in group if step.kind.in_place}
    return bool(held) and kept == held and is_safetensors(file)


def _home(step: Step, source: TensorSource) -> Path | None:
    """Return the source file that a tensor's file replaces; None for the tower and for tensors without source."""
    stays = step.sources and not step.kind.from_tower
    return source.header(step.sources[0]).file if stays else None


def _values(
    group: list[Step], source: TensorSource, compute: Callable[[list[Step]], Iterable[tuple[Step, Tensor]]]
) -> Iterator[tuple[Step, Tensor | Span]]:
    """Yield the values of steps in order; for an unchanged tensor, its location in its file."""
    known: dict[Path, dict[str, Span]] = {}
    taken: dict[str, Span] = {}
    for step in group:
        header = source.header(step.sources[0]) if step.kind.copies_bytes else None
        if header is None or dtype_name(header.dtype) != step.dtype:
            continue
        if header.file not in known:
            known[header.file] = spans(header.file) if is_safetensors(header.file) else {}
        held, own = known[header.file], step.sources[0]
        while held and own not in held:  # PART/KEY
            own = own.partition("/")[2]
        if held:
            taken[step.name] = held[own]
    computed = iter(compute([step for step in group if step.name not in taken]))
    for step in group:
        yield (step, taken[step.name]) if step.name in taken else next(computed)


def reporting(
    tensors: Iterable[tuple[Step, Tensor | Span]], progress: Callable[[int], None]
) -> Iterator[tuple[Step, Tensor | Span]]:
    """Yield the tensors, and call ``progress`` with the number of bytes of each."""
    for step, tensor in tensors:
        yield step, tensor
        progress(nbytes(step))


def _check_written(path: Path, steps: list[Step], source: Path | None) -> None:
    """Read the header back: names, dtypes and shapes must be those of the plan."""
    try:
        weights = safe_open(path, "np")  # not for torch, see mgll_encoder.weights.weight_file
    except SafetensorError:
        raise truncated(source or path) from None
    with weights:
        views = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    found = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    planned = {step.name: (DTYPE_CODES[step.dtype], step.shape) for step in steps}
    if found != planned:
        raise ValueError(f"{path.name} differs from the plan: {sorted(set(found) ^ set(planned))[:3]}")
