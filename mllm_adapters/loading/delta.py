"""A delta: of a swapped checkpoint only what does not follow from its base, and the two put together in memory.

``delta_model.safetensors`` holds the tower (or not, where it is named by hash), what was re-initialised and what was
trained; ``mgll_delta.json`` the record of the swap, from which everything else is made anew out of the base. All other
files are those of the whole checkpoint, but for its weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

from torch import Tensor

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.hub import at_hand
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.weight_file import WeightFile as Weights
from mgll_encoder.weights.weight_file import open_weights
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.fingerprint import agrees
from mllm_adapters.checkpoints.locate import DELTA, check_delta
from mllm_adapters.core.contract import Plan, Step
from mllm_adapters.core.planning import dtype_name
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
"""No name under which transformers looks for weights: a delta must not load as if it were a checkpoint."""

ENCODER_PART = "encoder"
"""The tower of a delta that names it by hash, among the parts that a user says the place of."""


class DeltaRecord(SwapRecord):
    """Contents of ``mgll_delta.json``: the record of a swap, whose ``files`` are those of the delta's folder.

    Attributes:
        delta: Version of what a delta adds.
        reference_tower: Whether the tower is not stored: the encoder is needed, and told by its hashes.
        card: README.md of the whole checkpoint; empty if it had none.
    """

    delta: Literal[1] = 1
    reference_tower: bool = False
    card: str = ""

    @property
    def stored(self) -> tuple[TensorRecord, ...]:
        """The tensors that the delta holds."""
        names = stored_names(self.tensors, self.trained, reference_tower=self.reference_tower)
        return tuple(tensor for tensor in self.tensors if tensor.name in names)


def stored_names(steps: Iterable[Step], trained: Iterable[str] = (), *, reference_tower: bool) -> set[str]:
    """Names of the target tensors that a delta must hold.

    Args:
        steps: All target tensors.
        trained: Names of those that were given other values since the swap.
        reference_tower: Whether the tower's are made from the encoder again.
    """
    made = (s.name for s in steps if not (s.kind.from_base or (reference_tower and s.kind.from_tower)))
    return {*made, *trained}


def is_delta(folder: Path) -> bool:
    """Whether a folder is a delta."""
    return (folder / DELTA).is_file()


def read_delta(folder: Path) -> DeltaRecord:
    """The record of a delta.

    Raises:
        UserError: the folder is none, or was damaged or edited.
    """
    check_delta(folder)
    record = read_as(DeltaRecord, folder / DELTA)
    for name, known in record.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / DELTA}: field 'files' names {name}, which lies outside the folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing: complete the download")
        if name != DELTA_WEIGHTS and not agrees(known, folder / name):
            raise UserError(
                f"{folder}: {name} is not the file that was written: put that back, or compose first "
                "(swap-encoder compose) and edit the whole checkpoint"
            )
    return record


@dataclass(frozen=True)
class Delta:
    """A delta and its base, opened; no tensor has been read.

    Attributes:
        folder: The delta's folder.
        record: Its record.
        base: The checkpoint that it is a delta of, with its parts attached.
        plan: The swap's plan, with the places where base and encoder lie now.
    """

    folder: Path
    record: DeltaRecord
    base: Checkpoint
    plan: Plan

    def values(self, steps: Iterable[Step]) -> Iterator[tuple[Step, Tensor]]:
        """The values of target tensors, one at a time: stored ones by name, others made from base and encoder.

        Raises:
            UserError: a stored tensor is not what was written.
        """
        steps = list(steps)
        made = compute(self.plan, self.base, [step for step in steps if step.name not in self.stored])
        for step in steps:
            yield (step, self._read(step.name)) if step.name in self.stored else next(made)

    @cached_property
    def stored(self) -> Mapping[str, str | None]:
        """SHA-256 of every stored tensor, by name."""
        return {t.name: self.record.trained.get(t.name, t.sha256) for t in self.record.stored}

    @cached_property
    def _weights(self) -> Weights:
        return open_weights(self.folder / DELTA_WEIGHTS)

    def _read(self, name: str) -> Tensor:
        value = self._weights.read([name])[name]
        if sha256(raw_bytes(value)).hexdigest() != self.stored[name]:
            raise UserError(f"{self.folder / DELTA_WEIGHTS}: {name} is not what was written: copy it again")
        return value

    def check_weights(self) -> None:
        """Hold names, dtypes and shapes in the delta's weight file against its record.

        Raises:
            UserError: they differ, or the file is damaged.
        """
        found = {
            name: (dtype_name(header.dtype), tuple(header.shape))
            for name, header in self._weights.headers.items()
        }
        expected = {t.name: (t.dtype, t.shape) for t in self.record.stored}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"{self.folder / DELTA_WEIGHTS}: {name} is {found.get(name, 'absent')}, expected "
                    f"{expected.get(name, 'absent')}: copy it again"
                )


def open_delta(folder: Path, base: Path | None = None, parts: Mapping[str, Path] | None = None) -> Delta:
    """A delta with its base.

    Args:
        folder: The delta's folder.
        base: The base's folder; looked for by name and hash beside the delta, here and in the Hugging Face cache if
            not given.
        parts: Where parts of the base lie that are not found by themselves, and the ``encoder`` of a delta that does
            not hold its tower.

    Raises:
        UserError: the delta is damaged, or its base or its encoder is not at hand or is another one.
    """
    record = read_delta(folder)
    given = dict(parts or {})
    encoder = given.pop(ENCODER_PART, None)
    if encoder is not None and not record.reference_tower:
        raise UserError(f"{folder} holds its tower: leave the encoder out")
    source = record.inputs.source
    place = base or _found(
        source, folder, "base", "swap-encoder compose --mllm, or load_mllm(BASE, delta=...)"
    )
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
                'swap-encoder compose --encoder, or load_mllm(..., parts={"encoder": ...})',
            )
        )
        if wrong := mismatch(named, tower):
            raise UserError(f"{tower} is not the encoder that {folder} was made with ({named.name}): {wrong}")
    config = read_json(folder / "config.json")
    places = {"source": checkpoint.folder, **({"tower": tower} if tower else {})}
    opened = Delta(folder, record, checkpoint, record.plan_with(config, **places))
    opened.check_weights()
    return opened


def check_base(record: SwapRecord, base: Checkpoint, folder: Path) -> None:
    """Refuse a base that is not the one that something was made of, by hashes and samples of its files.

    Raises:
        UserError: it is another one.
    """
    if wrong := mismatch(record.inputs.source, base.folder, sample=True):
        raise UserError(
            f"{base.folder} is not the checkpoint that {folder} was made of ({record.inputs.source.name}): {wrong}"
        )


def attach_parts(base: Checkpoint, record: SwapRecord, folder: Path) -> None:
    """Make the parts of a base readable that its tensors come from, as planning the swap did.

    Args:
        base: The base.
        record: The record of the swap.
        folder: What was made of the base; parts are looked for beside it, too.

    Raises:
        UserError: one is not found, or is another one.
    """
    read = {name.partition("/")[0] for t in record.tensors if not t.kind.from_tower for name in t.sources}
    for part, known in record.inputs.parts.items():
        if part not in read:
            continue
        path = base.find(part) or _recorded_place(base, known.place)
        path = path or find_input(known, base.folder) or find_input(known, folder)
        if path is None:
            raise UserError(
                f"{folder} needs a part of its base, {part} ({known.name}), which lies neither beside it, nor here, "
                f"nor in the Hugging Face cache: say where it is with --part {part}=PATH"
            )
        if wrong := mismatch(known, path, sample=True):
            raise UserError(f"{path} is not the {part} that {folder} was made with ({known.name}): {wrong}")
        base.attach(part, path)


def _recorded_place(base: Checkpoint, place: str | None) -> Path | None:
    around = (base.folder, base.folder.absolute().parent) if place else ()
    return next((folder / place for folder in around if place and (folder / place).exists()), None)


def _found(record: InputRecord, folder: Path, what: str, how: str) -> Path:
    """What a record names, where it is found by itself."""
    if found := find_input(record, folder):
        return found
    beside = folder.absolute().parent / record.name
    other = f" ({beside} is another one: {mismatch(record, beside)})" if beside.exists() else ""
    raise UserError(
        f"{folder}: its {what} {record.name} is neither beside it, nor here, nor in the Hugging Face cache{other}: say "
        f"where it is ({how})"
    )
