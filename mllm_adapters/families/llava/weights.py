"""LLaVA in its original layout: finds its tensors, and maps them to transformers' names.

There are three kinds of folders: whole checkpoints, projectors (``mm_projector.bin``) and LoRA adapters; the
latter two need the language model that they were trained on. After LLaVA c121f04 (llava/model/builder.py,
llava/train/train.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    UnsupportedCheckpointError,
)
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.foreign import ADAPTER_CONFIG
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import read_fields
from mllm_adapters.core.contract import Dropped
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, dtype_name, extended
from mllm_adapters.families.keytable import OriginalLayout
from mllm_adapters.families.llava.fields import AdapterFields, text_model

CONNECTOR = "multi_modal_projector.linear_1"
SECOND = "multi_modal_projector.linear_2"

EMBEDDINGS = "language_model.model.embed_tokens.weight"
VOCABULARY_TENSORS = (EMBEDDINGS, "language_model.lm_head.weight")

BASE_PART = "base"
"""Name in ``--part`` of the language model that a projector or an adapter was trained on."""

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PARTIAL_WEIGHTS = ("mm_projector.bin", "non_lora_trainables.bin", *ADAPTER_WEIGHTS)

PROJECTORS: Mapping[str, Mapping[str, str]] = {
    "linear": {"": "linear_1"},
    "mlp1x_gelu": {"0": "linear_1"},
    "mlp2x_gelu": {"0": "linear_1", "2": "linear_2"},
}
"""``mm_projector_type`` -> its layers -> those of transformers' LlavaMultiModalProjector."""

ORIGINAL_TOWER = re.compile(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")
ORIGINAL_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
LORA_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")

LAYOUT = OriginalLayout(
    {
        "*rotary_emb.inv_freq": None,  # recomputed from the configuration
        "model.image_newline": None,  # from the anyres modes, which are refused
        "model.{embed_tokens,layers,norm}.*": "language_model.model.{}.{}",
        "lm_head.*": "language_model.lm_head.{}",
    },
    of="a LLaVA checkpoint",
)
"""Original name -> transformers name, except for tower and projector."""


@dataclass(frozen=True)
class Merge:
    """A weight and the LoRA update to add to it: ``scale * up @ down``, with names in `Checkpoint`."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class Weights:
    """The tensors of a whole original checkpoint, from all its folders.

    Attributes:
        layout: Kind of folder.
        sources: Name in a whole original checkpoint -> name in `Checkpoint`.
        merges: Likewise -> the LoRA update to add.
        dropped: Tensors that others replace.
        base: The language model's folder, if it is separate.
        notes: Notes for the user.
    """

    layout: str
    sources: dict[str, str]
    merges: dict[str, Merge] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    base: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sorted:
    """The tensors by their destination.

    Attributes:
        names: Target name -> original name.
        inside: Key of a tower tensor -> original name.
        dropped: Tensors that are dropped on purpose.
        projector: ``mm_projector_type`` of the tensors.
    """

    names: dict[str, str]
    inside: dict[str, str]
    dropped: tuple[Dropped, ...]
    projector: str


def find_weights(checkpoint: Checkpoint) -> Weights:
    """Find the tensors of a checkpoint, including those of its base model.

    Raises:
        UserError: the base model is missing or another one than expected, the adapter is incomplete or of an
            unknown kind, or the folder holds both whole weights and an adapter.
    """
    folder = checkpoint.folder
    adapted = (folder / ADAPTER_CONFIG).is_file()
    if adapted and not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise BadDataError(
            f"{folder} holds {ADAPTER_CONFIG} but not {' or '.join(ADAPTER_WEIGHTS)}: complete the download"
        )
    if not checkpoint.partial:
        if adapted:
            raise BadDataError(
                f"{folder} holds a whole model and a LoRA adapter: if the adapter is merged into it, remove "
                f"{ADAPTER_CONFIG}; if not, keep each in a separate folder"
            )
        if checkpoint.find(BASE_PART):
            raise InvalidArgumentError(
                f"{folder} holds a whole model: `parts['{BASE_PART}']` is for projector-only and LoRA folders"
            )
        return Weights("original", {name: name for name in checkpoint.tensors})
    if not adapted:
        return _with_base(
            checkpoint, "projector", str(checkpoint.config.get("_name_or_path") or ""), checkpoint.tensors
        )
    where = f"{folder}/{ADAPTER_CONFIG}"
    fields = read_fields(AdapterFields, read_json(folder / ADAPTER_CONFIG), where)
    halves: dict[str, dict[str, str]] = {}
    others = []
    for name in checkpoint.tensors:
        if match := LORA_MATRIX.fullmatch(name):
            halves.setdefault(f"{_bare(match[1])}.weight", {})[match[2]] = name
        else:
            others.append(name)
    whole = _with_base(checkpoint, "lora", fields.base_model_name_or_path or "", others)
    merges = {name: _merge(checkpoint, whole.sources, name, pair, fields) for name, pair in halves.items()}
    note = f"{len(merges)} tensors of the language model are merged with LoRA (rank {fields.r}, scale {fields.scale:g})"
    return Weights("lora", whole.sources, merges, whole.dropped, whole.base, (*whole.notes, note))


def sort_names(weights: Weights, where: Path) -> Sorted:
    """Sort the tensors by their destination.

    Raises:
        UserError: a tensor is unknown, or the embedding or the projector is missing.
    """
    names: dict[str, str] = {}
    dropped: list[Dropped] = []
    inside: dict[str, str] = {}
    projector: dict[tuple[str, str], str] = {}
    for original, source in weights.sources.items():
        if match := ORIGINAL_TOWER.fullmatch(original):
            if not original.endswith("position_ids"):
                inside[match[1]] = original
        elif match := ORIGINAL_PROJECTOR.fullmatch(original):
            projector[match[1] or "", match[2]] = original
        elif places := LAYOUT.place(original, where).targets:
            names[places[0]] = original
        else:
            dropped.append(Dropped(name=source, reason=LAYOUT.reason))
    if EMBEDDINGS not in names:
        raise BadDataError(
            f"{weights.base or where} has no {EMBEDDINGS.removeprefix('language_model.')}: is it complete?"
        )
    kind = _projector_kind({layer for layer, _ in projector}, where)
    for (layer, what), original in projector.items():
        names[f"multi_modal_projector.{PROJECTORS[kind][layer]}.{what}"] = original
    return Sorted(names, inside, tuple(dropped), kind)


def original_steps(
    checkpoint: Checkpoint, weights: Weights, names: Mapping[str, str], rows: int
) -> list[Step]:
    """Return steps for everything except the tower; with a base model, tensors get the base's dtype.

    Args:
        checkpoint: The checkpoint.
        weights: Its tensors.
        names: Target name -> original name.
        rows: Rows of the vocabulary.
    """
    dtype = dtype_name(checkpoint.header(weights.sources[names[EMBEDDINGS]]).dtype)
    steps = []
    for target, original in names.items():
        header = checkpoint.header(weights.sources[original])
        step = copied(header, target)
        if merge := weights.merges.get(original):
            made = {"operation": "lora", "arguments": {"scale": merge.scale}}
            step = step.model_copy(update={**made, "sources": (header.name, merge.down, merge.up)})
        steps.append(step if weights.base is None else step.model_copy(update={"dtype": dtype}))
    return extended(steps, VOCABULARY_TENSORS, rows)


def identity_layer(dtype: str, width: int) -> list[Step]:
    """Return steps for the second layer of a projector with only one: the identity, as is its activation."""
    return [
        Step(name=f"{SECOND}.weight", dtype=dtype, shape=(width, width), operation="identity"),
        Step(name=f"{SECOND}.bias", dtype=dtype, shape=(width,), operation="zeros"),
    ]


def check_applied(checkpoint: Checkpoint, weights: Weights) -> None:
    """Refuse a delta that has not been added to its LLaMA, as the first releases were published.

    Names and shapes are those of the whole model. One vector is read: fine-tuning changes the weights of the
    final normalization, which are about 1, by hundredths at most.

    Raises:
        UserError: it is such a delta.
    """
    norm = weights.sources.get("model.norm.weight")
    size = float(checkpoint.read(norm).float().abs().mean()) if norm else 1.0
    if size < 0.1:
        raise BadDataError(
            f"{checkpoint.folder}: the weights of the final normalization are {size:.3g} on average, "
            "expected about 1: "
            "this looks like a delta that has not been added to its LLaMA; apply it (llava.model.apply_delta in the "
            "repository that published it) and pass the folder that it writes"
        )


def _with_base(
    checkpoint: Checkpoint, layout: str, name: str, own: list[str] | Mapping[str, object]
) -> Weights:
    """Return the tensors of the base model, with the folder's own replacing or complementing them.

    Args:
        checkpoint: The folder.
        layout: Kind of folder.
        name: Its name of its base model.
        own: Names of its own tensors, as on disk.
    """
    base = _base_folder(checkpoint, layout, name)
    sources = {original: header.name for original, header in checkpoint.attach(BASE_PART, base).items()}
    mine = {_bare(name): name for name in own}
    hidden = {
        n for n in sources if n in mine or ("mm_projector" in n and any("mm_projector" in m for m in mine))
    }
    dropped = tuple(
        Dropped(name=sources[n], reason=f"the {layout} folder has its own") for n in sources if n in hidden
    )
    kept_of_base = {n: source for n, source in sources.items() if n not in hidden}
    called = (
        name if name and "snapshots" in base.parts else base.absolute().name
    )  # in the cache, a commit's hash
    notes = (f"the language model is {called}",)
    return Weights(layout, {**kept_of_base, **mine}, dropped=dropped, base=base, notes=notes)


def _base_folder(checkpoint: Checkpoint, layout: str, name: str) -> Path:
    folder, what = checkpoint.folder, {"projector": "a projector", "lora": "a LoRA adapter"}[layout]
    found = checkpoint.find(BASE_PART, *([name] if name else []))
    if found is None or found.resolve() == folder.resolve():
        named = f" '{name}', which is neither next to it nor in the Hugging Face cache" if name else ""
        raise NotFoundError(
            f"{folder} has {what} without its language model{named}: pass `parts['{BASE_PART}']=PATH`"
        )
    if not (found / "config.json").is_file():
        raise BadDataError(
            f"{found} (`parts['{BASE_PART}']`): expected a model folder with a config.json and weights"
        )
    config, expected = read_json(found / "config.json"), text_model(checkpoint.config)
    kind = text_model(config) or str(config.get("model_type"))
    if kind != expected:
        raise MismatchError(
            f"{found} (model_type {config.get('model_type')!r}) is not what {folder} was trained on: expected a "
            f"{expected} language model{f', {name}' if name else ''}; pass it with `parts['{BASE_PART}']=PATH`"
        )
    return found


def _merge(
    checkpoint: Checkpoint,
    sources: Mapping[str, str],
    name: str,
    pair: Mapping[str, str],
    fields: AdapterFields,
) -> Merge:
    folder = checkpoint.folder
    if name not in sources:
        raise MismatchError(
            f"{folder}: the adapter changes {name}, which the base model does not have: is it another one?"
        )
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        raise UnsupportedCheckpointError(
            f"{folder}: the adapter changes {name}, which is not supported: merge it with PEFT first"
        )
    if set(pair) != {"A", "B"}:
        raise BadDataError(
            f"{folder}: the adapter has only one of two matrices for {name}: complete the download"
        )
    down, up, base = (checkpoint.header(n).shape for n in (pair["A"], pair["B"], sources[name]))
    if (down, up) != ((fields.r, base[-1]), (base[0], fields.r)):
        raise MismatchError(
            f"{folder}: the adapter's matrices for {name} are {list(down)} and {list(up)}, which are not an "
            f"update of rank {fields.r} to {list(base)}: adapter, {ADAPTER_CONFIG} and base model do not "
            "belong together"
        )
    return Merge(pair["A"], pair["B"], fields.scale)


def _bare(name: str) -> str:
    """Return a tensor's name without the prefixes of PEFT and LLaVA's training code."""
    return (
        name.removeprefix("base_model.model.")
        if name.startswith("base_model.model.")
        else re.sub(r"^model\.(?=model\.)", "", name)
    )


def _projector_kind(layers: set[str], where: Path) -> str:
    if not layers:
        raise NotFoundError(
            f"{where} has no projector, neither in its shards nor as mm_projector.bin: is this the language model only?"
        )
    for kind, names in PROJECTORS.items():
        if layers == set(names):
            return kind
    found = ", ".join(sorted(f"mm_projector.{layer}" for layer in layers))
    raise BadDataError(
        f"{where}: the projector's layers are {found}, expected those of {' or '.join(PROJECTORS)}"
    )
