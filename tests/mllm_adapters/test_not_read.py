"""Somebody passes a published model that is not read: it is refused by its name, with the reason and what would work.

``python -m tests.mllm_adapters.test_not_read`` writes the list in docs/not_read.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.not_read import NOT_READ, not_read
from mllm_adapters.core.registry import detect
from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower, write_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "not_read.md"
BEGIN, END = "<!-- python -m tests.mllm_adapters.test_not_read -->\n", "\n<!-- end -->"

MOE = ["Qwen3MoeForCausalLM"]

CONFIGS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "Gemma 3, MedGemma": (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]},
    ),
    "CheXagent": (
        {"model_type": "chexagent", "architectures": ["CheXagentForConditionalGeneration"]},
        {"architectures": ["CheXagentForCausalLM"], "visual": {"vision_model_name_or_path": "siglip"}},
    ),
    "MAIRA-2": ({"model_type": "maira2", "architectures": ["Maira2ForConditionalGeneration"]},),
    "VILA, NVILA": (
        {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]},
        {"model_type": "vila", "architectures": ["VILAForCausalLM"]},
    ),
    "TinyLLaVA": ({"model_type": "tinyllava", "architectures": ["TinyLlavaForConditionalGeneration"]},),
    "LISA": ({"model_type": "llava", "architectures": ["LISAForCausalLM"], "train_mask_decoder": True},),
    "LLaVA-NeXT, LLaVA-OneVision": (
        {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]},
        {"model_type": "llava_onevision", "architectures": ["LlavaOnevisionForConditionalGeneration"]},
    ),
    "LLaVA-1.6 and LLaVA-OneVision in the original layout": (
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "anyres"},
        {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "image_aspect_ratio": "anyres_max_9"},
    ),
    "LLaVA on MPT": ({"model_type": "llava_mpt", "architectures": ["LlavaMPTForCausalLM"]},),
    "LLaVA on Mixtral, Gemma, Phi or Qwen3": (
        {"model_type": "llava_mixtral", "architectures": ["LlavaMixtralForCausalLM"], "mm_vision_tower": "clip"},
        {"model_type": "llava_qwen_moe", "architectures": ["LlavaQwenMoeForCausalLM"], "mm_vision_tower": "clip"},
    ),
    "ViP-LLaVA": ({"model_type": "vipllava", "architectures": ["VipLlavaForConditionalGeneration"]},),
    "Video-LLaVA": ({"model_type": "video_llava", "architectures": ["VideoLlavaForConditionalGeneration"]},),
    "a LLaVA that names no tower": ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},),
    "MinerU 2": ({"model_type": "mineru2_qwen", "architectures": ["Mineru2QwenForCausalLM"]},),
    "SmolVLM, IDEFICS 3": (
        {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]},
        {"model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"]},
    ),
    "MiniCPM-V": (
        {"model_type": "minicpmv", "architectures": ["MiniCPMV"]},
        {"model_type": "minicpmo", "architectures": ["MiniCPMO"]},
    ),
    "Molmo": ({"model_type": "molmo", "architectures": ["MolmoForCausalLM"]},),
    "Phi-3-Vision, Phi-3.5-Vision, Phi-4-Multimodal": (
        {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]},
        {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"]},
    ),
    "Llama 3.2 Vision": ({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]},),
    "Llama 4": ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]},),
    "GLM-4V, GLM-4.1V, GLM-4.5V": (
        {"model_type": "glm4v", "architectures": ["Glm4vForConditionalGeneration"]},
        {"model_type": "glm4v_moe", "architectures": ["Glm4vMoeForConditionalGeneration"]},
    ),
    "glm-4v-9b, VisualGLM": ({"model_type": "chatglm", "architectures": ["ChatGLMModel"]},),
    "xGen-MM, BLIP-3": ({"model_type": "xgenmm", "architectures": ["XGenMMModelForConditionalGeneration"]},),
    "mPLUG-Owl2, Q-Align": ({"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"]},),
    "Pixtral, Mistral 3": ({"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]},),
    "Florence-2": ({"model_type": "florence2", "architectures": ["Florence2ForConditionalGeneration"]},),
    "Logics-Thinking": ({"model_type": "logics", "architectures": ["LogicsForConditionalGeneration"]},),
    "a language model": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "qwen2"},
    ),
    "a tower or a text encoder": (
        {"model_type": "clip", "architectures": ["CLIPModel"]},
        {"model_type": "siglip", "architectures": ["SiglipModel"]},
    ),
    "Qwen-Audio": ({"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "audio": {"n_layer": 32}},),
    "Qwen, without images": ({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]},),
    "Qwen2-Audio": ({"model_type": "qwen2_audio"},),
    "Qwen2.5-Omni": ({"model_type": "qwen2_5_omni"},),
    "Qwen2.5-Omni, thinker": ({"model_type": "qwen2_5_omni_thinker"},),
    "Qwen3-Omni": ({"model_type": "qwen3_omni_moe"},),
    "Qwen3-VL, mixture of experts": ({"model_type": "qwen3_vl_moe"},),
    "Qwen3.5": ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]},),
    "InternVL 3.5 MoE, transformers layout": (
        {"model_type": "internvl", "vision_config": {}, "text_config": {"model_type": "qwen3_moe"}},
        {"model_type": "internvl", "vision_config": {}, "text_config": {"model_type": "gpt_oss"}},
    ),
    "InternVL 3.5 MoE": (
        {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "llm_config": {"architectures": MOE}},
    ),
    "InternOmni": ({"model_type": "internvl_chat", "llm_config": {}, "audio_config": {"d_model": 1280}},),
    "InternViT": ({"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"]},),
    "InternVL for retrieval": ({"model_type": "internvl", "architectures": ["InternVLModel"], "qllama_config": {}},),
    "MGM-34B": ({"model_type": "mgm", "architectures": ["MGMLlamaForCausalLM"], "vocab_size": 64000},),
    "MGM-8B": ({"model_type": "mgm", "architectures": ["MGMLlamaForCausalLM"], "vocab_size": 128256},),
    "MGM-2B, MGM-8x7B": (
        {"model_type": "mgm_gemma", "architectures": ["MGMGemmaForCausalLM"]},
        {"model_type": "mini_gemini_mixtral", "architectures": ["MiniGeminiMixtralForCausalLM"]},
    ),
    "JanusFlow": ({"model_type": "multi_modality", "vision_gen_enc_config": {"cls": "ShallowUViTEncoder"}},),
    "DeepSeek-VL, under Janus' model_type": ({"model_type": "multi_modality", "vision_config": {}},),
    "DeepSeek-VL": ({"model_type": "deepseek_vl_v2"},),
    "BLIP-2": ({"model_type": "blip-2"},),
    "InstructBLIP-Video": ({"model_type": "instructblipvideo"},),
    "IDEFICS": ({"model_type": "idefics"}, {"model_type": "idefics2"}),
    "Otter": ({"model_type": "otter"},),
}  # fmt: skip
"""Row of the table -> facts of published config.json files that it is for."""

REAL: Mapping[str, str] = {
    "GLM4V": "GLM-4V, GLM-4.1V, GLM-4.5V",
    "Llama3_2-Vision": "Llama 3.2 Vision",
    "Logics-Thinking": "Logics-Thinking",
    "MiniCPM-Llama3-V-2_5": "MiniCPM-V",
    "MiniCPM-V-2_6": "MiniCPM-V",
    "Molmo": "Molmo",
    "Qwen3_5": "Qwen3.5",
    "VILA1.5-3b": "VILA, NVILA",
    "google--gemma3": "Gemma 3, MedGemma",
    "google--medgemma-27b-it": "Gemma 3, MedGemma",
    "openai--clip-vit-large-patch14": "a tower or a text encoder",
    "siglip-so400m-patch14-384": "a tower or a text encoder",
    "test-vlm--cehd5170": "MinerU 2",
    "xgen-mm": "xGen-MM, BLIP-3",
    "xinlai--LISA-7B": "LISA",
}
"""Folder of published metadata -> the row that refuses it."""

QUANTIZED = {"Qwen--Qwen-VL-Chat-Int4": "gptq", "Qwen--Qwen2-VL": "awq"}

READ = {
    "MBZUAI--AIN--Qwen2-VL-7B": "qwen2-vl",
    "OpenGVLab--InternVL2-2B": "internvl",
    "OpenGVLab--InternVL2-8B": "internvl",
    "Qwen--Qwen-VL-Chat": "qwen-vl",
    "Qwen--Qwen2.5-VL-7B-Instruct": "qwen2-vl",
    "Qwen--Qwen3-VL": "qwen2-vl",
    "allenai--olmOCR-7B--Qwen2-VL-7B": "qwen2-vl",
    "liuhaotian--llava-v1.5-7b": "llava",
    "llava-hf--llava-1.5-7b-hf": "llava",
    "microsoft--llava-med-v1.5-mistral-7b": "llava-med",
    "nvidia--Cosmos-Reason2-8B--Qwen3-VL-8B": "qwen2-vl",
}


def real_config(published: Path, name: str) -> dict[str, Any]:
    """The config.json of a published model; what follows it in some copies (a git configuration) is cut off."""
    text = (published / name / "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
    return config


def test_every_row_has_an_example() -> None:
    assert list(CONFIGS) == [row.title for row in NOT_READ]


@pytest.mark.parametrize("title", CONFIGS)
def test_each_is_refused_by_its_own_row_with_what_would_work(title: str) -> None:
    for config in CONFIGS[title]:
        row = not_read(config)
        assert row is not None
        assert row.title == title
        with pytest.raises(UnsupportedCheckpointError) as refusal:
            detect(config, "model/config.json")
        assert str(refusal.value).startswith("model/config.json (model_type ")
        assert f"{row.reason}: {row.take}" in str(refusal.value)


def test_at_the_terminal_it_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    source = write_config(tmp_path / "medgemma", CONFIGS["Gemma 3, MedGemma"][0])
    tower = a_tower(tmp_path / "mgll")
    line = builders.refused(swap_encoder, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
    assert str(source / "config.json") in line
    assert "MedGemma" in line
    assert "llava-med" in line
    assert not (tmp_path / "out").exists()


def test_the_field_that_decides_is_named() -> None:
    with pytest.raises(
        UnsupportedCheckpointError, match=r"text_config\.model_type is 'qwen3_moe': this InternVL"
    ):
        detect(CONFIGS["InternVL 3.5 MoE, transformers layout"][0], "config.json")


def test_a_config_of_odd_types_is_no_row_of_the_table() -> None:
    assert not_read({"model_type": 7, "architectures": "Gemma3ForConditionalGeneration"}) is None
    assert not_read({"model_type": "internvl", "text_config": ["qwen3_moe"]}) is None


@pytest.mark.parametrize("name", REAL)
def test_published_configurations_are_refused_by_name(name: str, published: Path) -> None:
    row = not_read(real_config(published, name))
    assert row is not None
    assert row.title == REAL[name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_published_quantised_configurations_are_refused_by_their_method(name: str, published: Path) -> None:
    with pytest.raises(
        UnsupportedCheckpointError,
        match=f"quantization_config says {QUANTIZED[name]}.*unquantized checkpoint",
    ):
        detect(real_config(published, name), "config.json")


@pytest.mark.parametrize("name", READ)
def test_published_configurations_of_what_is_read_are_no_row_of_the_table(name: str, published: Path) -> None:
    assert detect(real_config(published, name), "config.json")[0].spec.name == READ[name]


def listed() -> str:
    """The table for the documentation."""
    rows = (f"| {row.title} | {row.reason} | {row.take} |" for row in NOT_READ)
    table = "\n".join(["| model | reason | what would work |", "|---|---|---|", *rows])
    return builders.options_of("mllm_adapters.cli.swap").spell(table)


def test_the_documentation_lists_them() -> None:
    assert BEGIN + listed() + END in DOCUMENT.read_text(encoding="utf-8")


def write() -> None:
    """Write the list into the documentation."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + listed() + END + after, encoding="utf-8")


if __name__ == "__main__":
    write()
