"""What a training will take of memory, told beforehand, against what it takes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.stages import LoraSettings, apply_stage
from mllm_adapters.training.memory import Setting, estimate, kept_for_backward
from tests import builders


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return builders.tiny_llava(tmp_path_factory.mktemp("llava"))


def setting(**changes) -> Setting:
    return Setting(**{"batch_size": 2, "length": 48, "precision": torch.float32, **changes})


@pytest.mark.parametrize("stage", ["projector", "lora", "full"])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(folder: Path, stage: str) -> None:
    told = estimate(read_json(folder / "config.json"), stage, setting(), lora=LoraSettings(rank=4))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    apply_stage(model, stage, LoraSettings(rank=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    torch.stack([p.sum() for p in trained]).sum().backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert told.weights == sum(p.nbytes for p in model.parameters())
    assert told.gradients == sum(p.grad.nbytes for p in trained)
    assert told.optimizer == sum(moment.nbytes for moment in moments)


def fuses_grouped_queries() -> bool:
    """Whether this torch has a fused attention with grouped queries for CPUs, as it has for GPUs."""
    query, key = torch.ones(1, 2, 4, 8, requires_grad=True), torch.ones(1, 1, 4, 8)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    return "Flash" in type(output.grad_fn).__name__


@pytest.mark.parametrize("stage", ["projector", "full"])
@pytest.mark.parametrize("groups", [1, 2])
def test_activations_are_what_autograd_really_keeps(folder: Path, stage: str, groups: int) -> None:
    if groups > 1 and not fuses_grouped_queries():
        pytest.skip(f"torch {torch.__version__} keeps all probabilities of grouped queries on a CPU")
    settings = read_json(folder / "config.json")
    settings["text_config"]["num_key_value_heads"] = settings["text_config"]["num_attention_heads"] // groups
    model = AutoModelForImageTextToText.from_config(build_config(settings, "config.json")).train()
    apply_stage(model, stage)
    decoder = model.get_decoder()
    embeddings = torch.randn(2, 48, model.config.text_config.hidden_size, requires_grad=True)
    kept = kept_for_backward(decoder, inputs_embeds=embeddings, use_cache=False)
    told = estimate(settings, stage, setting())
    tower = estimate(settings, stage, setting(length=1)).activations
    of_language_model = told.activations - (tower if stage == "full" else 0)
    assert of_language_model == pytest.approx(kept, rel=0.1)


def test_longer_examples_take_more_and_recomputing_takes_less(folder: Path) -> None:
    config = read_json(folder / "config.json")
    usual = estimate(config, "projector", setting())
    assert estimate(config, "projector", setting(length=96)).activations == pytest.approx(
        2 * usual.activations, rel=0.02
    )
    less = estimate(config, "projector", setting(gradient_checkpointing=True))
    assert less.activations < 0.8 * usual.activations


def test_zero_shares_what_its_stage_says_it_shares(folder: Path) -> None:
    config = read_json(folder / "config.json")
    two, three = (estimate(config, "full", setting(devices=8, zero=zero)) for zero in (2, 3))
    alone = estimate(config, "full", setting(zero=0))
    assert two.weights == alone.weights
    assert two.optimizer * 8 == alone.optimizer
    assert three.weights * 8 == alone.weights
    offloaded = estimate(config, "full", setting(devices=8, zero=3, offload=True))
    assert offloaded.weights == offloaded.optimizer == 0
    assert offloaded.host == three.weights + three.optimizer
    assert offloaded.device < three.device


def test_four_bits_are_an_eighth_of_32_for_the_language_models_blocks(folder: Path) -> None:
    config = read_json(folder / "config.json")
    whole = estimate(config, "lora", setting())
    packed = estimate(config, "lora", setting(), qlora=True)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    blocks = sum(
        module.weight.numel()
        for name, module in model.model.language_model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert whole.weights - packed.weights == pytest.approx(blocks * (4 - 0.5 - 0.0159), rel=0.01)


def test_a_zero_stage_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="ZeRO stage 1"):
        setting(zero=1)


def test_the_command_prints_it_and_trains_nothing(folder: Path, tmp_path: Path) -> None:
    shown = builders.invoke(
        finetune_lora,
        "--model",
        folder,
        "--data",
        tmp_path / "absent.json",
        "--out",
        tmp_path / "out",
        "--estimate",
    )
    assert shown.code == 0, shown.err
    assert "Memory per device in GB: stage lora, 16 examples of 2048 tokens" in shown.out
    assert "offload" in shown.out
    assert not (tmp_path / "out").exists()
