"""Reading a vision tower from whatever it was saved as: one ``CLIPVisionModel``, one contract.

What a file is, is told by its keys. What the weights cannot tell (activation, preprocessing) comes from the
folder's config, from the caller, or from a default of the layout, which the header reports with what may follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError, unknown_name
from mgll_encoder.common.hub import at_hand
from mgll_encoder.tower.clip_vision import vision_settings, vision_shapes
from mgll_encoder.tower.folder_metadata import HF_FOLDER, OPEN_CLIP_FOLDER, Claims, check_kind, read_claims
from mgll_encoder.tower.keymap import PROJECTION, KeyPlan, plan_keys
from mgll_encoder.tower.spec import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Activation,
    TowerSpec,
    checked,
)
from mgll_encoder.weights.finite import FLOATS, all_finite
from mgll_encoder.weights.torch_file import WeightSet
from mgll_encoder.weights.weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

Origin = Literal["stored", "option", "default"]

PROJECTION_FILE = "visual_projection.safetensors"

_CLIP_PIXELS: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize": "crop"}
_MGLL_PIXELS: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "squash"}

OFFICIAL, OPENAI, OPEN_CLIP = "mgll training checkpoint", "OpenAI state dict", "open_clip state dict"
HF_STATE = "transformers state dict"

_DEFAULTS: dict[str, tuple[Activation, dict[str, Any]]] = {
    OFFICIAL: ("gelu", _MGLL_PIXELS),
    OPENAI: ("quick_gelu", _CLIP_PIXELS),
    OPEN_CLIP: ("gelu", _CLIP_PIXELS),
    HF_STATE: ("quick_gelu", _CLIP_PIXELS),
    HF_FOLDER: ("quick_gelu", _CLIP_PIXELS),
    OPEN_CLIP_FOLDER: ("gelu", _CLIP_PIXELS),
}
"""Layout -> activation and preprocessing where the source says nothing. Why:

- official MGLL: its code builds ``ViT-L-14`` with open_clip >= 2.29 (older ones crash on its ``clip.text``),
  which gives exact GELU even around OpenAI's weights; its data pipeline is a squash with ImageNet mean and std;
- OpenAI (told by the constants ``input_resolution`` ... in the file): trained with QuickGELU;
- other open_clip files: what open_clip's own ``ViT-L-14`` config gives;
- transformers: the default of ``CLIPVisionConfig``.
"""


@dataclass(frozen=True)
class _Stored:
    """The opened files of a tower, and how their tensors become those of a ``CLIPVisionModel``."""

    checkpoint: WeightFile
    plan: KeyPlan

    def read(self, name: str) -> Tensor:
        """One tensor, by the name that it will have."""
        source = self._sources[name]
        (fused,) = self.checkpoint.read([source]).values()
        place = self.plan.taken[source]
        return place.cut(fused)[place.targets.index(name)]

    def read_all(self) -> dict[str, Tensor]:
        """All tensors, by the names that they will have."""
        return self.plan.apply(self.checkpoint.read(self.plan.taken))

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {target: source for source, place in self.plan.taken.items() for target in place.targets}


@dataclass(frozen=True)
class TowerHeader:
    """An opened tower: what is known of it without reading its weights, and its tensors one at a time.

    Attributes:
        spec: The vision contract.
        tensors: ``CLIPVisionModel`` key (without ``vision_model.``) -> dtype and shape as stored.
        dropped: Tensors of the source that are left out, counted per group.
        layout: What the source is, in words.
        source: The file or folder.
        files: Its weight files.
        activation_source: Where the activation comes from.
        preprocessing_source: Where mean, std and resize rule come from.
        warnings: What the user should know, one sentence each; empty where nothing was assumed.
        weights: Which of two sets of weights in the source these are; None where there is one.
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

    def read(self, name: str) -> Tensor:
        """The tensor of a ``CLIPVisionModel`` key (without ``vision_model.``), in its stored dtype.

        Raises:
            UserError: it is not finite, or the file has been cut short.
        """
        assert self._stored is not None, "a tower in memory is not read"
        tensor = self._stored.read(name)
        _check_finite(name, tensor, self.source)
        return tensor

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
        header: Where it comes from and its contract.
        model: ``CLIPVisionModel`` in eval mode.
        projection: Weight of the projection into the image-text space [projection_dim, width], or None.
            Pooled features are ``model(pixels).pooler_output @ projection.T`` (not normalised).
    """

    header: TowerHeader
    model: "CLIPVisionModel"
    projection: Tensor | None

    @property
    def spec(self) -> TowerSpec:
        """The vision contract."""
        return self.header.spec

    @classmethod
    def from_model(
        cls, model: "CLIPVisionModel", spec: TowerSpec, projection: Tensor | None = None
    ) -> "Tower":
        """A tower around a model made in this process (by training, for example), ready for ``save_tower``.

        Args:
            model: A model of ``build_model(spec)``'s class and geometry.
            spec: Its contract, with the preprocessing it was trained with.
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
            ``visual`` only), a transformers folder (CLIPVisionModel, with projection, or CLIPModel) or state
            dict, a folder written by ``save_tower``, or the hub id of any of these folders.
        activation: For sources that do not store it; must not contradict one that does. Attention heads are
            width // 64 where no config says otherwise (OpenAI's rule; open_clip's default head width).
        weights: Of a training checkpoint with two sets of weights, ``ema`` for the moving average; None takes the raw
            ones, with a warning.

    Raises:
        UserError: the source is missing, damaged, of another architecture, or contradicts its config.
    """
    return _examine(at_hand(path, check_kind), activation, weights)


def tower_state_dict(
    path: Path | str, *, activation: Activation | None = None, weights: WeightSet | None = None
) -> tuple[TowerHeader, dict[str, Tensor]]:
    """Read a tower's tensors by ``CLIPVisionModel`` key (without ``vision_model.``), in their stored dtype.

    The projection is not among them. Arguments and errors as for ``load_tower``.
    """
    header, tensors, _ = _read(at_hand(path, check_kind), activation, weights)
    return header, tensors


def load_tower(
    path: Path | str,
    *,
    activation: Activation | None = None,
    dtype: torch.dtype | None = None,
    weights: WeightSet | None = None,
) -> Tower:
    """Load a tower as a Hugging Face ``CLIPVisionModel``.

    Args:
        path: As for ``inspect_tower``.
        activation: As for ``inspect_tower``.
        dtype: Dtype of the model; float32 by default, whatever is stored.
        weights: As for ``inspect_tower``.

    Returns:
        The tower in eval mode on the CPU.

    Raises:
        UserError: as for ``inspect_tower``, and weights that are not finite.
    """
    header, tensors, projection = _read(at_hand(path, check_kind), activation, weights)
    dtype = dtype or torch.float32
    with torch.device("meta"):  # no weights are drawn only to be replaced
        model = build_model(header.spec)
    own = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}  # not the mapped file
    model.load_state_dict(own, assign=True)
    positions = torch.arange(1 + header.spec.patches)[None]  # in no state dict
    model.embeddings.position_ids = torch.nn.Buffer(positions, persistent=False)
    projection = None if projection is None else projection.to(dtype, copy=True).contiguous()
    return Tower(header, model.eval(), projection)


def build_model(spec: TowerSpec) -> "CLIPVisionModel":
    """A ``CLIPVisionModel`` of the contract's geometry, with random weights."""
    from transformers import CLIPVisionModel

    return CLIPVisionModel(vision_config(spec))


def vision_config(spec: TowerSpec) -> "CLIPVisionConfig":
    """The transformers config of a tower."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig.from_dict(vision_settings(spec))


def _read(
    path: Path, activation: Activation | None, weights: WeightSet | None
) -> tuple[TowerHeader, dict[str, Tensor], Tensor | None]:
    header = _examine(path, activation, weights)
    assert header._stored is not None, "it has just been opened"
    tensors = header._stored.read_all()
    if (aside := path / PROJECTION_FILE).is_file():
        tensors |= open_weights(aside).read([PROJECTION])
    for name, tensor in tensors.items():
        _check_finite(name, tensor, path)
    return header, tensors, tensors.pop(PROJECTION, None)


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if not all_finite(tensor):
        raise UnsupportedCheckpointError(
            f"{path}: tensor '{name}' holds NaN or infinite values: expected finite weights; "
            "take an earlier checkpoint of that training"
        )


def _examine(path: Path, activation: Activation | None, weights: WeightSet | None) -> TowerHeader:
    if activation is not None and activation not in get_args(Activation):
        raise unknown_name("activation", activation, get_args(Activation))
    if weights is not None and weights not in get_args(WeightSet):
        raise unknown_name("--weights", weights, get_args(WeightSet))
    checkpoint = open_weights(path, weights)
    claims = read_claims(path)
    plan = plan_keys(checkpoint.headers, str(path))
    layout = claims.layout or _layout(plan)
    tensors = plan.apply(checkpoint.headers)
    if (aside := path / PROJECTION_FILE).is_file():
        tensors |= open_weights(aside).headers

    warnings = list(claims.notes)
    if weights is None and "ema" in checkpoint.sets:
        warnings.append(_weights_warning(checkpoint))
    if plan.unknown:
        warnings.append(
            f"{path}: {len(plan.unknown)} tensors outside the tower are left out, such as '{plan.unknown[0]}'"
        )
    chosen, activation_source = _choose_activation(path, layout, claims, activation)
    if activation_source == "default":
        warnings.append(_activation_warning(path, layout, chosen))
    pixels: dict[str, Any] = {}
    preprocessing_source: Origin = "stored"
    if "mean" not in claims.fields:
        pixels, preprocessing_source = _DEFAULTS[layout][1], "default"
        warnings.append(
            f"{path}: mean, std and resize rule are not stored; taken as those of an {layout}: "
            f"mean {_figures(pixels['mean'])}, std {_figures(pixels['std'])}, {pixels['resize']}"
        )
    measured = _measure(tensors, path)
    _compare(measured, claims, path)
    fields = {"heads": max(1, measured["width"] // 64), **measured, **pixels, **claims.fields}
    spec = checked(TowerSpec, {**fields, "activation": chosen}, claims.file or path)
    _check_shapes(tensors, spec, path)

    return TowerHeader(
        spec=spec,
        tensors={name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name != PROJECTION},
        dropped=plan.dropped,
        layout=layout,
        source=path,
        files=checkpoint.files,
        activation_source=activation_source,
        preprocessing_source=preprocessing_source,
        warnings=tuple(warnings),
        weights=checkpoint.taken if "ema" in checkpoint.sets else None,
        _stored=_Stored(checkpoint, plan),
    )


def _layout(plan: KeyPlan) -> str:
    if plan.naming.name == "transformers":
        return HF_STATE
    if plan.prefix.endswith("clip.visual."):  # CLIPBaseline keeps open_clip's model as self.clip
        return OFFICIAL
    return OPENAI if "OpenAI constants" in plan.dropped else OPEN_CLIP


def _choose_activation(
    path: Path, layout: str, claims: Claims, option: Activation | None
) -> tuple[Activation, Origin]:
    stored = claims.fields.get("activation")
    if stored is None:
        return (option, "option") if option else (_DEFAULTS[layout][0], "default")
    name = claims.names.get("activation", "activation")
    if stored not in get_args(Activation):
        raise UnsupportedCheckpointError(
            f"{claims.file}: field '{name}' is '{stored}': expected {' or '.join(get_args(Activation))}; "
            "a tower with another activation is not supported"
        )
    if option and option != stored:
        raise UnsupportedCheckpointError(
            f"{path}: --activation {option} contradicts '{stored}', stored in {claims.file} as '{name}': "
            "leave the option out, or correct the file if it is wrong"
        )
    return stored, "stored"


def _activation_warning(path: Path, layout: str, chosen: Activation) -> str:
    other = next(name for name in get_args(Activation) if name != chosen)
    return (
        f"{path}: the activation is not stored; taken as {chosen}, the default for an {layout}. If the tower "
        f"was trained with {other}, nothing fails, but its features are about 1 % off and answers silently worse: "
        f"then pass --activation {other}; if {chosen} is right, say so with --activation {chosen}"
    )


def _weights_warning(checkpoint: WeightFile) -> str:
    path, sets = checkpoint.path, checkpoint.sets
    if "raw" not in sets:
        return (
            f"{path} holds a moving average of the weights ('{sets['ema']}') and not the weights themselves"
        )
    return (
        f"{path} holds two sets of weights, raw ones ('{sets['raw']}') and their moving average ('{sets['ema']}'); "
        "the raw ones are taken: pass --weights ema for the average, which is often the better one, or --weights raw "
        "to say so"
    )


def _measure(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """What the weights tell of a contract."""

    def shape(name: str, dims: int) -> torch.Size:
        found = tensors[name].shape
        if len(found) != dims:
            raise UnsupportedCheckpointError(
                f"{path}: tensor '{name}' has shape {list(found)}: expected {dims} dimensions"
            )
        return found

    patch = shape("embeddings.patch_embedding.weight", 4)[-1]
    positions = shape("embeddings.position_embedding.weight", 2)[0]
    grid = isqrt(max(positions - 1, 0))
    if grid < 1 or 1 + grid * grid != positions:
        raise UnsupportedCheckpointError(
            f"{path}: the position table has {positions} rows: expected a class token and a square grid"
        )
    measured = {
        "width": shape("embeddings.class_embedding", 1)[0],
        "depth": sum(name.endswith(".layer_norm1.weight") for name in tensors),
        "mlp_width": shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "patch_size": patch,
        "image_size": grid * patch,
    }
    return measured | ({"projection_dim": shape(PROJECTION, 2)[0]} if PROJECTION in tensors else {})


def _compare(measured: Mapping[str, int], claims: Claims, path: Path) -> None:
    """Refuse a config that describes another tower than the weights."""
    if claims.fields.get("projection_dim") and "projection_dim" not in measured:
        raise UnsupportedCheckpointError(
            f"{path} lacks {PROJECTION_FILE}, which {claims.file} promises: copy the whole folder"
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
    expected = vision_shapes(spec)
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
                f"{path}: tensor '{name}' is {tensor.dtype}: expected floats, not quantised weights"
            )


def _figures(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3f}" for value in values)
