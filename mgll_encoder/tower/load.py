"""Reads a vision tower from any supported format, as the transformers model of its architecture and a ``TowerSpec``.

The format is detected from the keys. Activation and preprocessing cannot be detected from the weights: they come from
the folder's config, from the caller, or from a default of the layout, which the header reports with a warning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from mgll_encoder.common.errors import IncompatibleTowerError, UnsupportedCheckpointError, unknown_name
from mgll_encoder.common.hub import at_hand
from mgll_encoder.tower.adapt import fit_positions
from mgll_encoder.tower.architectures import ARCHITECTURES, first_patch
from mgll_encoder.tower.architectures.base import Architecture
from mgll_encoder.tower.architectures.clip import CLIP, HF_STATE, OPEN_CLIP, PROJECTION
from mgll_encoder.tower.folder_metadata import HF_FOLDER, OPEN_CLIP_FOLDER, Claims, check_kind, read_claims
from mgll_encoder.tower.keymap import KeyPlan, plan_keys
from mgll_encoder.tower.spec import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Activation,
    Pooling,
    TowerSpec,
    checked,
)
from mgll_encoder.weights.finite import FLOATS, all_finite
from mgll_encoder.weights.torch_file import WeightSet
from mgll_encoder.weights.weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Origin = Literal["stored", "option", "default", "architecture"]

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


@dataclass(frozen=True)
class _Stored:
    """The opened files of a tower, and how their tensors map to those of a transformers model.

    Attributes:
        checkpoint: The files.
        plan: Where their keys go.
        grid: Patches along one side of the model's position table.
    """

    checkpoint: WeightFile
    plan: KeyPlan
    grid: int

    def read(self, name: str, *, as_stored: bool) -> Tensor:
        """Read one tensor, by its name in the model."""
        source = self._sources[name]
        (fused,) = self.checkpoint.read([source]).values()
        place = self.plan.taken[source]
        tensor = place.cut(fused)[place.targets.index(name)]
        return tensor if as_stored else self._fitted(name, tensor)

    def read_all(self) -> dict[str, Tensor]:
        """Read all tensors, by their names in the model."""
        state = self.plan.apply(self.checkpoint.read(self.plan.taken))
        return {name: self._fitted(name, tensor) for name, tensor in state.items()}

    def _fitted(self, name: str, tensor: Tensor) -> Tensor:
        if name != self.plan.architecture.positions:
            return tensor
        return fit_positions(tensor, self.plan.architecture, self.grid)

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {target: source for source, place in self.plan.taken.items() for target in place.targets}


@dataclass(frozen=True)
class TowerHeader:
    """An opened tower: what is known without reading its weights, and its tensors one at a time.

    Attributes:
        spec: The tower's specification.
        tensors: Name in the loaded model -> dtype and shape as stored.
        dropped: Tensors of the source that are left out, counted per group.
        layout: Format of the source, in words.
        source: The file or folder.
        files: Its weight files.
        activation_source: Where the activation comes from.
        preprocessing_source: Where mean, std and resize rule come from.
        warnings: What the user should know, one sentence each; empty if nothing was assumed.
        weights: Which of two sets of weights in the source these are; None if there is only one.
    """

    spec: TowerSpec
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    dropped: dict[str, int]
    layout: str
    source: Path
    files: tuple[Path, ...]
    activation_source: Origin
    preprocessing_source: Origin
    warnings: tuple[str, ...] = ()
    weights: WeightSet | None = None
    _stored: _Stored | None = field(default=None, repr=False, compare=False)

    def read(self, name: str, *, as_stored: bool = False) -> Tensor:
        """Read one tensor by its name in the loaded model, in its stored dtype.

        Args:
            name: The name.
            as_stored: Return a position table without resampling.

        Raises:
            UserError: it is not finite, or the file has been truncated.
        """
        assert self._stored is not None, "a tower in memory has no file"
        tensor = self._stored.read(name, as_stored=as_stored)
        _check_finite(name, tensor, self.source)
        return tensor

    @property
    def architecture(self) -> Architecture:
        """Architecture of the tower."""
        return ARCHITECTURES[self.spec.architecture]

    @property
    def parameters(self) -> int:
        """Number of weights of the tower, without the projection."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The stored dtypes, e.g. ``("float16",)``."""
        return tuple(sorted({str(dtype).removeprefix("torch.") for dtype, _ in self.tensors.values()}))


@dataclass
class Tower:
    """A tower in memory.

    Attributes:
        header: Its source and specification.
        model: The transformers model of its architecture, in eval mode: ``CLIPVisionModel``, ``Dinov2Model`` ...
        projection: Weight of the projection into the image-text space [projection_dim, width], or None.
            Image features are ``pooled(pixels) @ projection.T`` (not normalised).
    """

    header: TowerHeader
    model: "PreTrainedModel"
    projection: Tensor | None

    @property
    def spec(self) -> TowerSpec:
        """Specification of the tower."""
        return self.header.spec

    def pooled(self, pixels: Tensor) -> Tensor:
        """Compute features [N, width] of pixels [N, 3, S, S]; see `pooled`."""
        return pooled(self.model, self.spec, pixels)

    @classmethod
    def from_model(
        cls, model: "PreTrainedModel", spec: TowerSpec, projection: Tensor | None = None
    ) -> "Tower":
        """Wrap a model made in this process (for example by training) as a tower, for ``save_tower``.

        Args:
            model: A model of ``build_model(spec)``'s class and geometry.
            spec: Its specification, with the preprocessing it was trained with.
            projection: Weight [projection_dim, width], if it has one.
        """
        if projection is not None:
            spec = spec.model_copy(update={"projection_dim": projection.shape[0]})
        header = TowerHeader(
            spec=spec,
            tensors={name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()},
            dropped={},
            layout="model in memory",
            source=Path(),
            files=(),
            activation_source="stored",
            preprocessing_source="stored",
        )
        return cls(header, model.eval(), projection)


def inspect_tower(
    path: Path | str, *, activation: Activation | None = None, weights: WeightSet | None = None
) -> TowerHeader:
    """Read the header of a tower: keys, shapes and configs, no weights.

    Args:
        path: An official MGLL training checkpoint, an open_clip or OpenAI state dict (whole CLIP or
            ``visual`` only), a transformers folder (CLIPVisionModel, with projection, CLIPModel, Dinov2Model,
            Dinov2WithRegistersModel) or state dict, a folder written by ``save_tower``, or the hub id of any of these
            folders.
        activation: For sources that do not store it; must not contradict one that does. Attention heads are
            width // 64 unless a config says otherwise (OpenAI's rule; the default of open_clip and timm).
        weights: Of a training checkpoint with two sets of weights, ``ema`` for the moving average; None takes the raw
            ones, with a warning.

    Raises:
        UserError: the source is missing, damaged, of another architecture, or contradicts its config.
    """
    return _examine(at_hand(path, check_kind), activation, weights, {})


def tower_state_dict(
    path: Path | str, *, activation: Activation | None = None, weights: WeightSet | None = None
) -> tuple[TowerHeader, dict[str, Tensor]]:
    """Read a tower's tensors by their names in the loaded model, in their stored dtype.

    The projection is not among them. Arguments and errors as for ``load_tower``.
    """
    header, tensors, _ = _read(at_hand(path, check_kind), activation, weights, {})
    return header, tensors


def load_tower(
    path: Path | str,
    *,
    activation: Activation | None = None,
    dtype: torch.dtype | None = None,
    weights: WeightSet | None = None,
    image_size: int | None = None,
    pooling: Pooling | None = None,
) -> Tower:
    """Load a tower as the transformers model of its architecture.

    Args:
        path: As for ``inspect_tower``.
        activation: As for ``inspect_tower``.
        dtype: Dtype of the model; float32 by default, whatever is stored.
        weights: As for ``inspect_tower``.
        image_size: Input size in pixels, for which the position table is resampled; None for the stored one.
        pooling: How image features are computed, see `TowerSpec`; None for the stored way.

    Returns:
        The tower in eval mode on the CPU.

    Raises:
        UserError: as for ``inspect_tower``; the weights are not finite, the size is not a multiple of the patch size,
            or the architecture does not have this pooling.
    """
    fitted = {"image_size": image_size, "pooling": pooling}
    changes = {name: value for name, value in fitted.items() if value is not None}
    header, tensors, projection = _read(at_hand(path, check_kind), activation, weights, changes)
    dtype = dtype or torch.float32
    own = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}  # not the mapped file
    projection = None if projection is None else projection.to(dtype, copy=True).contiguous()
    return Tower(header, filled_model(header.spec, own), projection)


def filled_model(spec: TowerSpec, state: Mapping[str, Tensor]) -> "PreTrainedModel":
    """Build the transformers model of a specification from these tensors, without copying them, in eval mode."""
    with torch.device("meta"):  # do not initialize weights that are replaced
        model = build_model(spec)
    model.load_state_dict(state, assign=True)
    if ARCHITECTURES[spec.architecture].position_ids:
        rows = state[ARCHITECTURES[spec.architecture].positions].shape[-2]
        embeddings: Any = model.embeddings
        embeddings.position_ids = torch.nn.Buffer(torch.arange(rows)[None], persistent=False)
    model.eval()
    return model


def pooled(model: "PreTrainedModel", spec: TowerSpec, pixels: Tensor) -> Tensor:
    """Compute image features [N, width], before any projection.

    Args:
        model: A model of ``build_model(spec)``'s class.
        spec: Its specification, which states the ``pooling``.
        pixels: [N, 3, S, S].
    """
    architecture = ARCHITECTURES[spec.architecture]
    return architecture.poolings[spec.pooling](model, pixels, first_patch(spec))


def build_model(spec: TowerSpec) -> "PreTrainedModel":
    """Build the transformers model of a specification, with random weights."""
    import transformers

    kind: type[PreTrainedModel] = getattr(transformers, ARCHITECTURES[spec.architecture].model_class)
    return kind(vision_config(spec), **ARCHITECTURES[spec.architecture].options)


def vision_config(spec: TowerSpec) -> "PreTrainedConfig":
    """Build the transformers config of a tower."""
    import transformers

    architecture = ARCHITECTURES[spec.architecture]
    kind: type[PreTrainedConfig] = getattr(transformers, architecture.model_class).config_class
    return kind.from_dict(architecture.vision_settings(spec))


def _read(
    path: Path, activation: Activation | None, weights: WeightSet | None, changes: Mapping[str, Any]
) -> tuple[TowerHeader, dict[str, Tensor], Tensor | None]:
    header = _examine(path, activation, weights, changes)
    assert header._stored is not None, "_examine opened it"
    tensors = header._stored.read_all()
    if (projection := path / PROJECTION_FILE).is_file():
        tensors |= open_weights(projection).read([PROJECTION])
    for name, tensor in tensors.items():
        _check_finite(name, tensor, path)
    return header, tensors, tensors.pop(PROJECTION, None)


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if not all_finite(tensor):
        raise UnsupportedCheckpointError(
            f"{path}: tensor '{name}' contains NaN or infinite values: expected finite weights; "
            "use an earlier checkpoint of this training"
        )


def _examine(
    path: Path, activation: Activation | None, weights: WeightSet | None, changes: Mapping[str, Any]
) -> TowerHeader:
    if activation is not None and activation not in get_args(Activation):
        raise unknown_name("activation", activation, get_args(Activation))
    if weights is not None and weights not in get_args(WeightSet):
        raise unknown_name("`weights`", weights, get_args(WeightSet))
    checkpoint = open_weights(path, weights)
    claims = read_claims(path)
    plan = plan_keys(checkpoint.headers, str(path))
    architecture = plan.architecture
    _compare_kind(architecture, claims, path)
    layout = claims.layout or _layout(plan)
    tensors = plan.apply(checkpoint.headers)
    if (projection := path / PROJECTION_FILE).is_file():
        tensors |= open_weights(projection).headers

    warnings = list(claims.notes)
    if weights is None and "ema" in checkpoint.sets:
        warnings.append(_weights_warning(checkpoint))
    if plan.unknown:
        warnings.append(
            f"{path}: {len(plan.unknown)} tensors outside the tower are left out, such as '{plan.unknown[0]}'"
        )
    chosen, activation_source = _choose_activation(path, layout, architecture, claims, activation)
    if activation_source == "default":
        warnings.append(_activation_warning(path, layout, chosen))
    pixels: dict[str, Any] = {}
    preprocessing_source: Origin = "stored"
    if "mean" not in claims.fields:
        clip = architecture is CLIP
        pixels, preprocessing_source = dict(_DEFAULTS[layout][1] if clip else architecture.pixels), "default"
        what = f"an {layout}" if clip else f"a {architecture.title}"
        warnings.append(
            f"{path}: mean, std and resize rule are not stored; using those of {what}: "
            f"mean {_figures(pixels['mean'])}, std {_figures(pixels['std'])}, {pixels['resize']}"
        )
    measured = _measure(tensors, architecture, path)
    _compare(measured, claims, path)
    kind = {
        "architecture": architecture.name,
        "layer_norm_eps": plan.naming.layer_norm_eps or architecture.layer_norm_eps,
        "pooling": plan.naming.pooling or next(iter(architecture.poolings)),
    }
    fields = {"heads": max(1, measured["width"] // 64), **kind, **measured, **pixels, **claims.fields}
    spec = checked(TowerSpec, {**fields, "activation": chosen}, claims.file or path)
    _check_shapes(tensors, spec, path)
    stored, spec = spec, _fitted(spec, claims, changes, path)
    if spec.grid != stored.grid and "image_size" not in changes:
        warnings.append(
            f"{path}: its image size is {spec.image_size} px, but its position table is for {stored.image_size} px: "
            f"the table is resampled to {spec.grid}x{spec.grid} patches, as {architecture.model_class} does"
        )
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
        preprocessing_source=preprocessing_source,
        warnings=tuple(warnings),
        weights=checkpoint.taken if "ema" in checkpoint.sets else None,
        _stored=_Stored(checkpoint, plan, spec.grid),
    )


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
    path: Path, layout: str, architecture: Architecture, claims: Claims, option: Activation | None
) -> tuple[Activation, Origin]:
    stored = claims.fields.get("activation")
    known = architecture.activations
    if stored is None and len(known) == 1 and option in (None, *known):
        return cast(Activation, known[0]), "architecture"
    if stored is None and option in (None, *known):
        return (option, "option") if option else (_DEFAULTS[layout][0], "default")
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


def _activation_warning(path: Path, layout: str, chosen: Activation) -> str:
    other = next(name for name in CLIP.activations if name != chosen)
    return (
        f"{path}: the activation is not stored; using {chosen}, the default for an {layout}. If the tower was "
        f"trained with {other}, there is no error, but its features are about 1 % off and answers are worse: "
        f"then pass `activation={other}`; if {chosen} is right, pass `activation={chosen}`"
    )


def _weights_warning(checkpoint: WeightFile) -> str:
    path, sets = checkpoint.path, checkpoint.sets
    if "raw" not in sets:
        return f"{path} contains a moving average of the weights ('{sets['ema']}') and not the weights themselves"
    return (
        f"{path} contains two sets of weights, raw ones ('{sets['raw']}') and their moving average ('{sets['ema']}'); "
        "using the raw ones: pass `weights=ema` for the average, which is often better, or `weights=raw` to confirm"
    )


def _measure(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> dict[str, int]:
    """Return the fields of ``TowerSpec`` that follow from the shapes of the weights."""

    def shape(name: str, dims: int) -> torch.Size:
        found = tensors[name].shape
        if len(found) != dims:
            raise UnsupportedCheckpointError(
                f"{path}: tensor '{name}' has shape {list(found)}: expected {dims} dimensions"
            )
        return found

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
