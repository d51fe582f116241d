"""PaliGemma; the reference is the stock class, whose checkpoint is made here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from mllm_adapters.core.contract import Plan
from tests.mllm_adapters.families.case import Case, Golden, one_prompt

IMAGE = 93
TEXT: dict[str, Any] = {
    "model_type": "gemma", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "max_position_embeddings": 1024,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model_type": "paligemma",
    "image_token_index": IMAGE,
    "projection_dim": 48,
    "hidden_size": 48,
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "patch_size": 14, "image_size": 56, "vision_use_head": False,
    },
    "text_config": TEXT,
}  # fmt: skip
GEMMA_2 = {
    **TEXT, "model_type": "gemma2", "query_pre_attn_scalar": 12, "sliding_window": 512, "num_key_value_heads": 2,
}  # fmt: skip
"""The language model of PaliGemma 2."""


def model_of(settings: dict[str, Any]) -> Any:
    """A random model of the stock class."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def build(folder: Path, text: dict[str, Any] = TEXT) -> Golden:
    """Write a random checkpoint of the stock class, and what that makes of two pictures."""
    model_of({**CONFIG, "text_config": text}).save_pretrained(folder / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint").eval()
    side = model.config.vision_config.image_size
    expected, index = {"pixel_values": torch.randn(2, 3, side, side)}, {"seq0": [0], "seq1": [0, 1]}
    for sequence, chosen in index.items():
        ids = torch.tensor([[*[IMAGE] * 16 * len(chosen), 1, 5, 7, 9]])
        expected[f"{sequence}.input_ids"] = ids
        expected[f"{sequence}.logits"] = model(
            input_ids=ids, pixel_values=expected["pixel_values"][chosen], token_type_ids=torch.zeros_like(ids)
        ).logits
    vision = model.get_image_features(expected["pixel_values"])
    expected["vision_features"], expected["visual_tokens"] = vision.last_hidden_state, vision.pooler_output
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"image_index": index}))
    return Golden(folder)


def features(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(_: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    ids = golden.expected[f"{sequence}.input_ids"]
    return {
        "input_ids": ids, "pixel_values": golden.pixels(sequence), "token_type_ids": torch.zeros_like(ids)
    }  # fmt: skip


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    return found, golden.expected[f"{sequence}.logits"]


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    given = one_prompt(plan, pixels)
    return {**given, "token_type_ids": torch.zeros_like(given["input_ids"])}


CASES = (
    Case(
        name="paligemma", golden="", build=build, features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, prompt=prompt, stock=True,
    ),
    Case(
        name="paligemma2", golden="", build=lambda folder: build(folder, GEMMA_2), features=features, tokens=tokens,
        inputs=inputs, logits=logits, tower=tower, prompt=prompt, stock=True,
    ),
)  # fmt: skip
