"""Checkpoints that are close to LLaVA but something else, and LLaVAs whose parts lie elsewhere, at the terminal."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mgll_encoder.common.errors import UserError
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from tests.builders import invoke, refused
from tests.mllm_adapters.llava_checkpoints import a_tower, edit_config, original_llava, write_config

LLAVA = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": "openai/clip"}

CLOSE = {
    "text-only LLaMA": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "this is a language model, without vision tower and projector",
    ),
    "text-only Mistral": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        "for LLaVA's projector-only and LoRA folders it is --part base=PATH",
    ),
    "LLaVA-NeXT": (
        {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"},
        "LLaVA-NeXT and LLaVA-OneVision cut an image into views (anyres), which is not supported: liuhaotian/",
    ),
    "LLaVA-OneVision": (
        {"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"},
        "(anyres)",
    ),
    "LLaVA-OneVision, original": (
        {
            "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "mm_vision_tower": "siglip",
            "image_aspect_ratio": "anyres_max_9",
        },
        "(anyres)",
    ),
    "LLaVA-1.6, original": ({**LLAVA, "image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres': LLaVA-NeXT"),
    "LLaVA-1.6 on Mistral, original": (
        {**LLAVA, "architectures": ["LlavaMistralForCausalLM"], "image_aspect_ratio": "anyres_max_9"},
        "image_aspect_ratio is 'anyres_max_9': LLaVA-NeXT",
    ),
    "LLaVA on MPT": (
        {"architectures": ["LlavaMPTForCausalLM"], "model_type": "llava_mpt", "mm_vision_tower": "openai/clip"},
        "LLaVA on an MPT language model is not supported, only on LLaMA/Vicuna, Mistral and Qwen2",
    ),
    "ViP-LLaVA": ({"architectures": ["VipLlavaForConditionalGeneration"], "model_type": "vipllava"}, "several layers"),
    "Video-LLaVA": (
        {"architectures": ["VideoLlavaForConditionalGeneration"], "model_type": "video_llava"}, "two towers",
    ),
}  # fmt: skip


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return a_tower(tmp_path / "mgll-tiny")


@pytest.mark.parametrize("name", CLOSE)
def test_what_is_close_is_named_with_what_would_work(name: str, tower: Path, tmp_path: Path) -> None:
    config, message = CLOSE[name]
    source = write_config(tmp_path / "source", config)
    line = refused(main, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
    assert message in line
    assert str(source) in line


def test_other_models_are_none_of_llavas_business(tower: Path, tmp_path: Path) -> None:
    """Negative control: what is not close is only listed as unknown."""
    source = write_config(tmp_path / "source", {"architectures": ["BertModel"], "model_type": "bert"})
    line = refused(main, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
    assert "no known family has model_type 'bert'" in line


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_of_a_converted_llava_must_be_merged_first(
    with_config: bool, tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    """Where it lies beside config.json and whole weights, transformers would load the base that it names instead."""
    source = tmp_path / "adapter"
    if with_config:
        shutil.copytree(tiny_llava, source)
    source.mkdir(exist_ok=True)
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}, source / "adapter_model.bin")
    line = refused(main, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
    assert "merge it into its base model" in line
    assert "pass the merged folder" in line
    refusal = "merge it into its base model" if with_config else "does not name its base model"
    with pytest.raises(UserError, match=refusal):
        load_mllm(source)


def test_the_folder_around_checkpoint_and_tower_is_enough(golden: Path, tower: Path, tmp_path: Path) -> None:
    """``--mllm`` names the family's folder: the checkpoint is the one folder in it that a family reads."""
    for host in ("llava", "llava_med"):
        out = tmp_path / host
        outcome = invoke(main, "convert", "--mllm", golden / host, "--out", out)
        assert outcome.code == 0, outcome.err
        assert "the host's own tower" in outcome.err
        load_mllm(out)


def test_a_tower_that_is_elsewhere_is_given_as_a_part(golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original")
    edit_config(source, mm_vision_tower="checkpoints/clip_336", unfreeze_mm_vision_tower=False)
    lines = ["convert", "--mllm", source, "--out", tmp_path / "out"]
    message = refused(main, *lines)
    assert "its vision tower 'checkpoints/clip_336' is not in the checkpoint folder, next to it" in message
    tower = source / "towers" / "clip"
    outcome = invoke(main, *lines, "--part", f"vision-tower={tower}")
    assert outcome.code == 0, outcome.err
    found = load_mllm(tmp_path / "out", dtype=torch.float32)[0]
    expected = load_mllm(source, dtype=torch.float32, parts={"vision-tower": tower})[0]
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name
    again = ["convert", "--mllm", source, "--out", tmp_path / "again"]
    assert "unknown --part for LLaVA 'tower': did you mean 'vision-tower'?" in refused(
        main, *again, "--part", f"tower={tower}"
    )
    lines = ["--mllm", tmp_path / "out", "--encoder", a_tower(tmp_path / "new"), "--out", tmp_path / "again"]
    assert "is whole: no --part vision-tower belongs to it" in refused(
        main, *lines, "--part", f"vision-tower={tower}"
    )
