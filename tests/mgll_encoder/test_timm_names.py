"""SigLIPs and DINOv2s with registers by timm's names, held against timm; newer towers are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from open_clip import CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, Siglip2VisionConfig, Siglip2VisionModel

from mgll_encoder import UnsupportedCheckpointError, inspect_tower, load_tower, save_tower
from mgll_encoder.tower.architectures.siglip import SIGLIP, timm_activation
from tests.mgll_encoder.towers import scramble, state_of, write

PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5
SIZES = {"img_size": 56, "patch_size": 14, "embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 0}
TANH = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def siglip(activation: str = "gelu") -> VisionTransformer:
    """A SigLIP as timm builds it."""
    return scramble(
        VisionTransformer(**SIZES, class_token=False, global_pool="map", act_layer=TANH[activation])
    )


def with_registers() -> VisionTransformer:
    """A DINOv2 with registers as timm builds it: its class token contains its position."""
    return scramble(VisionTransformer(**SIZES, init_values=1e-5, reg_tokens=4, no_embed_class=True))


def features(model: nn.Module, pixels: Tensor = PIXELS) -> Tensor:
    with torch.inference_mode():
        return model(pixels)


@pytest.mark.parametrize("activation", SIGLIP.activations)
def test_a_siglip_gives_the_features_of_timm(activation: str, tmp_path: Path) -> None:
    model = siglip(activation)
    tower = load_tower(write(state_of(model), tmp_path / "siglip.pth"), activation=activation)
    assert (tower.spec.architecture, tower.spec.pooling, tower.spec.mean) == (
        "siglip",
        "attention",
        (0.5,) * 3,
    )
    torch.testing.assert_close(tower.pooled(PIXELS), features(model), rtol=0, atol=TOLERANCE)
    by_name = {key: tower.header.read(key) for key in tower.header.tensors}
    assert all(torch.equal(value, tower.model.state_dict()[key]) for key, value in by_name.items())
    again = load_tower(save_tower(tower, tmp_path / "saved"))
    torch.testing.assert_close(again.pooled(PIXELS), tower.pooled(PIXELS), rtol=0, atol=0)
    assert again.spec.activation == activation


def test_the_activation_is_that_of_training_and_said_to_be_assumed(tmp_path: Path) -> None:
    path = write(state_of(siglip()), tmp_path / "siglip.pth")
    header = inspect_tower(path)
    assert (header.spec.activation, header.activation_source) == ("gelu_pytorch_tanh", "default")
    assert "pass `activation=gelu` for its numbers" in " ".join(header.warnings)
    assert (load_tower(path).pooled(PIXELS) - features(siglip_of(path))).abs().max() > TOLERANCE


def siglip_of(path: Path) -> VisionTransformer:
    model = siglip()
    model.load_state_dict(torch.load(path))
    return model


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {**state, "pos_embed": state["pos_embed"].flip(1)},
        lambda state: {**state, "attn_pool.kv.weight": state["attn_pool.kv.weight"].roll(128, 0)},
        lambda state: {**state, "attn_pool.q.bias": state["attn_pool.q.bias"] * 0},
        lambda state: {**state, "norm.weight": torch.ones_like(state["norm.weight"])},
    ],
    ids=["turned positions", "keys for values", "no query bias", "no last scale"],
)
def test_a_mistake_in_one_tensor_would_show(tmp_path: Path, spoil: Callable[[dict], dict]) -> None:
    model = siglip()
    tower = load_tower(write(spoil(state_of(model)), tmp_path / "spoilt.pth"), activation="gelu")
    assert (tower.pooled(PIXELS) - features(model)).abs().max() > 10 * TOLERANCE


def test_every_siglip_of_timm_has_the_activation_and_the_heads_of_the_table() -> None:
    names = [name for name in timm.list_models("vit_*siglip*") if "_gap_" not in name]
    assert len(names) > 10
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        tanh = isinstance(model.blocks[0].mlp.act, nn.GELU) and model.blocks[0].mlp.act.approximate == "tanh"
        tanh |= "tanh" in type(model.blocks[0].mlp.act).__name__.lower()
        assert timm_activation(name) == ("gelu_pytorch_tanh" if tanh else "gelu"), name
        assert SIGLIP.heads(model.embed_dim) == model.blocks[0].attn.num_heads, name


@pytest.mark.parametrize("model", ["vit_base_patch16_siglip_224", "vit_base_patch32_siglip_256"])
def test_an_open_clip_folder_with_a_siglip_says_its_activation(model: str, tmp_path: Path) -> None:
    vision = {"timm_model_name": model, "timm_pool": "map", "timm_proj": "none", "image_size": 56}
    tiny = siglip(timm_activation(model))
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    whole = CustomTextCLIP(128, {"width": 16, "layers": 1, "head_width": 8, "image_size": 16}, text)
    state = {f"visual.trunk.{name}": tensor for name, tensor in state_of(tiny).items()}
    state |= {name: t for name, t in whole.state_dict().items() if not name.startswith("visual.")}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": pixels})
    )
    tower = load_tower(tmp_path)
    assert (tower.spec.activation, tower.header.activation_source) == (timm_activation(model), "stored")
    torch.testing.assert_close(tower.pooled(PIXELS), features(tiny), rtol=0, atol=TOLERANCE)


def test_a_dinov2_with_registers_gives_the_features_of_timm(tmp_path: Path) -> None:
    model = with_registers()
    tower = load_tower(write(state_of(model), tmp_path / "vit_base_patch14_reg4_dinov2.pth"))
    assert (tower.spec.architecture, tower.spec.registers, tower.spec.image_size) == (
        "dinov2_with_registers",
        4,
        56,
    )
    torch.testing.assert_close(tower.pooled(PIXELS), features(model), rtol=0, atol=TOLERANCE)
    by_name = {key: tower.header.read(key) for key in tower.header.tensors}
    assert all(torch.equal(value, tower.model.state_dict()[key]) for key, value in by_name.items())
    again = load_tower(save_tower(tower, tmp_path / "saved"))
    torch.testing.assert_close(again.pooled(PIXELS), tower.pooled(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {**state, "reg_token": state["reg_token"] * 0},
        lambda state: {**state, "cls_token": state["cls_token"] + state["pos_embed"][:, :1]},
        lambda state: {**state, "pos_embed": state["pos_embed"].roll(1, 1)},
    ],
    ids=["no registers", "a position for the class token", "shifted positions"],
)
def test_a_mistake_in_registers_or_positions_would_show(
    tmp_path: Path, spoil: Callable[[dict], dict]
) -> None:
    model = with_registers()
    tower = load_tower(write(spoil(state_of(model)), tmp_path / "spoilt.pth"))
    assert (tower.pooled(PIXELS) - features(model)).abs().max() > 100 * TOLERANCE


def dinov3() -> DINOv3ViTModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4))


def naflex() -> Siglip2VisionModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16))


@pytest.mark.parametrize(
    ("build", "named"),
    [(dinov3, "describes a DINOv3, whose positions are rotary"), (naflex, "describes a NaFlex SigLIP 2")],
)
def test_folders_of_newer_towers_are_refused_by_name(
    build: Callable[[], nn.Module], named: str, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=named):
        inspect_tower(tmp_path)


def of_timm(name: str, **sizes: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = timm.create_model(name, **sizes)
    return {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}


METAS = {
    "cls_token": torch.zeros(1, 1, 32), "storage_tokens": torch.zeros(1, 4, 32), "mask_token": torch.zeros(1, 32),
    "rope_embed.periods": torch.zeros(8), "patch_embed.proj.weight": torch.zeros(32, 3, 16, 16),
    "patch_embed.proj.bias": torch.zeros(32), "blocks.0.ls1.gamma": torch.zeros(32),
    "blocks.0.norm1.weight": torch.zeros(32),
}  # fmt: skip
"""Some names of Meta's DINOv3 (facebookresearch/dinov3, dinov3/models/vision_transformer.py)."""


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda: METAS, "looks like a DINOv3, whose positions are rotary"),
        (lambda: state_of(dinov3()), "looks like a DINOv3, whose positions are rotary"),
        (lambda: of_timm("vit_small_patch16_dinov3", depth=1), "looks like a DINOv3, EVA or BEiT"),
        (lambda: of_timm("naflexvit_base_patch16_siglip", depth=1), "looks like a NaFlex ViT"),
        (lambda: state_of(naflex()), "as in a NaFlex SigLIP 2, whose images keep their aspect ratio"),
    ],
    ids=["Meta's DINOv3", "transformers' DINOv3", "timm's DINOv3", "timm's NaFlex", "NaFlex SigLIP 2"],
)
def test_weights_of_newer_towers_are_refused_by_name(
    state: Callable[[], dict[str, Tensor]], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=named):
        inspect_tower(write(state(), tmp_path / "tower.pth"))
