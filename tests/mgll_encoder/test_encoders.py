"""Encoders other than CLIP: read from the files that people have, and equal to the library that defines them."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CustomTextCLIP
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mgll_encoder import IncompatibleTowerError, inspect_tower, load_tower, save_tower
from mgll_encoder.cli import main
from mgll_encoder.common.errors import UnknownNameError, UnsupportedCheckpointError
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.phantom.dataset import write_phantom
from mgll_encoder.probing.explain import ATTENTION, Target, attention_maps, target_maps
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from tests.builders import invoke, refused
from tests.mgll_encoder.towers import scramble, state_of, write

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 56,
}
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5
"""What two implementations in float32 may differ by."""


def dinov2(**changes: object) -> Dinov2Model:
    return scramble(Dinov2Model(Dinov2Config(**{**SIZES, **changes})))


def with_registers(**changes: object) -> Dinov2WithRegistersModel:
    return scramble(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**SIZES, **changes})))


def siglip(**changes: object) -> SiglipVisionModel:
    return scramble(SiglipVisionModel(SiglipVisionConfig(**{**SIZES, "intermediate_size": 64, **changes})))


def vit(**changes: object) -> ViTModel:
    config = ViTConfig(**{**SIZES, "intermediate_size": 64, **changes})
    return scramble(ViTModel(config, add_pooling_layer=False))


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "dinov2": dinov2, "dinov2_with_registers": with_registers, "siglip": siglip, "vit": vit,
}  # fmt: skip
USUAL_FEATURES: dict[str, Callable[[Any], Tensor]] = {
    "dinov2": lambda output: output.pooler_output,
    "dinov2_with_registers": lambda output: output.pooler_output,
    "siglip": lambda output: output.pooler_output,
    "vit": lambda output: output.last_hidden_state[:, 0],
}
every = pytest.mark.parametrize("name", MODELS)
resampled = pytest.mark.parametrize("name", [row.name for row in ARCHITECTURES.values() if row.resampled])


def saved(name: str, folder: Path, processor_size: int | None = None) -> PreTrainedModel:
    """A folder as it is published, and the model that it holds."""
    model = MODELS[name]()
    model.save_pretrained(folder)
    if processor_size:
        BitImageProcessor(
            size={"shortest_edge": processor_size + 4}, crop_size=processor_size,
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        ).save_pretrained(folder)  # fmt: skip
    return model


def hidden(model: nn.Module, pixels: Tensor, **options: object) -> Tensor:
    """All hidden states, [layers + 1, N, tokens, C]."""
    with torch.inference_mode():
        return torch.stack(model(pixels, output_hidden_states=True, **options).hidden_states)


@every
def test_a_published_folder_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path, 56)
    tower = load_tower(tmp_path)
    assert tower.spec.architecture == name
    assert (tower.spec.width, tower.spec.depth, tower.spec.heads, tower.spec.image_size) == (32, 3, 4, 56)
    config = model.config
    assert (tower.spec.activation, tower.spec.layer_norm_eps) == (config.hidden_act, config.layer_norm_eps)
    assert (tower.header.activation_source, tower.header.preprocessing_source) == ("stored", "stored")
    torch.testing.assert_close(hidden(tower.model, PIXELS), hidden(model, PIXELS), rtol=0, atol=0)
    torch.testing.assert_close(tower.pooled(PIXELS), USUAL_FEATURES[name](model(PIXELS)), rtol=0, atol=0)
    by_name = {key: inspect_tower(tmp_path).read(key) for key in tower.header.tensors}
    assert all(torch.equal(value, tower.model.state_dict()[key]) for key, value in by_name.items())
    assert by_name.keys() == tower.model.state_dict().keys()


@resampled
def test_images_of_another_size_than_the_position_table_are_taken_as_transformers_takes_them(
    name: str, tmp_path: Path
) -> None:
    """facebook/dinov2-base has a table for 518 px beside an image processor for 224 px."""
    model = saved(name, tmp_path, 28)
    tower = load_tower(tmp_path)
    assert tower.spec.image_size == 28
    assert "its image size is 28 px, but its position table is for 56 px" in " ".join(tower.header.warnings)
    small = PIXELS[..., :28, :28]
    torch.testing.assert_close(hidden(tower.model, small), hidden(model, small), rtol=0, atol=0)


@every
def test_a_tower_is_refitted_to_other_sizes_as_transformers_does_at_run_time(
    name: str, tmp_path: Path
) -> None:
    model = saved(name, tmp_path)
    for side in (28, 42, 84):
        fitted = load_tower(tmp_path, image_size=side)
        pixels = torch.nn.functional.interpolate(PIXELS, side)
        options = {} if fitted.header.architecture.resampled else {"interpolate_pos_encoding": True}
        expected = hidden(model, pixels, **options)
        torch.testing.assert_close(hidden(fitted.model, pixels), expected, rtol=0, atol=0)
    with pytest.raises(
        IncompatibleTowerError,
        match=r"`image_size=50` is not a multiple of the tower's patch size 14: try 56",
    ):
        load_tower(tmp_path, image_size=50)


@every
def test_what_is_saved_is_an_ordinary_folder(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "source")
    folder = save_tower(load_tower(tmp_path / "source"), tmp_path / "saved")
    again, report = type(model).from_pretrained(
        folder, output_loading_info=True, **ARCHITECTURES[name].options
    )
    assert not any(report.values())
    torch.testing.assert_close(hidden(again, PIXELS), hidden(model, PIXELS), rtol=0, atol=0)
    assert load_tower(folder).spec == load_tower(tmp_path / "source").spec
    assert model.config.architectures[0] in (folder / "README.md").read_text(encoding="utf-8")
    optional = {"embeddings.mask_token"} if name == "dinov2" else set()
    published = {
        key.removeprefix("vision_model.") for key in load_file(tmp_path / "source" / "model.safetensors")
    }
    written = {key.removeprefix("vision_model.") for key in load_file(folder / "model.safetensors")}
    assert written == published - optional


@every
def test_without_an_image_processor_the_architecture_tells(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    header = inspect_tower(tmp_path)
    assert header.preprocessing_source == "default"
    assert header.spec.mean == ((0.5,) * 3 if name == "siglip" else IMAGENET_MEAN)
    assert f"using those of a {header.architecture.title}: " in header.warnings[0]


def timm_dinov2() -> VisionTransformer:
    """A DINOv2 by timm's code, whose names are Meta's."""
    return scramble(
        VisionTransformer(
            img_size=56, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1e-5, num_classes=0,
            global_pool="token",
        )
    )  # fmt: skip


def timm_hidden(model: VisionTransformer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks' outputs [depth, N, tokens, C], and pooled features."""
    with torch.inference_mode():
        tokens = model._pos_embed(model.patch_embed(pixels))
        states = []
        for block in model.blocks:
            tokens = block(tokens)
            states.append(tokens)
        return torch.stack(states), model(pixels)


def test_metas_file_gives_the_features_of_timm(tmp_path: Path) -> None:
    model = timm_dinov2()
    state = {**state_of(model), "mask_token": torch.zeros(1, 128)}
    tower = load_tower(write(state, tmp_path / "dinov2_vits14_pretrain.pth"))
    states, pooled = timm_hidden(model, PIXELS)
    torch.testing.assert_close(hidden(tower.model, PIXELS)[1:], states, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tower.pooled(PIXELS), pooled, rtol=0, atol=TOLERANCE)
    assert tower.header.layout == "DINOv2 state dict"
    assert tower.header.dropped == {"mask token": 1}
    assert (tower.header.activation_source, tower.header.preprocessing_source) == ("architecture", "default")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {**state, **{k: torch.ones_like(v) for k, v in state.items() if ".ls" in k}},
        lambda state: {**state, "norm.weight": torch.ones_like(state["norm.weight"])},
        lambda state: {**state, "pos_embed": state["pos_embed"].flip(1)},
        lambda state: {**state, **{k: v.roll(1, 0) for k, v in state.items() if k.endswith("qkv.weight")}},
    ],
    ids=["no layer scale", "no last scale", "turned positions", "rolled qkv"],
)
def test_a_mistake_in_one_tensor_would_show(tmp_path: Path, spoil: Callable[[dict], dict]) -> None:
    model = timm_dinov2()
    tower = load_tower(write(spoil(state_of(model)), tmp_path / "spoilt.pth"))
    assert (tower.pooled(PIXELS) - timm_hidden(model, PIXELS)[1]).abs().max() > 100 * TOLERANCE


def test_another_activation_would_show(tmp_path: Path) -> None:
    model = timm_dinov2()
    tower = load_tower(write(state_of(model), tmp_path / "tower.pth"))
    for module in tower.model.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = nn.GELU(approximate="tanh")
    assert (tower.pooled(PIXELS) - timm_hidden(model, PIXELS)[1]).abs().max() > TOLERANCE


def test_the_mean_of_the_patch_tokens_leaves_class_token_and_registers_out(tmp_path: Path) -> None:
    for name, first in {"dinov2": 1, "dinov2_with_registers": 5}.items():
        model = saved(name, tmp_path / name)
        tower = load_tower(tmp_path / name, pooling="mean")
        expected = model(PIXELS).last_hidden_state[:, first:].mean(dim=1)
        torch.testing.assert_close(tower.pooled(PIXELS), expected, rtol=0, atol=0)
        again = load_tower(save_tower(tower, tmp_path / f"{name} saved"))
        assert again.spec.pooling == "mean"
        torch.testing.assert_close(again.pooled(PIXELS), expected, rtol=0, atol=0)


def test_what_is_no_such_tower_is_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path / "gated")
    config = json.loads((tmp_path / "gated" / "config.json").read_text())
    (tmp_path / "gated" / "config.json").write_text(json.dumps({**config, "use_swiglu_ffn": True}))
    with pytest.raises(
        UnsupportedCheckpointError, match=r"not a valid config of a DINOv2: field 'use_swiglu_ffn' is True"
    ):
        inspect_tower(tmp_path / "gated")

    saved("dinov2", tmp_path / "mixed")
    state = state_of(with_registers())
    save_file(state, tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"describes a DINOv2 tower, but the weights in .* DINOv2 with registers",
    ):
        inspect_tower(tmp_path / "mixed")

    path = write(state_of(timm_dinov2()), tmp_path / "tower.pth")
    with pytest.raises(
        UnsupportedCheckpointError, match=r"`activation=quick_gelu`: a DINOv2 has gelu: leave the option out"
    ):
        inspect_tower(path, activation="quick_gelu")
    with pytest.raises(UnknownNameError, match=r"unknown pooling of a DINOv2 'max': .*known are class, mean"):
        load_tower(path, pooling="max")


def mae(pool: str = "token", depth: int = 3) -> VisionTransformer:
    """A ViT by timm's code, as MAE and RETFound build it."""
    return scramble(
        VisionTransformer(
            img_size=56, patch_size=14, embed_dim=128, depth=depth, num_heads=2, num_classes=5, global_pool=pool,
        )
    )  # fmt: skip


def timm_features(model: VisionTransformer, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.forward_head(model.forward_features(pixels), pre_logits=True)


@pytest.mark.parametrize(("pool", "pooling"), [("token", "class"), ("avg", "mean_norm")])
def test_a_fine_tuned_retfound_gives_the_features_of_timm(tmp_path: Path, pool: str, pooling: str) -> None:
    """RETFound's .pth: the model under 'model', beside epoch and arguments; its class token or its mean is pooled."""
    model = mae(pool)
    torch.save(
        {"model": state_of(model), "epoch": 3, "args": Namespace(lr=1e-3)}, tmp_path / "checkpoint-best.pth"
    )
    tower = load_tower(tmp_path / "checkpoint-best.pth")
    assert (tower.spec.architecture, tower.spec.pooling) == ("vit", pooling)
    assert tower.header.dropped == {"classifier": 2}
    states, _ = timm_hidden(model, PIXELS)
    torch.testing.assert_close(hidden(tower.model, PIXELS)[1:], states, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tower.pooled(PIXELS), timm_features(model, PIXELS), rtol=0, atol=TOLERANCE)
    other = load_tower(tmp_path / "checkpoint-best.pth", pooling="class" if pool == "avg" else "mean_norm")
    assert (other.pooled(PIXELS) - timm_features(model, PIXELS)).abs().max() > 100 * TOLERANCE
    again = load_tower(save_tower(tower, tmp_path / "saved"))
    torch.testing.assert_close(again.pooled(PIXELS), tower.pooled(PIXELS), rtol=0, atol=0)


def test_a_retfound_before_fine_tuning_is_the_encoder_of_an_mae(tmp_path: Path) -> None:
    model = mae()
    encoder = {name: value for name, value in state_of(model).items() if not name.startswith("head.")}
    decoder = {
        "mask_token": torch.zeros(1, 1, 64), "decoder_pos_embed": torch.zeros(1, 17, 64),
        "decoder_embed.weight": torch.zeros(64, 128), "decoder_blocks.0.norm1.weight": torch.zeros(64),
    }  # fmt: skip
    torch.save({"model": {**encoder, **decoder}}, tmp_path / "RETFound_mae.pth")
    tower = load_tower(tmp_path / "RETFound_mae.pth")
    assert tower.header.dropped == {"MAE decoder": 3, "mask token": 1}
    torch.testing.assert_close(tower.pooled(PIXELS), timm_features(model, PIXELS), rtol=0, atol=TOLERANCE)


def test_biomedclip_gives_the_image_features_of_open_clip(tmp_path: Path) -> None:
    """An open_clip model around timm's ViT, with a linear layer into the shared space."""
    vision = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 224,
    }
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    whole = scramble(CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text))
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(state_of(whole), tmp_path / "open_clip_pytorch_model.bin")
    tower = load_tower(tmp_path)
    assert (tower.spec.architecture, tower.spec.projection_dim, tower.spec.mean) == ("vit", 24, CLIP_MEAN)
    assert tower.projection is not None
    pixels = torch.nn.functional.interpolate(PIXELS, 224)
    with torch.inference_mode():
        expected = whole.encode_image(pixels)
        torch.testing.assert_close(
            tower.pooled(pixels) @ tower.projection.T, expected, rtol=0, atol=TOLERANCE
        )
        wrong = load_tower(tmp_path, pooling="mean").pooled(pixels) @ tower.projection.T
        usual = torch.tensor([CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD]).view(4, 3, 1, 1)
        normalized = (pixels * usual[1] + usual[0] - usual[2]) / usual[3]
        other_norm = tower.pooled(normalized) @ tower.projection.T
    assert (wrong - expected).abs().max() > 100 * TOLERANCE
    assert (other_norm - expected).abs().max() > 100 * TOLERANCE, "another normalization would show"


@pytest.mark.parametrize("name", ["siglip", "vit"])
def test_another_activation_or_epsilon_would_show(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    expected = USUAL_FEATURES[name](model(PIXELS))
    for setting, value in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-3)):
        config = type(model.config)(**{**model.config.to_dict(), setting: value})
        spoilt = type(model)(config, **ARCHITECTURES[name].options).eval()
        spoilt.load_state_dict(load_tower(tmp_path).model.state_dict())
        assert (USUAL_FEATURES[name](spoilt(PIXELS)) - expected).abs().max() > 10 * TOLERANCE


def test_a_whole_siglip_is_read_for_its_image_tower(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**SIZES, "intermediate_size": 64}
    whole = scramble(SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 20})))
    whole.save_pretrained(tmp_path)
    tower = load_tower(tmp_path)
    with torch.inference_mode():
        expected = whole.get_image_features(PIXELS).pooler_output
    torch.testing.assert_close(tower.pooled(PIXELS), expected, rtol=0, atol=0)
    assert tower.header.dropped["text tower"] > 10
    assert not any("outside the tower" in line for line in tower.header.warnings)


@every
def test_a_general_tower_learns_from_texts(name: str, tmp_path: Path) -> None:
    """A general tower, at a smaller size than it has, is trained with MGLL, probed, and compared with prompts."""
    general = saved(name, tmp_path / "general", 56)
    images = tmp_path / "set"
    write_phantom(images, 4, image_size=32)
    labels, manifest, out = images / "labels.csv", images / "manifest.jsonl", tmp_path / "tuned"
    build_fundus(FundusTable(labels), images, manifest, test_share=0.3)

    trained = invoke(
        main, "pretrain", "--manifest", manifest, "--init", tmp_path / "general", "--image-size", 28, "--pooling",
        "mean", "--epochs", 1, "--batch-size", 16, "--workers", 0, "--out", out,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    tuned = load_tower(out)
    assert (tuned.spec.architecture, tuned.spec.image_size, tuned.spec.pooling) == (name, 28, "mean")
    assert tuned.spec.projection_dim == 32
    layer = f"{tuned.header.architecture.blocks}.0.mlp.fc1.weight"
    assert (general.get_parameter(layer) != tuned.model.get_parameter(layer)).any()

    for words in (("probe",), ("zero-shot", "--all")):
        judged = invoke(
            main, *words, "--encoder", out, "--labels", labels, "--images", images, "--min-positives", 1,
            "--workers", 0,
        )  # fmt: skip
        assert judged.code == 0, judged.err
        assert "AUC" in judged.out


def test_options_of_a_start_need_one(tmp_path: Path) -> None:
    words = ("pretrain", "--manifest", tmp_path / "manifest.jsonl", "--out", tmp_path / "tower")
    (tmp_path / "manifest.jsonl").touch()
    for option, value in (("--image-size", 112), ("--pooling", "mean")):
        assert f"{option} is for --init: a new tower has the" in refused(main, *words, option, value)


@every
def test_maps_of_attention_and_of_a_target_are_those_of_the_patches(name: str, tmp_path: Path) -> None:
    """A patch that alone is changed is where the class token's attention moves, and the score is the tower's own."""
    saved(name, tmp_path)
    tower = load_tower(tmp_path, pooling="mean")
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1))
    maps, scores = target_maps(tower, PIXELS, Target("findings", "log-odds", lambda pooled: pooled @ weight))
    assert maps.shape == (2, 4, 4)
    torch.testing.assert_close(
        torch.from_numpy(scores), (tower.pooled(PIXELS) @ weight).detach(), rtol=1e-4, atol=1e-5
    )
    against, _ = target_maps(tower, PIXELS, Target("findings", "log-odds", lambda pooled: pooled @ -weight))
    assert ((maps > 0) != (against > 0)).all()  # every patch speaks for it or against it
    tower.model.set_attn_implementation("eager")
    with torch.inference_mode():
        last = tower.model(PIXELS, output_attentions=True).attentions[-1].mean(dim=1)
    leading = {"dinov2": 1, "dinov2_with_registers": 5, "siglip": 0, "vit": 1}[name]
    asking = last[:, 0] if leading else last.mean(dim=1)
    found = attention_maps(tower, PIXELS)[ATTENTION]
    torch.testing.assert_close(torch.from_numpy(found).flatten(1), asking[:, leading:], rtol=1e-4, atol=1e-6)


@every
def test_convert_writes_it_for_another_size_and_pooling_and_inspect_says_so(
    name: str, tmp_path: Path
) -> None:
    saved(name, tmp_path / "general")
    out = tmp_path / "small"
    words = ("convert", tmp_path / "general", "--image-size", 28, "--pooling", "mean", "--out", out)
    assert invoke(main, *words).code == 0
    told = json.loads(invoke(main, "inspect", out, "--json").out)
    assert (told["architecture"], told["image_size"], told["pooling"]) == (name, 28, "mean")
    assert told["registers"] == (4 if name == "dinov2_with_registers" else 0)
    assert ARCHITECTURES[name].title in invoke(main, "inspect", out).out


@every
def test_a_state_dict_of_the_loaded_model_is_read(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    tower = load_tower(write(state_of(model), tmp_path / "state.pt"))
    assert (tower.spec.architecture, tower.header.layout) == (name, "transformers state dict")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tower.model.state_dict().items())


def test_metas_file_with_registers_is_read(tmp_path: Path) -> None:
    """Meta's names of a DINOv2 with registers, which timm gives another position table."""
    model = with_registers(hidden_size=128, num_attention_heads=2)  # heads of 64, as no config says
    held = state_of(model)
    theirs = {
        "cls_token": held["embeddings.cls_token"], "pos_embed": held["embeddings.position_embeddings"],
        "register_tokens": held["embeddings.register_tokens"], "mask_token": held["embeddings.mask_token"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        theirs[f"patch_embed.proj.{kind}"] = held[f"embeddings.patch_embeddings.projection.{kind}"]
        theirs[f"norm.{kind}"] = held[f"layernorm.{kind}"]
        for block in range(3):
            ours, its = f"encoder.layer.{block}", f"blocks.{block}"
            parts = [held[f"{ours}.attention.{part}_proj.{kind}"] for part in "qkv"]
            theirs[f"{its}.attn.qkv.{kind}"] = torch.cat(parts)
            theirs[f"{its}.attn.proj.{kind}"] = held[f"{ours}.attention.o_proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"{its}.{part}.{kind}"] = held[f"{ours}.{part}.{kind}"]
            theirs |= {f"{its}.ls{n}.gamma": held[f"{ours}.layer_scale{n}.lambda1"] for n in (1, 2)}
    tower = load_tower(write(theirs, tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    assert tower.spec.registers == 4
    torch.testing.assert_close(hidden(tower.model, PIXELS), hidden(model, PIXELS), rtol=0, atol=0)
    spoilt = write({**theirs, "register_tokens": torch.zeros(1, 4, 128)}, tmp_path / "spoilt.pth")
    assert (hidden(load_tower(spoilt).model, PIXELS) - hidden(model, PIXELS)).abs().max() > 100 * TOLERANCE
