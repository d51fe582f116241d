"""Writes a copy of a checkpoint with some tensors replaced."""

import filecmp
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mgll_encoder.common.errors import UserError
from mllm_adapters.checkpoints.checkpoint import WEIGHT_SUFFIXES, Checkpoint
from mllm_adapters.checkpoints.file_copy import copy_files
from mllm_adapters.checkpoints.fingerprint import FileRecord, whole
from mllm_adapters.checkpoints.locate import PROVENANCE
from mllm_adapters.checkpoints.side_files import published, remove_paths
from mllm_adapters.core.contract import Step
from mllm_adapters.core.planning import copied
from mllm_adapters.core.provenance import SwapRecord, has_record, read_record
from mllm_adapters.swap.apply import new_checkpoint, tell_left_behind, write_weights


def replace_tensors(
    source: Path | Checkpoint,
    out: Path,
    tensors: Mapping[str, Tensor],
    *,
    force: bool = False,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a copy of ``source`` with the values of some tensors replaced.

    Files without any of them are hard-linked; side files and a processor's further tokenizers are copied.

    Args:
        source: Checkpoint folder, or the opened checkpoint.
        out: Folder to write.
        tensors: New values by their names on disk; shape and number stay, dtypes follow the source.
        force: Replace ``out`` if it exists.
        extra_files: Additional files, name -> contents.

    Raises:
        UserError: ``out`` exists, is or contains ``source``, or cannot be written; or ``source`` has no such
            tensor or one of another shape.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    source = checkpoint.folder
    for name, value in tensors.items():
        if name not in checkpoint.tensors:
            raise UserError(f"{source} has no tensor {name}")
        if tuple(value.shape) != checkpoint.tensors[name].shape:
            found, expected = list(value.shape), list(checkpoint.tensors[name].shape)
            raise UserError(f"{source}: the new {name} has shape {found}, expected {expected}")
    steps = [copied(header) for header in checkpoint.tensors.values()]
    steps = [s.model_copy(update={"operation": "trained"}) if s.name in tensors else s for s in steps]

    def compute(group: list[Step]) -> Iterable[tuple[Step, Tensor]]:
        for step in group:
            value = tensors[step.name] if step.name in tensors else checkpoint.read(step.name)
            yield step, value.to(checkpoint.tensors[step.name].dtype)

    with new_checkpoint(out, force, [source]) as partial:
        written = write_weights(partial, checkpoint, steps, compute)
        copy_sides(checkpoint, partial)
        for name, contents in (extra_files or {}).items():
            (partial / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
        if has_record(source):
            record = read_record(source)
            sides = _side_records(record, source, partial)
            record = record.trained_since({n: written.hashes[n] for n in tensors}, {**sides, **written.files})
            (partial / PROVENANCE).write_text(record.dump(), encoding="utf-8")
    return out


def _side_records(record: SwapRecord, source: Path, folder: Path) -> dict[str, FileRecord]:
    """Return records of the recorded side files: the old ones if the files are unchanged, else new ones."""
    records = {}
    for name, known in record.files.items():
        file, before = folder / name, source / name
        if file.is_file() and not name.endswith(WEIGHT_SUFFIXES):
            same = before.is_file() and filecmp.cmp(before, file, shallow=False)
            records[name] = known if same else whole(file)
    return records


def copy_sides(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a checkpoint's side files without local paths, and list the files that are not copied."""
    copy_files(checkpoint.side_files, folder)
    for inner in checkpoint.side_folders:
        (folder / inner.name).mkdir()
        copy_files(published(inner), folder / inner.name)
    remove_paths(folder)
    tell_left_behind(checkpoint)
