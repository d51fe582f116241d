"""Writes checkpoint folders from any source: weights, side files, and records of both.

A folder is written under a hidden name and renamed at the end. Weights are written shard by shard, tensor by
tensor; unchanged source files are hard-linked.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgll_encoder.common.errors import OutputTakenError, StorageError
from mgll_encoder.common.files import appearing, check_free, new_folder, sync_file
from mgll_encoder.common.local_paths import without_local
from mgll_encoder.common.progress import counting
from mgll_encoder.weights.spans import Span, spans, truncated
from mgll_encoder.weights.weight_file import is_safetensors
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.checkpoints.file_copy import best_way, check_space, copy_files, transfer
from mllm_adapters.checkpoints.fingerprint import FileRecord, sampled, whole
from mllm_adapters.checkpoints.side_files import json_bytes, published, remove_paths
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import dtype_name
from mllm_adapters.core.streaming import DTYPE_CODES, nbytes, write_safetensors

_logger = logging.getLogger(__name__)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

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

    files: dict[str, FileRecord] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def write_checkpoint(
    out: Path,
    *,
    config: bytes,
    weights: Callable[[Path], Written],
    sides: Callable[[Path], None] = lambda _: None,
    files: Mapping[str, str | bytes] | None = None,
    records: Callable[[Written], Mapping[str, str]] | None = None,
    force: bool = False,
    inputs: Iterable[Path] = (),
    config_name: str = CONFIG,
) -> Path:
    """Write a checkpoint folder that appears when it is complete.

    Args:
        out: Folder to write.
        config: Contents of its config.json.
        weights: Writes the weight files into a folder.
        sides: Writes the side files into a folder; local paths are then removed from them.
        files: Additional files, contents by name.
        records: Makes names and texts of the provenance files from the records of the other files.
        force: Replace ``out`` if it exists.
        inputs: The checkpoint's inputs; ``out`` must not be or contain any of them.
        config_name: Name of the file without which the folder does not load.

    Raises:
        UserError: ``out`` exists, is or contains an input, or cannot be written; or an argument raises it.
    """
    check_output(out, force, inputs)
    try:
        with new_folder(out, force) as folder:
            written = weights(folder)
            sides(folder)
            remove_paths(folder)
            _write_files(folder, files or {})
            if records is not None:
                found = {**_side_records(folder, written.files), CONFIG: _record_of(config), **written.files}
                _write_files(folder, records(Written(found, written.hashes)))
            # Last, so that a folder left behind by a kill is not a checkpoint; `new_folder` syncs to disk.
            with appearing(folder / config_name) as file:
                file.write_bytes(config)
    except OSError as error:
        where = error.filename or out
        raise StorageError(f"{out} cannot be written ({where}: {error.strerror or error})") from error
    return out


def published_config(content: Mapping[str, Any], raw: bytes) -> bytes:
    """Return a config.json (parsed and raw) without local paths."""
    cleaned = without_local(content)
    return raw if cleaned == content else json_bytes(cleaned)


def copy_sides(checkpoint: Checkpoint, folder: Path, *, without: Iterable[str] = ()) -> None:
    """Copy a checkpoint's side files except config.json, and list the files that are not copied.

    Args:
        checkpoint: The checkpoint.
        folder: Target folder.
        without: Names of files to skip.
    """
    unwanted = {CONFIG, *without}
    copy_files((file for file in checkpoint.side_files if file.name not in unwanted), folder)
    for inner in checkpoint.side_folders:
        (folder / inner.name).mkdir()
        copy_files(published(inner), folder / inner.name)
    tell_left_behind(checkpoint)


def tell_left_behind(checkpoint: Checkpoint) -> None:
    """List the files of a checkpoint's folder that are not copied to the output."""
    if names := checkpoint.left_behind:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        _logger.info(
            f"not copied from {checkpoint.folder}, because not part of a model: "
            f"{', '.join(names[:_NAMED])}{more}"
        )


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


def write_weights(
    folder: Path,
    source: TensorSource,
    steps: Iterable[Step],
    compute: Callable[[list[Step]], Iterable[tuple[Step, Tensor]]],
    *,
    copy: bool = False,
) -> Written:
    """Write shards and their index; unchanged source files are hard-linked.

    Args:
        folder: Existing folder to write into.
        source: Checkpoint that kept tensors come from.
        steps: Every tensor of the target.
        compute: Computes the values of the given steps.
        copy: Copy such files instead (see `mllm_adapters.checkpoints.file_copy.best_way`).

    Raises:
        UserError: there is not enough disk space.
    """
    groups: dict[Path | None, list[Step]] = {}
    for step in steps:
        groups.setdefault(_home(step, source), []).append(step)
    whole_files = [file for file, group in groups.items() if file and untouched(file, group, source)]
    ways = {file: best_way(file, folder, copy=copy) for file in whole_files}
    shared = {file for file, way in ways.items() if way != "copy"}
    sizes = {file: sum(map(nbytes, group)) for file, group in groups.items()}
    check_space(folder, sum(size for file, size in sizes.items() if file not in shared))
    total = sum(sizes.values())
    weight_map: dict[str, str] = {}
    files: dict[str, FileRecord] = {}
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(1) as aside, counting("Writing", total, in_bytes=True) as advance:
        syncing = []
        for number, (file, group) in enumerate(groups.items(), start=1):
            single = len(groups) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            if file in ways:
                transfer(file, folder / name, ways[file])
                advance(sizes[file])
                files[name] = sampled(file)
            else:
                values = _values(group, source, compute)
                hashes |= write_safetensors(folder / name, group, reporting(values, advance))
                syncing.append(aside.submit(sync_file, folder / name))  # while the next one is written
                files[name] = sampled(folder / name)
                if file:
                    source.release(file)
            _check_written(folder / name, group, file)
            weight_map |= dict.fromkeys((step.name for step in group), name)
        for waiting in syncing:
            waiting.result()
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
        files[INDEX] = _record_of(text.encode())
    return Written(files, hashes)


def _write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, contents in files.items():
        (folder / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)


def _side_records(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Record all files in and below a folder that are not yet known, by their names relative to it."""
    found = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return {name: whole(file) for name, file in found.items() if name not in known}


def _record_of(contents: bytes) -> FileRecord:
    return FileRecord(size=len(contents), sha256=sha256(contents).hexdigest())


def untouched(file: Path, group: list[Step], source: TensorSource) -> bool:
    """Whether a weight file is unchanged: its steps keep all of its tensors."""
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
    tensors: Iterable[tuple[Step, Tensor | Span]], advance: Callable[[int], None]
) -> Iterator[tuple[Step, Tensor | Span]]:
    """Yield the tensors, and call ``advance`` with the number of bytes of each."""
    for step, tensor in tensors:
        yield step, tensor
        advance(nbytes(step))


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
