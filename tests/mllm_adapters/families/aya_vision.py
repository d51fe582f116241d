"""Aya Vision; the reference is the stock class, whose checkpoint is made here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.mllm_adapters.families.case import Case, Golden

IMAGE = 93
CONFIG: dict[str, Any] = {
    "model_type": "aya_vision",
    "image_token_index": IMAGE,
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "patch_size": 14, "image_size": 84, "vision_use_head": False,
    },
    "text_config": {
        "model_type": "cohere2", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512,
    },
}  # fmt: skip


@torch.no_grad()
def build(folder: Path) -> Golden:
    """Write a random checkpoint of the stock class, and what that makes of two pictures."""
    settings = dict(CONFIG)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint").eval()
    side = model.config.vision_config.image_size
    expected, index = {"pixel_values": torch.randn(2, 3, side, side)}, {"seq0": [0], "seq1": [0, 1]}
    for sequence, chosen in index.items():
        ids = torch.tensor([[1, 5, *[IMAGE] * 9 * len(chosen), 7, 9]])
        expected[f"{sequence}.input_ids"] = ids
        expected[f"{sequence}.logits"] = model(
            input_ids=ids, pixel_values=expected["pixel_values"][chosen]
        ).logits
    vision = model.get_image_features(expected["pixel_values"])
    expected["vision_features"] = vision.last_hidden_state
    expected["visual_tokens"] = torch.stack(list(vision.pooler_output))
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"image_index": index}))
    return Golden(folder)


def features(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return torch.stack(list(model.get_image_features(golden.expected["pixel_values"]).pooler_output))


def inputs(_: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    return {"input_ids": golden.expected[f"{sequence}.input_ids"], "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    return found, golden.expected[f"{sequence}.logits"]


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


CASES = (
    Case(
        name="aya_vision", golden="", build=build, features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, stock=True,
    ),
)  # fmt: skip
