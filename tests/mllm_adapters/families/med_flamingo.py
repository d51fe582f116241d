"""Med-Flamingo."""

from typing import Any

import torch
from torch import Tensor, nn

from mllm_adapters.core.contract import Plan
from tests.mllm_adapters.families.case import Case, Golden


def features(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(_: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    given = {
        "input_ids": golden.expected[f"{sequence}.input_ids"],
        "pixel_values": golden.pixels(sequence),
    }
    mask = golden.expected.get(f"{sequence}.attention_mask")
    return given if mask is None else given | {"attention_mask": mask}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    expected = golden.expected[f"{sequence}.logits"]
    found = found[..., : expected.shape[-1]]  # without the added tokens
    mask = golden.expected.get(f"{sequence}.attention_mask")
    return (found, expected) if mask is None else (found[mask.bool()], expected[mask.bool()])


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """One placeholder per picture, whatever its latents."""
    ids = torch.tensor([[1, 5, plan.image_token_id, 7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


CASES = (
    Case(
        name="med_flamingo", golden="med_flamingo", features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, prompt=prompt, sequences=("seq0", "seq1", "batch"),
    ),
)  # fmt: skip
