"""Reads the JSON files of a tower's folder: transformers, open_clip, or our own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mgll_encoder.tower.architectures import ARCHITECTURES, described_by
from mgll_encoder.tower.architectures.siglip import timm_activation
from mgll_encoder.tower.preprocess import read_preprocessing
from mgll_encoder.tower.spec import TowerSpec, checked

HF_FOLDER, OPEN_CLIP_FOLDER, OURS = "transformers folder", "open_clip folder", "mgll tower folder"

TOWER_FILE = "mgll_tower.json"
TOWER_VERSION = 1

_OPEN_CLIP_FIELDS = {
    "width": "width",
    "depth": "layers",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_REFUSED = {
    "dinov3_vit": "a DINOv3, whose positions are rotary",
    "dinov3_convnext": "a DINOv3 ConvNeXt, which is not a ViT",
    "siglip2": "a NaFlex SigLIP 2, whose images keep their aspect ratio",
    "siglip2_vision_model": "a NaFlex SigLIP 2, whose images keep their aspect ratio",
}
"""``model_type`` of vision towers that are not read -> what they are."""

_SUPPORTED = "a DINOv2, or a SigLIP 2 with a fixed image size (model_type 'siglip'), is read"

_OPEN_CLIP_RESIZE = {"shortest": "crop", "squash": "squash"}


@dataclass(frozen=True)
class Claims:
    """Fields of ``TowerSpec`` that a folder states.

    Attributes:
        layout: Kind of folder, or None for a bare weight file.
        file: The file that states them.
        fields: ``TowerSpec`` field -> value.
        names: ``TowerSpec`` field -> its name in the file.
        notes: Settings of the file that are simplified here.
        input_size: Image size of the image processor, if it may differ from that of the config.
    """

    layout: str | None = None
    file: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    input_size: int | None = None


def read_claims(path: Path) -> Claims:
    """Read the configs of a tower's folder; a bare file has none.

    Raises:
        UserError: a config is unreadable, of another model type, or contradicts another config of the folder.
    """
    if not path.is_dir():
        unread = [name for name in ("config.json", TOWER_FILE) if (path.parent / name).is_file()]
        return Claims(
            notes=tuple(f"{path.parent / name} is not read: pass the folder" for name in unread[:1])
        )
    if (path / TOWER_FILE).is_file():
        return _ours(path)
    if (path / "config.json").is_file():
        return _transformers(path)
    return _open_clip(path) if (path / "open_clip_config.json").is_file() else Claims()


def check_kind(file: Path) -> dict[str, Any]:
    """Read the config.json of a transformers folder that contains a vision tower.

    Raises:
        UserError: it is unreadable, or describes another kind of model.
    """
    content = read_json(file)
    kind = content.get("model_type")
    if kind in _REFUSED:
        raise UnsupportedCheckpointError(
            f"{file} describes {_REFUSED[kind]}: expected another tower; {_SUPPORTED}"
        )
    if described_by(kind) is None:
        known = [name for row in ARCHITECTURES.values() for name in (row.model_type, row.around) if name]
        raise UnsupportedCheckpointError(
            f"{file}: field 'model_type' is {kind!r}: expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, "
            "the folder of a vision tower (a whole MLLM belongs to `plan_swap(mllm=...)`)"
        )
    return content


def _ours(folder: Path) -> Claims:
    file = folder / TOWER_FILE
    content = read_json(file)
    if content.get("version") != TOWER_VERSION:
        raise UnsupportedCheckpointError(
            f"{file}: field 'version' is {content.get('version')!r}: expected {TOWER_VERSION}; "
            "the folder was written by another version of mgll-mllm: upgrade, or write the tower again"
        )
    if not isinstance(content.get("spec"), dict):
        raise UnsupportedCheckpointError(
            f"{file}: field 'spec' is missing: expected the tower specification; write the tower again"
        )
    spec = checked(TowerSpec, content["spec"], file)
    if spec.architecture not in ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{file}: field 'architecture' is {spec.architecture!r}: expected {' or '.join(ARCHITECTURES)}; the folder "
            "was written by another version of mgll-mllm: upgrade"
        )
    config = folder / "config.json"
    act = read_json(config).get("hidden_act") if config.is_file() else spec.activation
    if act != spec.activation:
        raise UnsupportedCheckpointError(
            f"{file}: field 'activation' is {spec.activation}, but {config} has hidden_act {act!r}: "
            "expected both to agree; write the tower again"
        )
    record = content.get("provenance") or {}
    notes = []
    if record.get("activation_source") == "default":
        notes.append(
            f"{file}: {spec.activation} was only the default for {record.get('source')} when this folder was written; "
            "if you know the right activation, convert again with `activation`"
        )
    return Claims(OURS, file, spec.model_dump(exclude_none=True), notes=tuple(notes))


def _open_clip(folder: Path) -> Claims:
    file = folder / "open_clip_config.json"
    content = read_json(file)
    model, pixels = content.get("model_cfg") or {}, content.get("preprocess_cfg") or {}
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict):
        raise UnsupportedCheckpointError(
            f"{file}: field 'model_cfg.vision_cfg' is missing: expected open_clip's own config"
        )
    fields = {ours: vision[theirs] for ours, theirs in _OPEN_CLIP_FIELDS.items() if theirs in vision}
    fields["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if isinstance(name := vision.get("timm_model_name"), str):
        fields["activation"] = timm_activation(name)
    if "head_width" in vision and "width" in vision:
        fields["heads"] = vision["width"] // vision["head_width"]
    if "mean" in pixels and "std" in pixels:
        mode = pixels.get("resize_mode", "shortest")
        fields |= {"mean": pixels["mean"], "std": pixels["std"], "resize": _OPEN_CLIP_RESIZE.get(mode, mode)}
    return Claims(OPEN_CLIP_FOLDER, file, fields, {**_OPEN_CLIP_FIELDS, "activation": "quick_gelu"})


def _transformers(folder: Path) -> Claims:
    file = folder / "config.json"
    content = check_kind(file)
    architecture = described_by(content["model_type"])
    assert architecture is not None, "check_kind accepted it"
    vision = content
    if content["model_type"] == architecture.around:
        # old files contain it twice; transformers uses vision_config_dict then
        parts = (content.get(name) for name in ("vision_config_dict", "vision_config"))
        vision = next((part for part in parts if part is not None), {})
    try:
        fields = architecture.spec_fields(vision)
    except ValueError as error:
        raise UnsupportedCheckpointError(
            f"{file} is not a valid config of a {architecture.title}: {error}"
        ) from None
    pixels, notes = _pixels(folder, None if architecture.resampled else fields["image_size"])
    size = pixels.pop("image_size", None)
    return Claims(HF_FOLDER, file, {**fields, **pixels}, architecture.fields.names, notes, size)


def _pixels(folder: Path, image_size: int | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    file = folder / "preprocessor_config.json"
    content = read_json(file) if file.is_file() else {}
    if not content and (file := folder / "processor_config.json").is_file():  # transformers 5 nests it there
        content = read_json(file).get("image_processor", {})
    if not content:
        return {}, ()
    pixels, notes = read_preprocessing(content, file)
    if image_size is not None and (side := pixels["image_size"]) != image_size:
        raise UnsupportedCheckpointError(
            f"{file}: images are resized to {side} px, but image_size in config.json is {image_size}: "
            "expected both to agree; take both from the same folder"
        )
    return pixels, notes
