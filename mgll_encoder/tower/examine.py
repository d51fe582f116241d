"""Reads the header of a tower from any supported format, and compares it with what its folder says.

The format is detected from the keys. Activation and preprocessing cannot be detected from the weights: they come from
the folder's config, from the caller, or from a default of the layout, which the header reports with a warning.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from mgll_encoder.common.errors import IncompatibleTowerError, UnsupportedCheckpointError, unknown_name
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.architectures.base import Architecture
from mgll_encoder.tower.architectures.clip import CLIP, HF_STATE, OPEN_CLIP, PROJECTION
from mgll_encoder.tower.architectures.siglip import SIGLIP
from mgll_encoder.tower.folder_metadata import HF_FOLDER, OPEN_CLIP_FOLDER, Claims, read_claims
from mgll_encoder.tower.header import Origin, StoredTower, TowerHeader
from mgll_encoder.tower.keymap import KeyPlan, plan_keys
from mgll_encoder.tower.spec import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Activation,
    TowerSpec,
    checked,
)
from mgll_encoder.weights.finite import FLOATS
from mgll_encoder.weights.torch_file import WeightSet
from mgll_encoder.weights.weight_file import WeightFile, open_weights

PROJECTION_FILE = "visual_projection.safetensors"

_CLIP_PIXELS: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize": "crop"}
_MGLL_PIXELS: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "squash"}

OFFICIAL, OPENAI = "mgll training checkpoint", "OpenAI state dict"

_DEFAULTS: dict[str, tuple[Activation, dict[str, Any]]] = {
    OFFICIAL: ("gelu", _MGLL_PIXELS),
    OPENAI: ("quick_gelu", _CLIP_PIXELS),
    OPEN_CLIP: ("gelu", _CLIP_PIXELS),
    HF_STATE: ("quick_gelu", _CLIP_PIXELS),
    HF_FOLDER: ("quick_gelu", _CLIP_PIXELS),
    OPEN_CLIP_FOLDER: ("gelu", _CLIP_PIXELS),
}
"""Layout of a CLIP -> activation and preprocessing if the source does not state them; for other architectures, see
`Architecture`. Why:

- official MGLL: its code builds ``ViT-L-14`` with open_clip >= 2.29 (older releases crash on its ``clip.text``),
  which gives exact GELU even with OpenAI's weights; its data pipeline squashes, with ImageNet mean and std;
- OpenAI (detected from the constants ``input_resolution`` ... in the file): trained with QuickGELU;
- other open_clip files: as in open_clip's own ``ViT-L-14`` config;
- transformers: the default of ``CLIPVisionConfig``.
"""


def examine(
    path: Path, activation: Activation | None, weights: WeightSet | None, changes: Mapping[str, Any]
) -> TowerHeader:
    """Read the header of a local tower.

    Args:
        path: File or folder.
        activation: For sources that do not store it.
        weights: Which of two sets of weights.
        changes: Fields of ``TowerSpec`` that the caller changes: ``image_size``, ``pooling``.

    Raises:
        UserError: the source is missing, damaged, of another architecture, or contradicts its config.
    """
    _check_names(activation, weights)
    checkpoint = open_weights(path, weights)
    claims = read_claims(path)
    plan = plan_keys(checkpoint.headers, str(path))
    architecture = plan.architecture
    _compare_kind(architecture, claims, path)
    layout = claims.layout or _layout(plan)
    tensors = plan.apply(checkpoint.headers)
    if (projection := path / PROJECTION_FILE).is_file():
        tensors |= open_weights(projection).headers
    chosen, activation_source = _choose_activation(path, layout, plan, claims, activation)
    pixels = _assumed_pixels(layout, architecture, claims)
    measured = _measure(tensors, architecture, path)
    _compare(measured, claims, path)
    kind = {
        "architecture": architecture.name,
        "layer_norm_eps": plan.naming.layer_norm_eps or architecture.layer_norm_eps,
        "pooling": plan.naming.pooling or next(iter(architecture.poolings)),
    }
    fields = {"heads": architecture.heads(measured["width"]), **kind, **measured, **pixels, **claims.fields}
    stored = checked(TowerSpec, {**fields, "activation": chosen}, claims.file or path)
    _check_shapes(tensors, stored, path)
    spec = _fitted(stored, claims, changes, path)
    warnings = [
        *claims.notes,
        *_weights_warning(checkpoint, weights),
        *_leftovers_warning(plan, path),
        *(
            [_activation_warning(path, layout, architecture, chosen)]
            if activation_source == "default"
            else []
        ),
        *([_pixels_warning(path, layout, architecture, pixels)] if pixels else []),
        *([] if "image_size" in changes else _grid_warning(stored, spec, path)),
    ]
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name != PROJECTION}
    table = architecture.positions
    shapes[table] = (tensors[table].dtype, architecture.shapes(spec)[table])
    return TowerHeader(
        spec=spec,
        tensors=shapes,
        dropped=plan.dropped,
        layout=layout,
        source=path,
        files=checkpoint.files,
        activation_source=activation_source,
        preprocessing_source="default" if pixels else "stored",
        warnings=tuple(warnings),
        weights=checkpoint.taken if "ema" in checkpoint.sets else None,
        stored=StoredTower(checkpoint, plan, spec.grid),
    )


def _check_names(activation: Activation | None, weights: WeightSet | None) -> None:
    if activation is not None and activation not in get_args(Activation):
        raise unknown_name("activation", activation, get_args(Activation))
    if weights is not None and weights not in get_args(WeightSet):
        raise unknown_name("`weights`", weights, get_args(WeightSet))


def _assumed_pixels(layout: str, architecture: Architecture, claims: Claims) -> Mapping[str, Any]:
    """Return the default preprocessing of a tower that does not store it; empty for one that does."""
    if "mean" in claims.fields:
        return {}
    return _DEFAULTS[layout][1] if architecture is CLIP else architecture.pixels


def _fitted(spec: TowerSpec, claims: Claims, changes: Mapping[str, Any], path: Path) -> TowerSpec:
    """Return the specification for the image size of the image processor, with the changes of the caller."""
    architecture = ARCHITECTURES[spec.architecture]
    pooling = changes.get("pooling", spec.pooling)
    if pooling not in architecture.poolings:
        raise unknown_name(f"pooling of a {architecture.title}", pooling, architecture.poolings)
    asked = changes.get("image_size")
    near = spec.patch_size if asked is None else max(1, round(asked / spec.patch_size)) * spec.patch_size
    if asked not in (None, near):
        raise IncompatibleTowerError(
            f"`image_size={asked}` is not a multiple of the tower's patch size {spec.patch_size}: try {near}"
        )
    size = asked or claims.input_size or spec.image_size
    return checked(TowerSpec, {**spec.model_dump(), "image_size": size, "pooling": pooling}, path)


def _compare_kind(architecture: Architecture, claims: Claims, path: Path) -> None:
    """Reject a config of another architecture than that of the weights."""
    claimed = claims.fields.get("architecture", architecture.name)
    if claimed != architecture.name:
        raise UnsupportedCheckpointError(
            f"{claims.file} describes a {ARCHITECTURES[claimed].title} tower, but the weights in {path} are those of a "
            f"{architecture.title}: expected the config of these weights; take both from the same folder"
        )


def _layout(plan: KeyPlan) -> str:
    if plan.naming.layout != OPEN_CLIP:
        return plan.naming.layout
    if plan.prefix.endswith("clip.visual."):  # CLIPBaseline stores open_clip's model as self.clip
        return OFFICIAL
    return OPENAI if "OpenAI constants" in plan.dropped else OPEN_CLIP


def _choose_activation(
    path: Path, layout: str, plan: KeyPlan, claims: Claims, option: Activation | None
) -> tuple[Activation, Origin]:
    stored, architecture = claims.fields.get("activation"), plan.architecture
    only = plan.naming.activation if stored is None else None
    known = (only,) if only else architecture.activations
    if stored is None and len(known) == 1 and option in (None, *known):
        return cast(Activation, known[0]), "architecture"
    if stored is None and option in (None, *known):
        default = _DEFAULTS[layout][0] if architecture is CLIP else cast(Activation, known[0])
        return (option, "option") if option else (default, "default")
    if stored is None:
        raise UnsupportedCheckpointError(
            f"{path}: `activation={option}`: a {architecture.title} has {' or '.join(known)}: leave the option out"
        )
    name = claims.names.get("activation", "activation")
    if stored not in known:
        raise UnsupportedCheckpointError(
            f"{claims.file}: field '{name}' is '{stored}': expected {' or '.join(sorted(known))}; "
            "a tower with another activation is not supported"
        )
    if option and option != stored:
        raise UnsupportedCheckpointError(
            f"{path}: `activation={option}` contradicts '{stored}', stored in {claims.file} as '{name}': "
            "leave the option out, or correct the file if it is wrong"
        )
    return cast(Activation, stored), "stored"


def _activation_warning(path: Path, layout: str, architecture: Architecture, chosen: Activation) -> str:
    other = next(name for name in architecture.activations if name != chosen)
    if architecture is SIGLIP:
        return (
            f"{path}: the activation is not stored; using {chosen}, with which SigLIPs are trained. timm computes most "
            f"of its own with {other}: pass `activation={other}` for its numbers, or `activation={chosen}` to confirm"
        )
    return (
        f"{path}: the activation is not stored; using {chosen}, the default for an {layout}. If the tower was "
        f"trained with {other}, there is no error, but its features are about 1 % off and answers are worse: "
        f"then pass `activation={other}`; if {chosen} is right, pass `activation={chosen}`"
    )


def _pixels_warning(path: Path, layout: str, architecture: Architecture, pixels: Mapping[str, Any]) -> str:
    what = f"an {layout}" if architecture is CLIP else f"a {architecture.title}"
    return (
        f"{path}: mean, std and resize rule are not stored; using those of {what}: "
        f"mean {_figures(pixels['mean'])}, std {_figures(pixels['std'])}, {pixels['resize']}"
    )


def _leftovers_warning(plan: KeyPlan, path: Path) -> list[str]:
    if not plan.unknown:
        return []
    return [
        f"{path}: {len(plan.unknown)} tensors outside the tower are left out, such as '{plan.unknown[0]}'"
    ]


def _grid_warning(stored: TowerSpec, spec: TowerSpec, path: Path) -> list[str]:
    if spec.grid == stored.grid:
        return []
    reads = ARCHITECTURES[spec.architecture].model_class
    return [
        f"{path}: its image size is {spec.image_size} px, but its position table is for {stored.image_size} px: "
        f"the table is resampled to {spec.grid}x{spec.grid} patches, as {reads} does"
    ]


def _weights_warning(checkpoint: WeightFile, chosen: WeightSet | None) -> list[str]:
    path, sets = checkpoint.path, checkpoint.sets
    if chosen is not None or "ema" not in sets:
        return []
    if "raw" not in sets:
        return [
            f"{path} contains a moving average of the weights ('{sets['ema']}') and not the weights themselves"
        ]
    return [
        f"{path} contains two sets of weights, raw ones ('{sets['raw']}') and their moving average ('{sets['ema']}'); "
        "using the raw ones: pass `weights=ema` for the average, which is often better, or `weights=raw` to confirm"
    ]


def _measure(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> dict[str, int]:
    """Return the fields of ``TowerSpec`` that follow from the shapes of the weights."""

    def shape(name: str, dims: int) -> torch.Size:
        found = tensors[name].shape
        if len(found) != dims:
            raise UnsupportedCheckpointError(
                f"{path}: tensor '{name}' has shape {list(found)}: expected {dims} dimensions"
            )
        return found

    if tensors[architecture.patches].ndim == 2:
        raise UnsupportedCheckpointError(
            f"{path}: its patches are embedded by a matrix, as in a NaFlex SigLIP 2, whose images keep their aspect "
            f"ratio: expected a convolution, as in a {architecture.title} with a fixed image size"
        )
    width, _, _, patch = shape(architecture.patches, 4)
    positions = shape(architecture.positions, architecture.positions_ndim)[-2]
    grid = isqrt(max(positions - architecture.leading, 0))
    if grid < 1 or architecture.leading + grid * grid != positions:
        rows = "a class token and a square grid" if architecture.leading else "a square grid"
        raise UnsupportedCheckpointError(f"{path}: the position table has {positions} rows: expected {rows}")
    blocks = f"{architecture.blocks}."
    measured = {
        "width": width,
        "depth": len(
            {name.removeprefix(blocks).split(".")[0] for name in tensors if name.startswith(blocks)}
        ),
        "mlp_width": shape(f"{blocks}0.mlp.fc1.weight", 2)[0],
        "patch_size": patch,
        "image_size": grid * patch,
    }
    if architecture.registers is not None:
        measured["registers"] = shape(architecture.registers, 3)[1]
    return measured | ({"projection_dim": shape(PROJECTION, 2)[0]} if PROJECTION in tensors else {})


def _compare(measured: Mapping[str, int], claims: Claims, path: Path) -> None:
    """Reject a config that describes another tower than the weights."""
    if claims.fields.get("projection_dim") and "projection_dim" not in measured:
        raise UnsupportedCheckpointError(
            f"{path} lacks {PROJECTION_FILE}, which {claims.file} requires: copy the whole folder"
        )
    patch = measured["patch_size"]
    for name, found in measured.items():
        claimed = claims.fields.get(name, found)
        rounded = claimed // patch * patch if name == "image_size" and isinstance(claimed, int) else claimed
        if rounded != found:
            theirs = claims.names.get(name, name)
            raise UnsupportedCheckpointError(
                f"{claims.file}: field '{theirs}' is {claimed}, but the weights in {path} have {found}: "
                "expected the config of these weights; take both from the same folder"
            )


def _check_shapes(tensors: Mapping[str, Tensor], spec: TowerSpec, path: Path) -> None:
    expected = ARCHITECTURES[spec.architecture].shapes(spec)
    if spec.projection_dim is not None and PROJECTION in tensors:
        expected[PROJECTION] = (spec.projection_dim, spec.width)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise UnsupportedCheckpointError(
                f"{path}: tensor '{name}' has shape {list(tensor.shape)}: expected {list(expected[name])} "
                f"in a tower of width {spec.width} and patch {spec.patch_size}"
            )
        if tensor.dtype not in FLOATS:
            raise UnsupportedCheckpointError(
                f"{path}: tensor '{name}' is {tensor.dtype}: expected floats, not quantized weights"
            )


def _figures(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3f}" for value in values)
