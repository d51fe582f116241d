"""DINOv2's ViT: ``Dinov2Model`` and ``Dinov2WithRegistersModel`` of transformers, files of timm and Meta.

A pre-norm ViT with a class token and a learned scale after attention and MLP of each block. Hosts read patch tokens
before the last LayerNorm, as transformers returns hidden states. The gated MLP of the giant model is not supported.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from mgll_encoder.tower.architectures.base import (
    CHANNELS,
    Architecture,
    ConfigFields,
    Naming,
    Shapes,
    affine,
    from_output,
    mlp,
)
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD, TowerSpec
from mgll_encoder.weights.keytable import Drop, KeyTable, Rule, Split, WithZeros, ZeroRow, renames


class Dinov2Fields(ConfigFields):
    """The fields of a ``Dinov2Config`` that are read, with its defaults."""

    mlp_ratio: PositiveInt = 4
    patch_size: PositiveInt = 14
    qkv_bias: Literal[True] = True
    use_swiglu_ffn: Literal[False] = False

    def spec(self) -> dict[str, Any]:
        """Return the fields of ``TowerSpec`` that they state."""
        return {**super().spec(), "mlp_width": self.hidden_size * self.mlp_ratio}


class Dinov2WithRegistersFields(Dinov2Fields):
    """The fields of a ``Dinov2WithRegistersConfig`` that are read, with its defaults."""

    names: ClassVar[Mapping[str, str]] = {**Dinov2Fields.names, "registers": "num_register_tokens"}

    patch_size: PositiveInt = 16
    num_register_tokens: PositiveInt = 4


def _settings(spec: TowerSpec) -> dict[str, Any]:
    return {"mlp_ratio": spec.mlp_width // spec.width}


def _shapes(spec: TowerSpec, registers: bool = False) -> Shapes:
    width, patch = spec.width, spec.patch_size
    block = {
        "norm1": (width,),
        "norm2": (width,),
        **{f"attention.{name}_proj": (width, width) for name in ("q", "k", "v", "o")},
        **mlp(spec),
    }
    layers: Shapes = {"layernorm": (width,)}
    scales: Shapes = {}
    for number in range(spec.depth):
        layers |= {f"encoder.layer.{number}.{name}": shape for name, shape in block.items()}
        scales |= {f"encoder.layer.{number}.layer_scale{part}.lambda1": (width,) for part in (1, 2)}
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, spec.patches + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, CHANNELS, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **scales,
        **affine(layers),
        **(_register_shapes(spec) if registers else {}),
    }


def _register_shapes(spec: TowerSpec) -> Shapes:
    return {_MASK: (1, spec.width), _REGISTERS: (1, spec.registers, spec.width)}


_NAMES = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.{weight,bias}",
    "encoder.layer.{}.norm{1,2}.{weight,bias}",
    "encoder.layer.{}.attention.{q,k,v,o}_proj.{weight,bias}",
    "encoder.layer.{}.layer_scale{1,2}.lambda1",
    "encoder.layer.{}.mlp.fc{1,2}.{weight,bias}",
    "layernorm.{weight,bias}",
)
"""Names in a loaded model."""

_ATTENTION, _PARTS = "encoder.layer.{}.attention.", ".{weight,bias}"
_WRITTEN = {
    f"{_ATTENTION}{ours}_proj{_PARTS}": f"{_ATTENTION}{theirs}{_PARTS}"
    for ours, theirs in {
        "q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense",
    }.items()
}  # fmt: skip
"""Names in a loaded model -> names in files of transformers; the others are the same."""

_LOADED = renames({name: name for name in _NAMES})
_FILES = {
    **renames({written: ours for ours, written in _WRITTEN.items()}),
    **{name: rule for name, rule in _LOADED.items() if "_proj" not in name},
}

_TIMM: dict[str, Rule] = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{weight,bias}": "embeddings.patch_embeddings.projection.{}",
    "blocks.{}.norm{1,2}.{weight,bias}": "encoder.layer.{}.norm{}.{}",
    "blocks.{}.attn.qkv.{weight,bias}": Split("encoder.layer.{}.attention.{q,k,v}_proj.{}"),
    "blocks.{}.attn.proj.{weight,bias}": "encoder.layer.{}.attention.o_proj.{}",
    "blocks.{}.ls{1,2}.gamma": "encoder.layer.{}.layer_scale{}.lambda1",
    "blocks.{}.mlp.fc{1,2}.{weight,bias}": "encoder.layer.{}.mlp.fc{}.{}",
    "norm.{weight,bias}": "layernorm.{}",
}
"""Names of Meta and of timm."""

_TIMM_REGISTERS = "reg_token"
_DINOV3 = ("rope_embed.periods", "storage_tokens")
_POSITIONS = "embeddings.position_embeddings"
_MASK, _REGISTERS = "embeddings.mask_token", "embeddings.register_tokens"


def _namings(
    more: Mapping[str, Rule], present: tuple[str, ...], absent: tuple[str, ...]
) -> tuple[Naming, ...]:
    def shorter(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name.removeprefix("embeddings.") for name in names)

    patches, scale = "embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layer_scale1."
    hf = "transformers state dict"
    return (
        Naming(
            "transformers", hf, patches, (scale, "encoder.layer.0.attention.attention.", *present),
            KeyTable({**_FILES, **more}), absent,
        ),
        Naming(
            "transformers 5", hf, patches, (scale, "encoder.layer.0.attention.q_proj.", *present),
            KeyTable({**_LOADED, **more}), absent,
        ),
        Naming(
            "timm", "DINOv2 state dict", "patch_embed.proj.weight", ("blocks.0.ls1.", *shorter(present)),
            KeyTable({**_TIMM, **dict(zip(shorter(more), more.values(), strict=True))}),
            (*shorter(absent), _TIMM_REGISTERS, *_DINOV3),
        ),
    )  # fmt: skip


DINOV2 = Architecture(
    name="dinov2",
    title="DINOv2",
    examples="facebook/dinov2-small to -large, RAD-DINO",
    reads="folders of transformers, Meta's and timm's `.pth`",
    model_type="dinov2",
    model_class="Dinov2Model",
    fields=Dinov2Fields,
    settings=lambda spec: {**_settings(spec), "use_mask_token": False},
    shapes=_shapes,
    written=KeyTable(renames(_WRITTEN)),
    namings=_namings({_MASK: Drop("mask token")}, (), (_REGISTERS,)),
    patches="embeddings.patch_embeddings.projection.weight",
    positions=_POSITIONS,
    positions_ndim=3,
    resampled=True,
    blocks="encoder.layer",
    activations=("gelu",),
    poolings={
        "class": from_output(lambda output, _: output.pooler_output),
        "mean": from_output(lambda output, first: output.last_hidden_state[:, first:].mean(dim=1)),
    },
    pixels={"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "crop"},
)

DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    name="dinov2_with_registers",
    title="DINOv2 with registers",
    examples="facebook/dinov2-with-registers-base",
    reads="folders of transformers, Meta's and timm's `.pth`",
    model_type="dinov2_with_registers",
    model_class="Dinov2WithRegistersModel",
    fields=Dinov2WithRegistersFields,
    settings=_settings,
    shapes=partial(_shapes, registers=True),
    namings=(
        *_namings({_MASK: _MASK, _REGISTERS: _REGISTERS}, (_REGISTERS,), ()),
        Naming(
            "timm, registers",
            "DINOv2 state dict",
            "patch_embed.proj.weight",
            ("blocks.0.ls1.", _TIMM_REGISTERS),
            KeyTable(
                # timm adds the position of the class token to the token itself, and has no mask token
                {**_TIMM, "pos_embed": ZeroRow(_POSITIONS), _TIMM_REGISTERS: WithZeros(_REGISTERS, _MASK)}
            ),
        ),
    ),
    registers=_REGISTERS,
    not_in_hosts="its register tokens are between class token and patch tokens, but hosts remove only the class token",
    antialias=True,
)
