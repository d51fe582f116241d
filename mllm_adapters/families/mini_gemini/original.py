"""Reads a Mini-Gemini checkpoint: its fields, its tensors, and its two towers.

Key names and sources of weights after dvlab-research/MGM 769820c (mgm/model/mgm_arch.py,
``initialize_uni_modules``; mgm/model/multimodal_encoder/openclip_encoder.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

from mgll_encoder.common.errors import BadDataError, MismatchError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.tower.spec import Resize, TowerSpec, checked
from mgll_encoder.weights.keytable import Drop
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.core.configs import build_config, tower_geometry
from mllm_adapters.core.contract import Dropped
from mllm_adapters.core.host_tower import TOWER_PART, HostTower, NamedTower, external_tower
from mllm_adapters.core.known_towers import published_name
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import check_positions, copied, dtype_name
from mllm_adapters.core.processing import host_pixels
from mllm_adapters.families.keytable import OriginalLayout
from mllm_adapters.families.mini_gemini.convnext import CONVNEXT, TIMM_KEY, convnext_config

AUX_PART = "vision-tower-aux"
AUX_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", "model.safetensors")
"""Weight files of the high-resolution tower in its folder; the first that exists is used."""

TOWER_PREFIX = "model.vision_tower."
AUX_PREFIX = "model.vision_tower_aux."
CLASS_EMBEDDING = "embeddings.class_embedding"
POSITIONS = "embeddings.position_embedding.weight"

PROJECTORS = (
    *(f"model.vlm_uni_{kind}_projector.{layer}" for kind in ("query", "aux", "val") for layer in (0, 1)),
    "model.mm_projector.0",
    "model.mm_projector.2",
)

LAYOUT = OriginalLayout(
    {
        "*position_ids": Drop("not part of the model: 0, 1, 2 ..."),
        "model.vision_tower.vision_tower.vision_model.*": TOWER_PREFIX + "{}",
        "model.vision_tower.vision_tower.*": TOWER_PREFIX + "{}",
        "model.vision_tower_aux.vision_{stem,stages}.*": AUX_PREFIX + "{}.{}",
        "*rotary_emb.inv_freq": None,
        "model.{embed_tokens,layers,norm}.*": "model.language_model.{}.{}",
        "lm_head.*": "lm_head.{}",
        **{f"{name}.{{weight,bias}}": f"{name}.{{}}" for name in PROJECTORS},
    },
    of="a Mini-Gemini checkpoint",
    reason="not part of our layout",
)
"""Original name -> ours; below the high-resolution tower, timm's. None: recomputed."""

EMBEDDINGS = "model.language_model.embed_tokens.weight"
VOCABULARY_TENSORS = (EMBEDDINGS, "lm_head.weight")


class CommonFields(BaseModel):
    """The used fields of a config.json in either layout."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    image_size_aux: int = Field(gt=0)
    image_grid: int = Field(default=1, ge=1)
    image_global: bool = False
    tie_word_embeddings: bool = False

    @property
    def views(self) -> int:
        """Return the number of views of an image with their own tokens."""
        return self.image_grid**2 + self.image_global


class OriginalFields(CommonFields):
    """The used fields of an original config.json, with the original code's defaults and the supported values."""

    mm_hidden_size: int | None = Field(default=None, gt=0)
    mm_vision_tower: str = Field(min_length=1)
    mm_vision_tower_aux: str = Field(min_length=1)
    mm_projector_type: Literal["mlp2x_gelu"]
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: Literal["patch"] = "patch"
    image_aspect_ratio: Literal["pad", "square"] | None = None
    image_size_aux: int = Field(default=320, gt=0)
    mm_use_im_start_end: Literal[False] = False
    mm_use_im_patch_token: Literal[False] = False
    optimize_vision_tower_aux: bool | None = False


class NativeFields(CommonFields):
    """The used fields of a config.json in our layout."""

    vision_feature_layer: int
    image_token_id: int


@dataclass(frozen=True)
class Names:
    """The tensors of an original checkpoint, sorted.

    Attributes:
        kept: Target name -> source name.
        tower: Key in the low-resolution tower -> source name.
        aux: timm's key in the high-resolution tower -> source name.
        dropped: Dropped tensors.
    """

    kept: dict[str, str]
    tower: dict[str, str]
    aux: dict[str, str]
    dropped: tuple[Dropped, ...]


def sort_names(checkpoint: Checkpoint) -> Names:
    """Sort the tensors of an original checkpoint.

    Raises:
        UserError: one is missing, or is not part of a Mini-Gemini.
    """
    names = Names({}, {}, {}, ())
    dropped = []
    for source in checkpoint.tensors:
        place = LAYOUT.place(source, checkpoint.folder)
        if not place.targets:
            dropped.append(Dropped(name=source, reason=LAYOUT.why(place)))
            continue
        (target,) = place.targets
        parts = ((AUX_PREFIX, names.aux), (TOWER_PREFIX, names.tower), ("", names.kept))
        prefix, into = next(part for part in parts if target.startswith(part[0]))
        into[target.removeprefix(prefix)] = source
    needed = (EMBEDDINGS, *(f"{name}.{kind}" for name in PROJECTORS for kind in ("weight", "bias")))
    if missing := [name for name in needed if name not in names.kept]:
        raise BadDataError(
            f"{checkpoint.folder}: tensor {missing[0].replace('language_model.', '')} is missing: is the download "
            "complete, and is this Mini-Gemini rather than its language model or a LLaVA?"
        )
    return Names(names.kept, names.tower, names.aux, tuple(dropped))


@dataclass(frozen=True)
class AuxTower:
    """The high-resolution tower: timm's key -> header, its name in messages, and notes for the user."""

    tensors: dict[str, TensorHeader]
    where: str
    notes: tuple[str, ...] = ()

    def steps(self, dtype: torch.dtype) -> list[Step]:
        """Return steps for its tensors in the target, in this dtype.

        Raises:
            UserError: one is not part of a ConvNeXt.
        """
        named = {"dtype": dtype_name(dtype)}
        places = ((CONVNEXT.place(key, self.where), header) for key, header in self.tensors.items())
        return [
            copied(header, AUX_PREFIX + place.targets[0]).model_copy(update=named) for place, header in places
        ]

    def config(self, fields: CommonFields, width: int, folder: Path) -> dict[str, Any]:
        """Return its configuration.

        Args:
            fields: Fields of the checkpoint.
            width: Width of the features that the mining reads.
            folder: The checkpoint.

        Raises:
            UserError: tensors are missing, or give features of another width.
        """
        sizes = convnext_config(self.tensors, fields.image_size_aux, self.where)
        if sum(sizes["hidden_sizes"]) != width:
            raise MismatchError(
                f"{folder}: model.vlm_uni_aux_projector.1.weight reads features of width {width}, but {self.where} "
                f"gives {sum(sizes['hidden_sizes'])}: they do not belong together"
            )
        return sizes

    def unused(self, names: Iterable[str], named: str) -> list[Dropped]:
        """Return the tensors in the shards that are not used; ``named`` is the tower's name in config.json."""
        used = {header.name for header in self.tensors.values()}
        reason = f"the original code reads {named} instead"
        return [Dropped(name=name, reason=reason) for name in names if name not in used]


def original_tower(
    checkpoint: Checkpoint,
    fields: OriginalFields,
    inside: Mapping[str, str],
    image_size: int | None,
    *,
    replaced: bool,
) -> HostTower:
    """Find the tower that the original code would use: the one in the shards if there is one, else the named one."""
    resize: Resize = "pad" if fields.image_aspect_ratio == "pad" else "crop"
    name = fields.mm_vision_tower
    published = published_name(name)
    if published and not checkpoint.find(TOWER_PART, name) and checkpoint.find(TOWER_PART, published):
        name = published  # MGM names a local copy (model_zoo/OpenAI/...) of the cached model
    shapes = {key: checkpoint.tensors[source].shape for key, source in inside.items()}
    host = external_tower(
        NamedTower(name, resize, shapes, fields.mm_hidden_size),
        checkpoint,
        replaced=replaced,
        image_size=image_size,
    )
    if replaced or not inside:
        return host
    if POSITIONS not in inside:
        raise BadDataError(
            f"{checkpoint.folder}: the low-resolution tower in the shards is incomplete: no {POSITIONS}"
        )
    positions = checkpoint.tensors[inside[POSITIONS]]
    check_positions(positions, host.spec, by=name)
    note = f"the host's own tower is the one in its shards, with the settings of {host.name}"
    return HostTower(host.name, host.spec, None, (note,))


def aux_tower(checkpoint: Checkpoint, fields: OriginalFields, inside: Mapping[str, str]) -> AuxTower:
    """Find the tower that the original code would use: the named file, overridden by the shards if it was trained."""
    name = fields.mm_vision_tower_aux
    if "xxlarge" in name.lower():
        raise UnsupportedCheckpointError(
            f"{checkpoint.folder}/config.json: mm_vision_tower_aux is {name!r}: the xxlarge ConvNeXt "
            "normalizes differently and is not supported; take a checkpoint with convnext_large_d_320"
        )
    held = {key: checkpoint.tensors[source] for key, source in inside.items()}
    trained = bool(fields.optimize_vision_tower_aux) and {key.split(".")[0] for key in held} == {
        "stem",
        "stages",
    }
    found = None if trained else checkpoint.find(AUX_PART, name)
    if found is None:
        if not held:
            raise NotFoundError(
                f"{checkpoint.folder}: its high-resolution tower '{name}' is not in its shards, in the "
                f"checkpoint folder or next to it: put its folder at {checkpoint.folder.parent / name}, or "
                f"pass `parts['{AUX_PART}']=PATH`"
            )
        other = () if trained else (f"{name} is not on this machine: its copy in the shards is used",)
        return AuxTower(held, str(checkpoint.folder), other)
    file = _aux_file(found)
    headers = checkpoint.attach(AUX_PART, file)
    named = {match[1]: h for key, h in headers.items() if (match := TIMM_KEY.fullmatch(key))}
    return AuxTower(named | held if fields.optimize_vision_tower_aux else named, str(file))


def _aux_file(path: Path) -> Path:
    if path.is_file():
        return path
    file = next((path / name for name in AUX_FILES if (path / name).is_file()), None)
    if file is None:
        raise NotFoundError(
            f"{path} has no weights of a high-resolution tower: expected one of {', '.join(AUX_FILES)}"
        )
    return file


def own_tower(checkpoint: Checkpoint, fields: NativeFields) -> tuple[HostTower, str]:
    """Return the low-resolution tower of a checkpoint in our layout, and the prefix of its keys."""
    where = checkpoint.folder / "config.json"
    found = [n.removesuffix(CLASS_EMBEDDING) for n in checkpoint.tensors if n.endswith(CLASS_EMBEDDING)]
    if len(found) != 1:
        raise BadDataError(
            f"{checkpoint.folder}: expected one {CLASS_EMBEDDING}, found {len(found)}: download it again"
        )
    vision = build_config(checkpoint.config, str(where)).vision_config
    pixels, notes = host_pixels(checkpoint.folder, fields.image_size_aux)
    spec = checked(
        TowerSpec, {**tower_geometry(vision), **pixels.model_dump(), "image_size": vision.image_size}, where
    )
    check_positions(checkpoint.tensors[found[0] + POSITIONS], spec)
    return HostTower("vision_tower", spec, None, notes), found[0]
