"""Qwen-VL of 2023."""

from typing import Any

import torch
from torch import Tensor, nn

from mllm_adapters.contract import Plan
from tests.mllm_adapters.families.case import Case, Golden


def features(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    """The original writes the bytes of a file name between <img> and </img>, and then overwrites them."""
    ids = golden.expected[f"{sequence}.input_ids"].clone()
    ids[0, golden.expected[f"{sequence}.image_positions"]] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    """The golden file holds the logits of some positions only."""
    expected = golden.expected[f"{sequence}.logits"]
    return found[:, golden.expected[f"{sequence}.kept_positions"]], expected


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """<img>, the placeholders, </img>, and some text around them."""
    start = plan.image_token_id - 2
    ids = [[1, start, *[plan.image_token_id] * plan.after.tokens, start + 1, 7, 9]]
    given = torch.tensor(ids)
    return {"input_ids": given, "attention_mask": torch.ones_like(given), "pixel_values": pixels}


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("vision_tower")


CASES = (
    Case(
        name="qwen_vl", golden="qwen_vl", features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, prompt=prompt,
    ),
)  # fmt: skip
