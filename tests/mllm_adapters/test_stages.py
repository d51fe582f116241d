import pytest
from torch import nn
from transformers import LlavaForConditionalGeneration

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, UnknownNameError
from mllm_adapters.core.stages import LoraSettings, apply_stage, components, outermost_modules


@pytest.fixture
def model(tiny_llava):
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava)


def test_the_projector_stage_trains_the_projector_and_nothing_else(model):
    model.requires_grad_(True)
    report = apply_stage(model)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    projector = model.model.multi_modal_projector
    expected = {f"model.multi_modal_projector.{name}" for name, _ in projector.named_parameters()}
    assert training == set(report.names) == expected


def test_the_report_counts_every_parameter_once(model):
    report = apply_stage(model)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert report.share == pytest.approx(report.trainable / report.total)
    counted = {part.component: (part.trainable, part.frozen) for part in report.components}
    assert counted["tower"] == (0, sum(p.numel() for p in model.model.vision_tower.parameters()))
    assert counted["projector"] == (report.trainable, 0)


def test_an_unknown_stage_is_refused_with_a_suggestion(model):
    with pytest.raises(UnknownNameError, match="did you mean 'projector'"):
        apply_stage(model, "projektor")


def test_a_parameter_that_belongs_to_no_component_is_refused_and_nothing_is_set(model):
    model.extra = nn.Linear(2, 2)
    with pytest.raises(BadDataError, match=r"extra\.weight belongs to nothing known"):
        apply_stage(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_a_projector_trains_nothing_and_says_so(model):
    model.model.multi_modal_projector = nn.Identity()
    with pytest.raises(InvalidArgumentError, match="trains nothing"):
        apply_stage(model)


def test_lora_style_modules_inside_the_language_model_belong_to_it(model):
    model.model.language_model.layers[0].self_attn.q_proj.vision_like = nn.Linear(2, 2)
    name = "model.language_model.layers.0.self_attn.q_proj.vision_like.weight"
    assert components(model)[name] == "language_model"


def test_components_are_found_as_whole_modules(model):
    assert outermost_modules(model, "tower") == [model.model.vision_tower]
    assert outermost_modules(model, "language_model") == [model.model.language_model, model.lm_head]


@pytest.mark.parametrize(
    ("stage", "whole", "adapted"),
    [
        ("lora", {"multi_modal_projector"}, {"language_model"}),
        ("lora-vision", {"multi_modal_projector"}, {"language_model", "vision_tower"}),
        ("full", {"multi_modal_projector", "language_model", "vision_tower", "lm_head"}, set()),
    ],
)
def test_every_stage_trains_its_parts_and_reports_them(model, stage, whole, adapted):
    report = apply_stage(model, stage, LoraSettings(rank=2))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == set(report.names)
    lora = {name for name in training if ".lora_" in name}
    assert {part(name) for name in training - lora} == whole
    assert {part(name) for name in lora} == adapted
    assert {name.rpartition(".lora_")[0] for name in lora} == set(report.adapted)
    assert report.trainable == sum(model.get_parameter(name).numel() for name in training)


def part(name):
    return name.removeprefix("model.").split(".")[0]
