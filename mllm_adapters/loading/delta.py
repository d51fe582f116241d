"""A delta: the tensors of a swapped checkpoint that do not follow from its base, and merging them in memory.

``delta_model.safetensors`` contains the tower (unless it is referenced by hash), re-initialized and trained
tensors; ``mgll_delta.json`` is the record of the swap, from which all other tensors are recomputed from the
base. All other files are those of the whole checkpoint, except its weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

from torch import Tensor

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, MismatchError, NotFoundError
from mgll_encoder.common.hub import at_hand
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.weight_file import WeightFile as Weights
from mgll_encoder.weights.weight_file import open_weights
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.fingerprint import agrees
from mllm_adapters.checkpoints.locate import DELTA, check_delta
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import differences
from mllm_adapters.core.provenance import (
    InputRecord,
    SwapRecord,
    TensorRecord,
    find_input,
    mismatch,
    read_as,
)
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.streaming import raw_bytes
from mllm_adapters.core.values import compute

DELTA_WEIGHTS = "delta_model.safetensors"
"""Not a name of weights in transformers: a delta must not load as if it were a checkpoint."""

ENCODER_PART = "encoder"
"""Part name for the tower of a delta that references it by hash."""


class DeltaRecord(SwapRecord):
    """Contents of ``mgll_delta.json``: the record of a swap, whose ``files`` are those of the delta's folder.

    Attributes:
        delta: Version of the delta's additional fields.
        reference_tower: Whether the tower is not stored: the encoder is needed, and identified by its hashes.
        card: README.md of the whole checkpoint; empty if it had none.
    """

    delta: Literal[1] = 1
    reference_tower: bool = False
    card: str = ""

    @property
    def stored(self) -> tuple[TensorRecord, ...]:
        """Return the tensors stored in the delta."""
        names = stored_names(self.tensors, self.trained, reference_tower=self.reference_tower)
        return tuple(tensor for tensor in self.tensors if tensor.name in names)


def stored_names(steps: Iterable[Step], trained: Iterable[str] = (), *, reference_tower: bool) -> set[str]:
    """Return the names of the target tensors that a delta must store.

    Args:
        steps: All target tensors.
        trained: Names of those that were changed after the swap.
        reference_tower: Whether the tower's are recomputed from the encoder.
    """
    made = (s.name for s in steps if not (s.kind.from_base or (reference_tower and s.kind.from_tower)))
    return {*made, *trained}


def is_delta(folder: Path) -> bool:
    """Whether a folder is a delta."""
    return (folder / DELTA).is_file()


def read_delta(folder: Path) -> DeltaRecord:
    """Read the record of a delta.

    Raises:
        UserError: the folder is not a delta, or was damaged or edited.
    """
    check_delta(folder)
    record = read_as(DeltaRecord, folder / DELTA)
    for name, known in record.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadDataError(f"{folder / DELTA}: field 'files' names {name}, which is outside the folder")
        if not (folder / name).is_file():
            raise NotFoundError(f"{folder}: {name} is missing: complete the download")
        if name != DELTA_WEIGHTS and not agrees(known, folder / name):
            raise MismatchError(
                f"{folder}: {name} has been changed: restore it, or `compose()` first "
                "and edit the whole checkpoint"
            )
    return record


@dataclass(frozen=True)
class Delta:
    """An opened delta and its base; no tensor has been read.

    Attributes:
        folder: The delta's folder.
        record: Its record.
        base: The base checkpoint, with its parts attached.
        plan: The swap's plan, with the current paths of base and encoder.
    """

    folder: Path
    record: DeltaRecord
    base: Checkpoint
    plan: Plan

    def values(self, steps: Iterable[Step]) -> Iterator[tuple[Step, Tensor]]:
        """Yield the values of target tensors: stored ones by name, others computed from base and encoder.

        Raises:
            UserError: a stored tensor has been changed.
        """
        steps = list(steps)
        made = compute(self.plan, self.base, [step for step in steps if step.name not in self.stored])
        for step in steps:
            yield (step, self._read(step.name)) if step.name in self.stored else next(made)

    @cached_property
    def stored(self) -> Mapping[str, str | None]:
        """Return the SHA-256 of every stored tensor, by name."""
        return {t.name: self.record.trained.get(t.name, t.sha256) for t in self.record.stored}

    @cached_property
    def _weights(self) -> Weights:
        return open_weights(self.folder / DELTA_WEIGHTS)

    def _read(self, name: str) -> Tensor:
        value = self._weights.read([name])[name]
        if sha256(raw_bytes(value)).hexdigest() != self.stored[name]:
            raise MismatchError(f"{self.folder / DELTA_WEIGHTS}: {name} has been changed: copy it again")
        return value

    def check_weights(self) -> None:
        """Compare names, dtypes and shapes in the delta's weight file with its record.

        Raises:
            UserError: they differ, or the file is damaged.
        """
        for name, found, expected in differences(self._weights.headers, self.record.stored):
            raise MismatchError(
                f"{self.folder / DELTA_WEIGHTS}: {name} is {found}, expected {expected}: copy it again"
            )


def open_delta(folder: Path, base: Path | None = None, parts: Mapping[str, Path] | None = None) -> Delta:
    """Open a delta with its base.

    Args:
        folder: The delta's folder.
        base: The base's folder; if not given, searched for by name and hash next to the delta, in the working
            directory and in the Hugging Face cache.
        parts: Paths of parts of the base that are not found automatically, and of the ``encoder`` of a delta
            without tower.

    Raises:
        UserError: the delta is damaged, or its base or encoder is not found or is another one.
    """
    record = read_delta(folder)
    given = dict(parts or {})
    encoder = given.pop(ENCODER_PART, None)
    if encoder is not None and not record.reference_tower:
        raise InvalidArgumentError(f"{folder} contains its tower: leave the encoder out")
    source = record.inputs.source
    place = base or _found(source, folder, "base", "`compose(mllm=...)`, or load_mllm(BASE, delta=...)")
    checkpoint, _, _ = open_checkpoint(place, given)
    check_base(record, checkpoint, folder)
    attach_parts(checkpoint, record, folder)
    tower = None
    if record.reference_tower and record.inputs.tower:
        named = record.inputs.tower
        tower = (
            at_hand(encoder)
            if encoder
            else _found(
                named,
                folder,
                ENCODER_PART,
                '`compose(encoder=...)`, or load_mllm(..., parts={"encoder": ...})',
            )
        )
        if wrong := mismatch(named, tower):
            raise MismatchError(
                f"{tower} is not the encoder that {folder} was made with ({named.name}): {wrong}"
            )
    config = read_json(folder / "config.json")
    places = {"source": checkpoint.folder, **({"tower": tower} if tower else {})}
    opened = Delta(folder, record, checkpoint, record.plan_with(config, **places))
    opened.check_weights()
    return opened


def check_base(record: SwapRecord, base: Checkpoint, folder: Path) -> None:
    """Refuse a base other than the recorded one, by hashes and samples of its files.

    Raises:
        UserError: it is another one.
    """
    if wrong := mismatch(record.inputs.source, base.folder, sample=True):
        raise MismatchError(
            f"{base.folder} is not the checkpoint that {folder} was made from "
            f"({record.inputs.source.name}): {wrong}"
        )


def attach_parts(base: Checkpoint, record: SwapRecord, folder: Path) -> None:
    """Attach the parts of a base that its tensors come from, as in planning the swap.

    Args:
        base: The base.
        record: The record of the swap.
        folder: The folder made from the base; parts are also searched for next to it.

    Raises:
        UserError: a part is not found, or is another one.
    """
    read = {name.partition("/")[0] for t in record.tensors if not t.kind.from_tower for name in t.sources}
    for part, known in record.inputs.parts.items():
        if part not in read:
            continue
        path = base.find(part) or _recorded_place(base, known.place)
        path = path or find_input(known, base.folder) or find_input(known, folder)
        if path is None:
            raise NotFoundError(
                f"{folder} needs a part of its base, {part} ({known.name}), which is not next to it, in the "
                f"working directory or in the Hugging Face cache: pass `parts['{part}']=PATH`"
            )
        if wrong := mismatch(known, path, sample=True):
            raise MismatchError(
                f"{path} is not the {part} that {folder} was made with ({known.name}): {wrong}"
            )
        base.attach(part, path)


def _recorded_place(base: Checkpoint, place: str | None) -> Path | None:
    around = (base.folder, base.folder.absolute().parent) if place else ()
    return next((folder / place for folder in around if place and (folder / place).exists()), None)


def _found(record: InputRecord, folder: Path, what: str, how: str) -> Path:
    """Find a recorded input automatically."""
    if found := find_input(record, folder):
        return found
    beside = folder.absolute().parent / record.name
    other = f" ({beside} is another one: {mismatch(record, beside)})" if beside.exists() else ""
    raise NotFoundError(
        f"{folder}: its {what} {record.name} is not next to it, in the working directory or in the Hugging "
        f"Face cache{other}: pass its path ({how})"
    )
