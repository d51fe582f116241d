"""What is said of each vision encoder without importing it is what transformers says."""

import json

import pytest
import torch
import transformers
from transformers import CLIPConfig, CLIPVisionConfig

from mgll_encoder import image_processor
from mgll_encoder.tower.architectures import ARCHITECTURES, described_by
from mgll_encoder.tower.architectures.base import Architecture
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.model import vision_config
from mgll_encoder.tower.preprocess import processor_settings
from mgll_encoder.tower.spec import PixelRule, Resize, TowerSpec

every = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def spec_of(architecture: Architecture) -> TowerSpec:
    more = {"registers": 3} if architecture.registers else {}
    return TowerSpec(
        architecture=architecture.name, width=32, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=42,
        activation=architecture.activations[-1], layer_norm_eps=1e-4, **more,
    )  # fmt: skip


def model_class(architecture: Architecture) -> type:
    return getattr(transformers, architecture.model_class)


@every
def test_the_shapes_are_those_of_the_model(architecture: Architecture) -> None:
    spec = spec_of(architecture)
    with torch.device("meta"):
        model = model_class(architecture)(vision_config(spec), **architecture.options)
    assert architecture.shapes(spec) == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    assert list(architecture.shapes(spec)).count(architecture.positions) == 1
    assert architecture.shapes(spec)[architecture.patches] == (32, 3, 14, 14)


@every
def test_the_settings_describe_the_same_tower_to_transformers(architecture: Architecture) -> None:
    spec = spec_of(architecture)
    config = vision_config(spec)
    assert isinstance(config, model_class(architecture).config_class)
    for ours, theirs in architecture.fields.names.items():
        assert getattr(config, theirs) == getattr(spec, ours)
    assert config.num_channels == 3
    said = architecture.spec_fields(config.to_dict())
    assert said == architecture.spec_fields(architecture.vision_settings(spec))
    assert said == {name: getattr(spec, name) for name in said}
    assert {"width", "depth", "heads", "mlp_width", "patch_size", "activation"} <= said.keys()


@every
def test_what_a_config_leaves_out_is_what_transformers_takes(architecture: Architecture) -> None:
    config = model_class(architecture).config_class()
    assert architecture.spec_fields({}) == architecture.spec_fields(config.to_dict())


def test_a_whole_clip_says_the_same_of_its_tower() -> None:
    whole = CLIPConfig(vision_config={"hidden_size": 64, "num_attention_heads": 4}).vision_config
    assert CLIP.spec_fields({"hidden_size": 64, "num_attention_heads": 4}) == CLIP.spec_fields(
        whole.to_dict()
    )


@every
def test_an_architecture_is_told_by_its_model_type(architecture: Architecture) -> None:
    assert described_by(architecture.model_type) is architecture
    assert architecture.model_type == model_class(architecture).config_class.model_type


def test_other_models_are_none_of_them() -> None:
    assert described_by("clip") is CLIP
    for other in ("llava", "clip_text_model", None, CLIPVisionConfig):
        assert described_by(other) is None


@every
@pytest.mark.parametrize("value", ["32", 0, 14.5, None])
def test_a_field_of_another_type_is_named(architecture: Architecture, value: object) -> None:
    with pytest.raises(ValueError, match=r"field 'patch_size' is .*"):
        architecture.spec_fields({"patch_size": value})


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_processor_is_written_as_transformers_writes_it(resize: Resize) -> None:
    rule = PixelRule(image_size=28, resize=resize)
    assert processor_settings(rule) == json.loads(image_processor(rule).to_json_string())
