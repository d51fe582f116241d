"""InternVL-Chat before a swap, read from configuration and headers, in either layout.

Defaults and vision contract after OpenGVLab/InternVL 2410d1d (internvl_chat/internvl/model/internvl_chat:
configuration_*.py, modeling_*.py; internvl_chat/internvl/train/dataset.py) and transformers 5.23.0 (models/internvl).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD, PixelRule, Resize, TowerSpec, checked
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config, read_fields, text_config, tower_geometry
from mllm_adapters.core.contract import FAMILY_KEY, VisionContract
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import contract_of, copied, extended, image_row
from mllm_adapters.core.processing import host_pixels, processor_fate
from mllm_adapters.families.host import Host, PlanRequest
from mllm_adapters.families.internvl import text as internvl_text
from mllm_adapters.families.internvl.names import (
    EMBEDDINGS,
    HEAD,
    LANGUAGE_MODELS,
    POSITIONS,
    PROJECTOR,
    TOWER,
    LanguageModel,
    sort_tensors,
)

NAME, OWN = "internvl", "mgll_internvl"
"""model_type of the family, and of the architecture with a CLIP tower."""

CLASSES: Mapping[str, str] = {
    "internvl": "InternVLForConditionalGeneration",
    OWN: "MgllInternVLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
"""``model_type`` in the transformers layout -> its class."""

NEW_LAYER = -2
"""Hidden layer at which a new tower is read: a CLIP's last block is trained only for its class token."""

FIRST_TENSOR = re.compile(r"(.*vision_tower\.)(?:vision_model\.)?embeddings\.(?:cls_token|class_embedding)")

TRY = "take a chat model, such as OpenGVLab/InternVL2_5-8B"


class VisionFields(BaseModel):
    """The used fields of ``vision_config``, with the original code's defaults: those of InternViT-6B."""

    hidden_size: int = 3200
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    image_size: int = 224
    patch_size: int = 14
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-6
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    qk_normalization: bool = True
    qkv_bias: bool = False

    def stock(self, spec: TowerSpec) -> dict[str, Any]:
        """Return the ``vision_config`` of transformers' InternVL."""
        return {
            "model_type": "internvl_vision",
            **self.model_dump(exclude={"qk_normalization", "qkv_bias"}),
            "use_qk_norm": self.qk_normalization,
            "attention_bias": self.qkv_bias,
            "image_size": [spec.image_size] * 2,
            "patch_size": [spec.patch_size] * 2,
        }


class OriginalFields(BaseModel):
    """The used fields of an original config.json, with the original code's defaults."""

    vision_config: dict[str, Any]
    llm_config: dict[str, Any]
    downsample_ratio: float = Field(0.5, gt=0, le=1)
    force_image_size: int | None = None
    select_layer: int = -1
    ps_version: Literal["v1", "v2"] = "v1"
    pad2square: bool = False
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    max_dynamic_patch: int = Field(6, ge=1)
    template: str | None = None
    use_backbone_lora: Literal[0] = 0
    use_llm_lora: Literal[0] = 0


class NativeFields(BaseModel):
    """The used fields of a config.json in the transformers layout, with the defaults of ``InternVLConfig``."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default"] = "default"
    downsample_ratio: float = Field(0.5, gt=0, le=1)
    image_token_id: int = 151667
    ps_version: Literal["v1", "v2"] = "v2"


def original_host(checkpoint: Checkpoint, request: PlanRequest) -> Host:
    """Read a checkpoint in the original layout.

    Raises:
        UserError: it is an unsupported variant, or incomplete.
    """
    where = f"{checkpoint.folder}/config.json"
    fields = read_fields(OriginalFields, checkpoint.config, where)
    vision = read_fields(VisionFields, fields.vision_config, f"{where}, vision_config")
    if vision.qk_normalization and vision.layer_norm_eps != 1e-6:
        raise UnsupportedCheckpointError(
            f"{where}: layer_norm_eps of vision_config is {vision.layer_norm_eps}, expected 1e-06: "
            "transformers' InternViT supports no other for queries and keys"
        )
    language_model = _language_model(fields.llm_config, where)
    steps, dropped = sort_tensors(checkpoint, language_model, fields.llm_config)
    held = {step.name: step for step in steps}
    for name in (EMBEDDINGS, POSITIONS, f"{PROJECTOR}linear_1.weight"):
        if name not in held:
            raise BadDataError(
                f"{checkpoint.folder}: the tensor for {name} is missing: is the checkpoint complete?"
            )
    spec = _original_tower(fields, vision, where)
    merge = _merged(fields.downsample_ratio, spec.grid, where)
    tiles = fields.max_dynamic_patch if fields.dynamic_image_size else 1
    tiles += tiles > 1 and fields.use_thumbnail
    contract = _contract(spec, fields.select_layer, merge, tiles)
    vocabulary = max(held[name].shape[0] for name in (EMBEDDINGS, HEAD) if name in held)
    said = internvl_text.conversation(checkpoint.folder, fields.template, vocabulary)
    image_token_id, rows = (said.image_token_id, vocabulary) if said else image_row(None, vocabulary)
    text = text_config(
        language_model.model_type, language_model.settings(fields.llm_config), rows, f"{where}, llm_config"
    )
    steps = extended(_resampled(steps, spec.patches + 1), (EMBEDDINGS, HEAD), rows)
    kind = _model_type(request, fields.ps_version, contract)
    own = {
        "dtype": held[EMBEDDINGS].dtype,
        "text_config": text | ({"eos_token_id": list(said.stops)} if said else {}),
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "downsample_ratio": fields.downsample_ratio,
        "image_token_id": image_token_id,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "ps_version": fields.ps_version,
    }
    return Host(
        layout="original",
        before=contract,
        steps=sorted(steps, key=lambda step: not step.name.startswith(TOWER)),
        dtype=getattr(torch, held[f"{PROJECTOR}linear_1.weight"].dtype),
        config=_config(kind, own, vision.stock(spec), contract),
        image_token_id=image_token_id,
        read_at=NEW_LAYER,
        merge=merge,
        dropped=dropped,
        processor=processor_fate(checkpoint.folder, name=internvl_text.PROCESSORS[kind]),
        notes=_original_notes(fields, vocabulary, rows, image_token_id),
        **_places("", kind, request),
    )


def _original_notes(
    fields: OriginalFields, vocabulary: int, rows: int, image_token_id: int
) -> tuple[str, ...]:
    notes = []
    if rows > vocabulary:
        notes.append(
            f"without a tokenizer, the vocabulary grows from {vocabulary} to {rows} rows (each new row is the mean of "
            f"the old ones) for the image placeholder {image_token_id}; the original takes its id from the tokenizer"
        )
    if fields.ps_version == "v1":
        notes.append(
            "the visual tokens come column by column (ps_version v1), as this checkpoint was trained"
        )
    return tuple(notes)


def native_host(checkpoint: Checkpoint, request: PlanRequest) -> Host:
    """Read a checkpoint in the transformers layout, swapped before or not.

    Raises:
        UserError: it is an unsupported variant, or incomplete.
    """
    config, where = checkpoint.config, checkpoint.folder / "config.json"
    fields = read_fields(NativeFields, config, str(where))
    built = build_config(config, str(where))
    matches = [m for m in map(FIRST_TENSOR.fullmatch, checkpoint.tensors) if m]
    if len(matches) != 1:
        raise BadDataError(
            f"{checkpoint.folder}: expected one vision tower under vision_tower, found {len(matches)}"
        )
    prefix = matches[0][1]
    vision = built.vision_config.to_dict()
    side, patch = _side(vision["image_size"]), _side(vision["patch_size"])
    usual = PixelRule(image_size=side, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    pixels, notes = host_pixels(checkpoint.folder, side, assumed=usual)
    geometry = {
        "width": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_width": vision["intermediate_size"],
        "patch_size": patch,
        "activation": vision["hidden_act"],
    }
    spec = checked(TowerSpec, {**geometry, **pixels.model_dump()}, where)
    merge = _merged(fields.downsample_ratio, spec.grid, str(where))
    tiles = internvl_text.tiles(checkpoint.folder, config["model_type"])
    contract = _contract(spec, fields.vision_feature_layer, merge, tiles)
    root = prefix.removesuffix(TOWER)
    projector = checkpoint.tensors.get(f"{root}{PROJECTOR}linear_1.weight")
    if projector is None:
        raise BadDataError(
            f"{checkpoint.folder}: tensor {root}{PROJECTOR}linear_1.weight is missing: is this the language model only?"
        )
    kind = _model_type(request, fields.ps_version, contract)
    own = {
        **{key: value for key, value in config.items() if key != "auto_map"},
        "vision_feature_select_strategy": "default",
        "downsample_ratio": fields.downsample_ratio,
        "image_token_id": fields.image_token_id,
        "tie_word_embeddings": built.tie_word_embeddings,
        "ps_version": fields.ps_version,
    }
    return Host(
        layout="transformers",
        before=contract,
        steps=[copied(header) for header in checkpoint.tensors.values()],
        dtype=projector.dtype,
        config=_config(kind, own, vision, contract),
        image_token_id=fields.image_token_id,
        read_at=NEW_LAYER,
        merge=merge,
        processor=processor_fate(checkpoint.folder, name=internvl_text.PROCESSORS[kind]),
        notes=notes,
        **_places(root, kind, request),
    )


def _contract(spec: TowerSpec, layer: int, merge: int, tiles: int) -> VisionContract:
    """Return the contract of a tower whose patches are merged, ``merge`` along one side."""
    contract = contract_of(spec, layer, class_token=False)
    return contract.model_copy(update={"tokens": (spec.grid // merge) ** 2, "tiles": tiles})


def _model_type(request: PlanRequest, ps_version: str, contract: VisionContract) -> str:
    """Return the target's model_type: the stock class supports one token order, and its processor one resize rule."""
    stock = request.tower is None and ps_version == "v2" and contract.resize == "squash"
    return "llava" if request.target == "llava" else "internvl" if stock else OWN


def _config(
    kind: str, own: Mapping[str, Any], vision: Mapping[str, Any], contract: VisionContract
) -> dict[str, Any]:
    """Return the config.json of a target of this model_type, with the host's own tower."""
    config = {
        **own,
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        FAMILY_KEY: NAME,
        "vision_config": dict(vision),
        "vision_feature_layer": contract.feature_layer,
        "image_seq_length": contract.tokens,
    }
    if kind != OWN:
        del config["ps_version"]
    if kind == "llava":
        del config["downsample_ratio"]
        # The name in releases before 5.0.
        config |= {"image_token_index": config.pop("image_token_id"), "multimodal_projector_bias": True}
    return config


def _places(root: str, kind: str, request: PlanRequest) -> dict[str, Any]:
    """Return the names of tower and connector in the target, which start with ``root``."""
    names = ("layer_norm", "linear_1") if request.tower else ()
    return {
        "prefix": f"{root}{TOWER}" + ("vision_model." if kind == "llava" else ""),
        "connector": tuple(root + PROJECTOR + name for name in names),
    }


def _language_model(llm_config: Mapping[str, Any], where: str) -> LanguageModel:
    names = llm_config.get("architectures") or [None]
    if names[0] not in LANGUAGE_MODELS:
        raise UnsupportedCheckpointError(
            f"{where}: the language model is {names[0]}: expected one of {', '.join(LANGUAGE_MODELS)}; {TRY}"
        )
    return LANGUAGE_MODELS[names[0]]


def _original_tower(fields: OriginalFields, vision: VisionFields, where: str) -> TowerSpec:
    # Tiles are already square; only an image that is not cut is padded.
    resize: Resize = "pad" if fields.pad2square and not fields.dynamic_image_size else "squash"
    given = {"image_size": fields.force_image_size or vision.image_size, "resize": resize}
    return checked(TowerSpec, {**tower_geometry(vision), **given}, Path(where))


def _merged(ratio: float, grid: int, where: str) -> int:
    merge = round(1 / ratio)
    if abs(merge * ratio - 1) > 1e-6 or grid % merge:
        raise UnsupportedCheckpointError(
            f"{where}: downsample_ratio {ratio} does not divide {grid}x{grid} patches: expected 1 / n, such "
            "as 0.5, "
            "and a multiple of n patches"
        )
    return merge


def _resampled(steps: list[Step], positions: int) -> list[Step]:
    """Return the steps, with the position table resampled to the model's image size."""
    made: dict[str, Any] = {"operation": "resample", "arguments": {"leading": 1}}
    return [
        step.model_copy(update={**made, "shape": (1, positions, step.shape[2])})
        if step.name == POSITIONS and step.shape[1] != positions
        else step
        for step in steps
    ]


def _side(size: Any) -> int:
    """Return the side of a square ``image_size`` or ``patch_size``, which may be a pair."""
    return int(size[0] if isinstance(size, list | tuple) else size)
