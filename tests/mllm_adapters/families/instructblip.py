"""InstructBLIP: the transformers layout of 2023, and LAVIS' own files."""

from typing import Any

import torch
from torch import Tensor, nn

from mllm_adapters.core.contract import Plan
from tests.mllm_adapters.families.case import Case, Golden


def features(model: Any, golden: Golden) -> Tensor:
    return model.vision_model(pixel_values=golden.expected["pixel_values"]).last_hidden_state


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    """The original code puts the visual tokens in front of everything."""
    ids = golden.expected[f"{sequence}.input_ids"]
    images = ids.new_full((1, model.config.num_query_tokens), model.config.image_token_id)
    return {
        "input_ids": torch.cat([images, ids], dim=1),
        "pixel_values": golden.pixels(sequence),
        "qformer_input_ids": golden.expected[f"{sequence}.qformer_input_ids"],
    }


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    expected = golden.expected[f"{sequence}.logits"]
    return found[..., : expected.shape[-1]], expected  # the vocabulary has grown


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor([[plan.image_token_id] * plan.after.tokens + [2, 5, 7, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "qformer_input_ids": torch.tensor([[1, 5, 7, 9, 2]]),
    }


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("vision_model.tower")


CASES = tuple(
    Case(
        name=name, golden=name, features=features, tokens=None, inputs=inputs, logits=logits, tower=tower,
        prompt=prompt, parts=parts,
    )
    for name, parts in (
        ("instructblip", None),
        # Attention heads are in no weight file; the same model in the other layout has them.
        ("instructblip_lavis", {"config": "../instructblip/checkpoint/config.json"}),
    )
)  # fmt: skip
