"""The description of CLIPVisionModel without importing it agrees with transformers."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from mgll_encoder import image_processor
from mgll_encoder.tower.clip_vision import SPEC_FIELDS, spec_fields, vision_settings, vision_shapes
from mgll_encoder.tower.preprocess import processor_settings
from mgll_encoder.tower.spec import PixelRule, Resize, TowerSpec

SPEC = TowerSpec(
    width=32, depth=3, heads=4, mlp_width=80, patch_size=14, image_size=42, activation="gelu", layer_norm_eps=1e-6
)  # fmt: skip


def test_the_shapes_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**vision_settings(SPEC)))
    assert vision_shapes(SPEC) == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_the_settings_describe_the_same_tower_to_transformers() -> None:
    config = CLIPVisionConfig(**vision_settings(SPEC))
    assert {ours: getattr(config, theirs) for ours, theirs in SPEC_FIELDS.items()} == {
        ours: getattr(SPEC, ours) for ours in SPEC_FIELDS
    }
    assert config.num_channels == 3
    assert spec_fields(config.to_dict()) == spec_fields(vision_settings(SPEC))


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    config = CLIPVisionConfig()
    assert spec_fields({}) == {ours: getattr(config, theirs) for ours, theirs in SPEC_FIELDS.items()}
    whole = CLIPConfig(vision_config={"hidden_size": 64, "num_attention_heads": 4}).vision_config
    assert spec_fields({"hidden_size": 64, "num_attention_heads": 4}) == spec_fields(whole.to_dict())


@pytest.mark.parametrize("value", ["32", 0, 14.5, None])
def test_a_field_of_another_type_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"field 'patch_size' is .*"):
        spec_fields({"patch_size": value})


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_processor_is_written_as_transformers_writes_it(resize: Resize) -> None:
    rule = PixelRule(image_size=28, resize=resize)
    assert processor_settings(rule) == json.loads(image_processor(rule).to_json_string())
