"""LLaVA and LLaVA-Med."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.mllm_adapters.families.case import Case, Golden


def expand(ids: Tensor, placeholder: int, tokens: int) -> Tensor:
    """Write each -200 of one row as ``tokens`` placeholders, as the processor does."""
    row: list[int] = []
    for token in ids.tolist():
        row += [placeholder] * tokens if token == -200 else [token]
    return torch.tensor([row])


def features(model: Any, golden: Golden) -> Tensor:
    output = model.model.vision_tower(golden.expected["pixel_values"], output_hidden_states=True)
    first = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return output.hidden_states[model.config.vision_feature_layer][:, first:]


def tokens(model: Any, golden: Golden) -> Tensor:
    return torch.stack(list(model.get_image_features(golden.expected["pixel_values"]).pooler_output))


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    per_image = golden.expected["visual_tokens"].shape[1]
    ids = expand(golden.expected[f"{sequence}.input_ids"][0], model.config.image_token_id, per_image)
    return {"input_ids": ids, "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    expected = golden.expected[f"{sequence}.logits"]
    return found[..., : expected.shape[-1]], expected  # the vocabulary has grown


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


CASES = tuple(
    Case(
        name=name + suffix, golden=name, features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, stock=not converted, converted=converted,  # converted, it is the same class: once is enough
    )
    for name in ("llava", "llava_med")
    for suffix, converted in (("", False), ("_transformers", True))
)  # fmt: skip
