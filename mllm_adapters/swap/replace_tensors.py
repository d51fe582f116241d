"""Writes a copy of a checkpoint with some tensors replaced."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from mgll_encoder.common.errors import BadDataError, MismatchError
from mllm_adapters.checkpoints.checkpoint import WEIGHT_SUFFIXES, Checkpoint
from mllm_adapters.checkpoints.fingerprint import FileRecord, whole
from mllm_adapters.checkpoints.locate import PROVENANCE
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied
from mllm_adapters.core.provenance import has_record, read_record
from mllm_adapters.swap.writer import (
    Written,
    copy_sides,
    published_config,
    write_checkpoint,
    write_weights,
)


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
            raise BadDataError(f"{source} has no tensor {name}")
        if tuple(value.shape) != checkpoint.tensors[name].shape:
            found, expected = list(value.shape), list(checkpoint.tensors[name].shape)
            raise MismatchError(f"{source}: the new {name} has shape {found}, expected {expected}")
    steps = [copied(header) for header in checkpoint.tensors.values()]
    steps = [s.model_copy(update={"operation": "trained"}) if s.name in tensors else s for s in steps]

    def compute(group: list[Step]) -> Iterable[tuple[Step, Tensor]]:
        for step in group:
            value = tensors[step.name] if step.name in tensors else checkpoint.read(step.name)
            yield step, value.to(checkpoint.tensors[step.name].dtype)

    return write_checkpoint(
        out,
        config=published_config(checkpoint.config, checkpoint.config_bytes),
        weights=partial(write_weights, source=checkpoint, steps=steps, compute=compute),
        sides=partial(copy_sides, checkpoint),
        files=extra_files,
        records=partial(_records, source, tensors) if has_record(source) else None,
        force=force,
        inputs=[source],
    )


def _records(source: Path, trained: Iterable[str], written: Written) -> dict[str, str]:
    """Return the record of a checkpoint with the hashes of the trained tensors.

    An unchanged side file keeps its old record, so that earlier edits remain detectable.
    """
    record, found = read_record(source), written.files
    kept = {name for name in record.files.keys() & found.keys() if not name.endswith(WEIGHT_SUFFIXES)}
    sides = {
        n: known if _is(source / n, found[n]) else found[n] for n, known in record.files.items() if n in kept
    }
    weights = {name: file for name, file in found.items() if name.endswith(WEIGHT_SUFFIXES)}
    hashes = {name: written.hashes[name] for name in trained}
    return {PROVENANCE: record.trained_since(hashes, {**sides, **weights}).dump()}


def _is(file: Path, record: FileRecord) -> bool:
    return file.is_file() and whole(file) == record
