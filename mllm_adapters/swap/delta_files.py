"""Writes deltas, from a plan or a whole checkpoint, and merges deltas into whole checkpoints."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from torch import Tensor

from mgll_encoder.common.errors import InvalidArgumentError, MismatchError
from mgll_encoder.common.progress import counting
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.file_copy import check_space
from mllm_adapters.checkpoints.fingerprint import FileRecord, sampled
from mllm_adapters.checkpoints.locate import DELTA, PROVENANCE
from mllm_adapters.checkpoints.side_files import is_published
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import differences
from mllm_adapters.core.provenance import SwapRecord, read_record
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.streaming import nbytes, raw_bytes, write_safetensors
from mllm_adapters.core.values import compute
from mllm_adapters.loading.delta import (
    DELTA_WEIGHTS,
    Delta,
    DeltaRecord,
    attach_parts,
    check_base,
    stored_names,
)
from mllm_adapters.loading.load import check_complete
from mllm_adapters.swap.card import CARD
from mllm_adapters.swap.restore import vision_tensors
from mllm_adapters.swap.writer import (
    CONFIG,
    Written,
    copy_sides,
    published_config,
    reporting,
    write_checkpoint,
    write_weights,
)

NOTICE = """
> **A delta, not a whole checkpoint.** It contains {held} of the model described below; everything else comes from its
> base, `{base}`{encoder}. `from mllm_adapters import load_mllm; load_mllm(BASE, delta=THIS_FOLDER)` merges the two in
> memory, `swap-encoder compose --mllm BASE --delta THIS_FOLDER --out FOLDER` on disk. Its contents, and the hashes of
> base and encoder: `{record}`.
"""


def stored_alone(
    plan: Plan,
    checkpoint: Checkpoint,
    fitted: Mapping[str, Tensor] | None = None,
    *,
    reference_tower: bool = False,
) -> dict[str, Any]:
    """Return the arguments of `apply_plan` for writing a delta instead of a whole checkpoint.

    Args:
        plan: Plan of the whole checkpoint.
        checkpoint: The plan's source.
        fitted: See `apply_plan`.
        reference_tower: Reference the tower by its hashes instead of storing it.
    """
    names = stored_names(plan.steps, reference_tower=reference_tower)
    steps = [step for step in plan.steps if step.name in names]
    values = compute(plan, checkpoint, steps, fitted)
    return {
        "weights": partial(_write_stored, steps=steps, values=values),
        "records": partial(_records, reference_tower=reference_tower),
    }


def extract(
    folder: Path,
    base: Path,
    out: Path,
    *,
    parts: Mapping[str, Path] | None = None,
    reference_tower: bool = False,
    force: bool = False,
) -> Path:
    """Extract a delta from a whole checkpoint, retrained or not.

    Args:
        folder: A checkpoint of ``swap-encoder``, retrained with ``retrain-projector`` or not.
        base: Its base checkpoint.
        out: Folder to write.
        parts: Paths of parts of the base, as for a swap.
        reference_tower: Reference the tower by its hashes instead of storing it, unless it was trained.
        force: Replace ``out`` if it exists.

    Raises:
        UserError: ``base`` is another checkpoint, tensors other than tower, connector and trained ones
            differ from the base, or ``out`` cannot be written.
    """
    record = read_record(folder)
    if reference_tower and record.inputs.tower is None:
        raise InvalidArgumentError(f"{folder} has no encoder to refer to: leave `reference_tower` out")
    whole = Checkpoint(folder)
    for name, found, planned in differences(whole.tensors, record.tensors):
        raise MismatchError(
            f"{folder}: {name} is {found}, but the swap wrote {planned}: a delta keeps names, dtypes and shapes"
        )
    source, _, _ = open_checkpoint(base, parts)
    check_base(record, source, folder)
    attach_parts(source, record, folder)
    record = _with_changes(record, whole, source)
    names = stored_names(record.tensors, record.trained, reference_tower=reference_tower)
    steps = [step for step in record.tensors if step.name in names]
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    values = ((step, whole.read(step.name)) for step in steps)
    return write_checkpoint(
        out,
        config=published_config(whole.config, whole.config_bytes),
        weights=partial(_write_stored, steps=steps, values=values),
        sides=partial(copy_sides, whole, without=(PROVENANCE, CARD)),
        records=lambda written: _records(
            record.model_copy(update={"files": written.files}), text, reference_tower=reference_tower
        ),
        force=force,
        inputs=[folder, base, *source.parts.values()],
    )


def compose(
    delta: Delta,
    out: Path,
    *,
    force: bool = False,
    copy: bool = False,
) -> Path:
    """Merge a delta into its base, and write the whole checkpoint.

    Args:
        delta: The delta, opened with its base.
        out: Folder to write.
        force: Replace ``out`` if it exists.
        copy: Copy unchanged files instead of hard-linking them.

    Raises:
        UserError: the delta is damaged, or ``out`` cannot be written.
    """
    plan, record = delta.plan, delta.record
    check_complete(plan)
    steps = [_given(step) if step.name in delta.stored else step for step in plan.steps]
    tower = [plan.tower] if record.reference_tower and plan.tower else []

    def sides(folder: Path) -> None:
        for name in record.files.keys() - {DELTA_WEIGHTS, CONFIG}:
            if is_published(delta.folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(delta.folder / name, folder / name)

    def records(written: Written) -> dict[str, str]:
        card = {CARD: record.card} if record.card else {}
        return {PROVENANCE: _whole_record(record, written.files, written.hashes).dump(), **card}

    return write_checkpoint(
        out,
        config=published_config(plan.config, (delta.folder / CONFIG).read_bytes()),
        weights=partial(write_weights, source=delta.base, steps=steps, compute=delta.values, copy=copy),
        sides=sides,
        records=records,
        force=force,
        inputs=[delta.folder, delta.base.folder, *tower, *delta.base.parts.values()],
    )


def _write_stored(
    folder: Path,
    steps: Sequence[Step],
    values: Iterable[tuple[Step, Tensor]],
) -> Written:
    """Write the weight file of a delta."""
    total = sum(map(nbytes, steps))
    check_space(folder, total)
    file = folder / DELTA_WEIGHTS
    with counting("Writing", total, in_bytes=True) as advance:
        hashes = write_safetensors(file, steps, reporting(values, advance))
    return Written({DELTA_WEIGHTS: sampled(file)}, hashes)


def _records(record: SwapRecord, card: str, *, reference_tower: bool) -> dict[str, str]:
    """Make the record and the card of a delta from those of the whole checkpoint."""
    fields = {name: getattr(record, name) for name in SwapRecord.model_fields}
    delta = DeltaRecord(**fields, reference_tower=reference_tower, card=card)
    return {DELTA: delta.dump(), CARD: _delta_card(delta)}


def _whole_record(
    record: DeltaRecord, files: Mapping[str, FileRecord], hashes: Mapping[str, str]
) -> SwapRecord:
    """Return the record of the whole checkpoint."""
    fields = {name: getattr(record, name) for name in SwapRecord.model_fields}
    tensors = [
        t if t.sha256 or t.name in record.trained else t.model_copy(update={"sha256": hashes.get(t.name)})
        for t in record.tensors
    ]
    return SwapRecord(**{**fields, "files": dict(files), "tensors": tuple(tensors)})


def _delta_card(record: DeltaRecord) -> str:
    """Make a delta's README.md: that of the whole checkpoint, with another library and a notice."""
    inputs = record.inputs
    notice = NOTICE.format(
        held=f"{len(record.stored)} tensors ({decimal(sum(map(nbytes, record.stored)))})",
        base=inputs.source.name,
        encoder=f" and the encoder `{inputs.tower.name}`" if record.reference_tower and inputs.tower else "",
        record=DELTA,
    )
    fields, rest = re.match(r"(?s)(---\n.*?\n---\n)?(.*)", record.card).groups("")  # type: ignore[union-attr]
    library = "library_name: mgll-mllm\nbase_model_relation: adapter"
    return fields.replace("library_name: transformers", library) + notice + rest


def _given(step: Step) -> Step:
    """Return a step whose value comes from the delta, without bytes of the base."""
    return step.model_copy(update={"operation": "trained"}) if step.kind.copies_bytes else step


def _with_changes(record: SwapRecord, checkpoint: Checkpoint, base: Checkpoint) -> SwapRecord:
    """Return the record with the hashes of all tensors that changed after the swap.

    Raises:
        UserError: one of them is not part of tower or connector, and no recorded training changed it.
    """
    plan = record.plan_with(checkpoint.config, source=base.folder)
    changed: dict[str, str] = {}
    with counting("Comparing", sum(map(nbytes, record.tensors)), in_bytes=True) as advance:
        for tensor in record.tensors:
            known = record.trained.get(tensor.name, tensor.sha256)
            if not (known or (tensor.kind.copies_bytes and _one_file(tensor, checkpoint, base))):
                known = _hash(next(compute(plan, base, [tensor]))[1])
            if known and (now := _hash(checkpoint.read(tensor.name))) != known:
                changed[tensor.name] = now
            advance(nbytes(tensor))
    follows = {t.name for t in record.tensors if t.kind.from_base} - record.trained.keys()
    if foreign := follows & changed.keys():
        foreign -= vision_tensors(checkpoint, record)
    if foreign:
        first = next(t.name for t in record.tensors if t.name in foreign)
        raise MismatchError(
            f"{checkpoint.folder}: {len(foreign)} tensors differ from {base.folder}, although they are not "
            f"part of tower or connector and no recorded training changed them, first {first}: this cannot "
            "be a delta; keep the whole checkpoint"
        )
    return record.model_copy(update={"trained": {**record.trained, **changed}})


def _one_file(tensor: Step, checkpoint: Checkpoint, base: Checkpoint) -> bool:
    """Whether a tensor is in a file that a checkpoint shares with its base."""
    return base.header(tensor.sources[0]).file.samefile(checkpoint.header(tensor.name).file)


def _hash(value: Tensor) -> str:
    return sha256(raw_bytes(value)).hexdigest()
