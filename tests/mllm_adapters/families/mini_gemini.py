"""Mini-Gemini."""

from typing import Any

import torch
from torch import Tensor, nn

from mllm_adapters.core.contract import Plan
from tests.mllm_adapters.families.case import Case, Golden
from tests.mllm_adapters.families.llava import expand, logits, tower


def features(model: Any, golden: Golden) -> Tensor:
    output = model.get_image_features(golden.expected["pixel_values"], golden.expected["pixel_values_aux"])
    return output.last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    output = model.get_image_features(golden.expected["pixel_values"], golden.expected["pixel_values_aux"])
    return torch.stack(list(output.pooler_output))


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    pictures = golden.about["image_index"][sequence]
    ids = expand(
        golden.expected[f"{sequence}.input_ids"][0],
        model.config.image_token_id,
        model.config.image_seq_length,
    )
    return {
        "input_ids": ids,
        "pixel_values": golden.expected["pixel_values"][pictures],
        "pixel_values_aux": golden.expected["pixel_values_aux"][pictures],
    }


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """A prompt about one picture, given at high resolution."""
    side = plan.config["image_size_aux"]
    high = nn.functional.interpolate(pixels, size=(side, side), mode="bilinear")
    ids = torch.tensor([[1, 5] + [plan.image_token_id] * plan.config["image_seq_length"] + [7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": high}


CASES = (
    Case(
        name="mini_gemini", golden="mini_gemini", features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, prompt=prompt,
    ),
)  # fmt: skip
