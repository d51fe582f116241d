"""``mgll_swap.json``: the inputs of a checkpoint, how it was made, and hashes of its tensors.

It is published with the checkpoint, so it contains names and hashes, but no local paths.
"""

import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.hub import cached, hub_id_of
from mgll_encoder.common.texts import checked, first_fault, read_json
from mgll_encoder.tower.spec import TowerSpec
from mgll_encoder.weights.weight_file import FOLDER_FILES
from mllm_adapters.checkpoints.checkpoint import WEIGHTS, Checkpoint
from mllm_adapters.checkpoints.data import Data
from mllm_adapters.checkpoints.fingerprint import FileRecord, agrees, sample_hash, sampled, whole
from mllm_adapters.checkpoints.locate import PROVENANCE, check_swapped
from mllm_adapters.core.contract import Dropped, Plan
from mllm_adapters.core.operations import Step

_PACKAGES = ("mgll-mllm", "torch", "transformers", "safetensors")


class InputRecord(Data):
    """A file or folder that the checkpoint was made from.

    Attributes:
        name: Its name, without its parent folder.
        hub_id: Its hub id, if it was in a Hugging Face cache.
        revision: The commit there.
        files: Its files that were read, by name: full hashes for the tower and configurations, samples for a
            language model's shards (`mllm_adapters.checkpoints.fingerprint`).
        place: For a part, its path relative to the source's folder or, if it is outside, to that folder's
            parent.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    files: dict[str, FileRecord]
    place: str | None = None


class TensorRecord(Step):
    """A step of the plan with the hash of the tensor that it made.

    Attributes:
        sha256: Of the written tensor; None if its bytes were copied without reading.
    """

    sha256: str | None = None


class Inputs(Data):
    """All inputs."""

    source: InputRecord
    tower: InputRecord | None = None
    parts: dict[str, InputRecord] = Field(default_factory=dict)


class SwapRecord(Data):
    """Contents of ``mgll_swap.json``.

    Attributes:
        format: Version of this format.
        versions: Package versions.
        inputs: What the checkpoint was made from.
        tower_spec: The tower's own contract, before it was adapted to the host.
        plan: The plan without its tensors: family, layouts, vision contract before and after, fates of the
            connectors, notes.
        files: The written files of the checkpoint, except the card and this file.
        dropped: Dropped source tensors.
        trained: SHA-256 of tensors that were trained after the swap, by name.
        tensors: All tensors, with the operation that made each.
    """

    format: Literal[3] = 3
    versions: dict[str, str]
    inputs: Inputs
    tower_spec: TowerSpec | None = None
    plan: dict[str, Any]
    files: dict[str, FileRecord]
    dropped: tuple[Dropped, ...] = ()
    trained: dict[str, str] = Field(default_factory=dict)
    tensors: tuple[TensorRecord, ...]

    def plan_with(self, config: Mapping[str, Any], **places: Path | None) -> Plan:
        """Reconstruct the plan.

        Args:
            config: The checkpoint's config.json.
            places: Paths of ``source`` and ``tower``; only their names if not given.
        """
        steps = tuple(Step(**tensor.model_dump(exclude={"sha256"})) for tensor in self.tensors)
        return Plan(**{**self.plan, **places}, steps=steps, dropped=self.dropped, config=dict(config))

    def trained_since(self, hashes: Mapping[str, str], files: Mapping[str, FileRecord]) -> "SwapRecord":
        """Return the record of the same checkpoint after training.

        Args:
            hashes: SHA-256 of the trained tensors, by name.
            files: Records of its current files.
        """
        return self.model_copy(update={"trained": {**self.trained, **hashes}, "files": dict(files)})

    def dump(self) -> str:
        """Return the text of the file, with one tensor per line."""
        fields = self.model_dump(mode="json", exclude={"tensors", "dropped"})
        body = json.dumps(fields, indent=2, ensure_ascii=False).removesuffix("\n}")
        for name in ("dropped", "tensors"):
            rows = [row.model_dump_json(exclude_defaults=True) for row in getattr(self, name)]
            body += f',\n  "{name}": [\n    ' + ",\n    ".join(rows) + "\n  ]"
        return body + "\n}\n"


def has_record(folder: Path) -> bool:
    """Whether a folder has a record of a swap."""
    return (folder / PROVENANCE).is_file()


def read_record(folder: Path) -> SwapRecord:
    """Read the record of a checkpoint written by ``swap-encoder``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    check_swapped(folder)
    return read_as(SwapRecord, folder / PROVENANCE)


def alignment_of(folder: Path) -> dict[str, Any] | None:
    """Return how well each connector layer of a checkpoint was fitted on images (`docs/alignment.md`).

    Returns:
        ``used`` and ``held_out`` images, ``tokens``, and the fits of the ``connectors``; None without an alignment.

    Raises:
        UserError: the record is damaged, or of another version.
    """
    found = read_record(folder).plan.get("alignment") if has_record(folder) else None
    return found if isinstance(found, dict) else None


Record = TypeVar("Record", bound=SwapRecord)


def read_as(kind: type[Record], file: Path) -> Record:
    """Read a record of this kind from a file that exists.

    Raises:
        UserError: it is of another version, or cannot be read.
    """
    content = read_json(file)
    if content.get("format") != 3:
        found = f"is {content['format']!r}" if "format" in content else "is missing"
        raise BadDataError(f"{file}: field 'format' {found}, expected 3: swap again with this version")
    advice = "the file was edited or damaged"
    record = checked(kind, content, str(file), advice)
    try:
        record.plan_with({})
    except ValidationError as error:
        raise BadDataError(f"{file}: {first_fault(error, 'plan')}; {advice}") from None
    return record


def record_of(
    plan: Plan,
    checkpoint: Checkpoint,
    tower: InputRecord | None,
    tower_spec: TowerSpec | None,
    files: Mapping[str, FileRecord],
    hashes: Mapping[str, str],
) -> SwapRecord:
    """Make the contents of ``mgll_swap.json``.

    Args:
        plan: The plan that was executed.
        checkpoint: Its source.
        tower: Record of the tower's files.
        tower_spec: The tower's own contract.
        files: Records of the written files.
        hashes: SHA-256 of the computed tensors, by name.
    """
    summary = plan.model_dump(mode="json", exclude={"steps", "dropped", "config"})
    return SwapRecord(
        versions={name: version(name) for name in _PACKAGES},
        inputs=Inputs(
            source=checkpoint_record(checkpoint),
            tower=tower,
            parts={name: _part_record(path, checkpoint.folder) for name, path in plan.parts.items()},
        ),
        tower_spec=tower_spec,
        plan=without_paths(summary, plan),
        files=dict(files),
        dropped=plan.dropped,
        tensors=tuple(TensorRecord(**s.model_dump(), sha256=hashes.get(s.name)) for s in plan.steps),
    )


def checkpoint_record(checkpoint: Checkpoint) -> InputRecord:
    """Record a source checkpoint: its configuration by full hashes, its weights by samples."""
    folder = checkpoint.folder
    texts = [folder / name for name in ("config.json", *WEIGHTS) if name.endswith(".json")]
    extra = [folder / name for name in checkpoint.extra_weights]
    weights = dict.fromkeys([*checkpoint.files, *(file for file in extra if file.is_file())])
    found = {f.name: whole(f) for f in texts if f.is_file()} | {f.name: sampled(f) for f in weights}
    return named(folder, found)


def input_record(path: Path, files: Iterable[Path] | None = None) -> InputRecord:
    """Record a tower or another part.

    Args:
        path: The file or folder.
        files: Files to hash completely; by default, weight files are sampled.
    """
    if files is not None:
        return named(path, {file.name: whole(file) for file in files})
    names = dict.fromkeys(("config.json", *FOLDER_FILES))
    found = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
    return named(path, {f.name: whole(f) if f.suffix == ".json" else sampled(f) for f in found})


def find_input(record: InputRecord, folder: Path) -> Path | None:
    """Find an input of a checkpoint next to it, in the working directory, or in the Hugging Face cache.

    Name and hashes must match.
    """
    places = [folder.absolute().parent / record.name, Path.cwd() / record.name]
    if record.hub_id and (found := cached(record.hub_id)):
        places.insert(0, found)
    return next((place for place in places if place.exists() and is_input(record, place)), None)


def is_input(record: InputRecord, path: Path) -> bool:
    """Whether a file or folder matches a record, by hash."""
    return mismatch(record, path) is None


def mismatch(record: InputRecord, path: Path, *, sample: bool = False) -> str | None:
    """Describe how a file or folder differs from a record; None if it matches, by hash.

    Args:
        record: The record.
        path: The file or folder.
        sample: Compare only samples of files that have samples.
    """
    for name, known in record.files.items():
        file = path / name if path.is_dir() else path
        if not file.is_file():
            return f"it has no {name}"
        by_whole = bool(known.sha256) and not (sample and known.sample)
        if agrees(known, file, read_whole=by_whole):
            continue
        if file.stat().st_size != known.size:
            return f"its {name} has {file.stat().st_size} bytes, expected {known.size}"
        found, expected = (
            (whole(file).sha256, known.sha256) if by_whole else (sample_hash(file), known.sample)
        )
        return f"its {name} has the hash {str(found)[:12]}, expected {str(expected)[:12]}"
    return None


def _part_record(path: Path, source: Path) -> InputRecord:
    """Record a part of a source, with its relative path if that reveals no local paths."""
    folder, own = (Path(os.path.abspath(p)) for p in (source, path))  # noqa: PTH100 - without ".."
    around = next((place for place in (folder, folder.parent) if own.is_relative_to(place)), None)
    place = own.relative_to(around).as_posix() if around else None
    return input_record(path).model_copy(update={"place": place})


def named(path: Path, files: Mapping[str, FileRecord]) -> InputRecord:
    """Make a record with a public name: the file's own, or its hub id."""
    found = hub_id_of(path)
    if found is None:
        return InputRecord(name=path.absolute().name, files=dict(files))
    hub_id, revision = found
    return InputRecord(name=hub_id, hub_id=hub_id, revision=revision, files=dict(files))


def without_paths(value: Any, plan: Plan) -> Any:
    """Return ``value`` (JSON) with the paths of a plan's inputs replaced by their names."""
    inputs = [plan.source, *([plan.tower] if plan.tower else []), *plan.parts.values()]
    spelt = {str(p): named(p, {}).name for i in inputs for p in (i.resolve(), i.absolute(), i)}
    around = (plan.source.resolve().parent, plan.source.absolute().parent, Path.cwd(), Path.home())
    spelt |= {f"{folder}/": "" for folder in around if folder.parent != folder}
    longest_first = sorted(spelt.items(), key=lambda pair: -len(pair[0]))

    def clean(inner: Any) -> Any:
        if isinstance(inner, str):
            for path, name in longest_first:
                if "/" in path or inner == path:
                    inner = inner.replace(path, name)
            return inner
        if isinstance(inner, Mapping):
            return {key: clean(entry) for key, entry in inner.items()}
        return [clean(entry) for entry in inner] if isinstance(inner, list | tuple) else inner

    return clean(value)
