"""A tiny checkpoint of every family as a user has it: weights, configuration, tokenizer, image processor."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AyaVisionProcessor,
    CLIPVisionModel,
    GotOcr2ImageProcessor,
)

import mllm_adapters.auto  # noqa: F401
from mgll_encoder import Tower, save_tower
from mgll_encoder.tower.spec import TowerSpec
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.swap.apply import apply_plan
from tests import builders
from tests.mllm_adapters import (
    janus_files,
    test_aya_vision,
    test_internvl,
    test_med_flamingo,
    test_mini_gemini,
    test_paligemma,
    test_qwen2_vl,
)
from tests.mllm_adapters.families import aya_vision, llava_qwen2, qwen_vl
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.llava_checkpoints import original_llava
from tests.mllm_adapters.retraining import write_json
from tests.mllm_adapters.tiny_instructblip import tiny_instructblip

Folder = Callable[[], Path]
"""The golden folder, asked for by those that complete one of its checkpoints."""

Builder = Callable[[Path, Folder], Path]


def encoder(folder: Path) -> Path:
    """An MGLL tower: 28 px in 4 patches, exact GELU, ImageNet's normalization."""
    torch.manual_seed(5)
    spec = TowerSpec(
        width=32, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=28, activation="gelu"
    )
    return save_tower(Tower.from_model(CLIPVisionModel(builders.tower_config()), spec), folder)


def _qwen_vl(folder: Path, golden: Folder) -> Path:
    config = qwen_vl.tiny_config()
    qwen_vl.write_tiny(folder, config)
    qwen_vl.write_ranks(folder, config)
    return folder


def _janus(folder: Path, golden: Folder) -> Path:
    janus_files.write(folder, janus_files.Sizes())
    janus_files.write_tokenizer(folder)
    return folder


def _qwen2_vl(generation: str) -> Builder:
    def build(folder: Path, golden: Folder) -> Path:
        test_qwen2_vl.with_tokenizer(folder, generation)
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        (folder / "chat_template.jinja").write_text(builders.CHAT_TEMPLATE.replace("<image>\n", image))
        return folder

    return build


def _aya(folder: Path, golden: Folder) -> Path:
    tokenizer = builders.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*test_aya_vision.SPECIALS, "<image>"]})
    text = {**aya_vision.CONFIG["text_config"], "vocab_size": len(tokenizer)}
    patch = tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>")  # what the processor makes of each <image>
    settings = {**aya_vision.CONFIG, "text_config": text, "image_token_index": patch}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    images = GotOcr2ImageProcessor(
        size={"height": 84, "width": 84}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    AyaVisionProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, downsample_factor=2, img_size=84,
        image_token="<image>", chat_template=builders.CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


BUILDERS: Mapping[str, Builder] = {
    "llava": lambda folder, golden: original_llava(golden(), "llava", folder),
    "llava-qwen2": lambda folder, golden: llava_qwen2.with_tokenizer(folder),
    "llava-hf": lambda folder, golden: builders.tiny_llava(folder),
    "llava-med": lambda folder, golden: original_llava(golden(), "llava_med", folder),
    "qwen-vl": _qwen_vl,
    "qwen2-vl": _qwen2_vl("qwen2_vl"),
    "qwen2_5-vl": _qwen2_vl("qwen2_5_vl"),
    "qwen3-vl": _qwen2_vl("qwen3_vl"),
    "internvl": lambda folder, golden: test_internvl.talking(golden(), "qwen2", folder),
    "internvl-internlm2": lambda folder, golden: test_internvl.talking(golden(), "internlm2", folder),
    "internvl-llama": lambda folder, golden: test_internvl.talking(golden(), "llama", folder),
    "mini-gemini": lambda folder, golden: test_mini_gemini.write(
        Golden(golden() / "mini_gemini"), folder, tokenizer=True
    ),
    "instructblip": lambda folder, golden: tiny_instructblip(folder),
    "instructblip-t5": lambda folder, golden: tiny_instructblip(folder, "t5"),
    "med-flamingo": lambda folder, golden: test_med_flamingo.write_host(folder),
    "janus-pro": _janus,
    "aya-vision": _aya,
    "paligemma": lambda folder, golden: test_paligemma.published_folder(folder),
}
"""Name -> builder of (folder to write, what gives the golden folder); the first word is the family's."""


def steady(name: str, folder: Path, golden: Folder) -> Path:
    """A checkpoint of `BUILDERS` in the transformers layout and without dropout, so that two trainings agree."""
    source = BUILDERS[name](folder / "host", golden)
    checkpoint, family, layout = open_checkpoint(source)
    if layout != "transformers":
        source = apply_plan(family.plan(checkpoint), family, checkpoint, folder / "converted")
    config = json.loads((source / "config.json").read_text())
    if "qformer_config" in config:
        config["qformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        write_json(source / "config.json", config)
    return source
