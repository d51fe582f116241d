"""Janus-Pro: as a Janus with a CLIP tower, and its understanding path as a LLaVA."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tests.mllm_adapters.families.case import Case, Golden

PLACEHOLDER = "<image_placeholder>"


def ids(model: Any, golden: Golden, sequence: str) -> Tensor:
    """The golden ids; without a tokenizer the placeholder has another one here."""
    given = golden.expected[f"{sequence}.input_ids"]
    return given.masked_fill(given == golden.about["special_ids"][PLACEHOLDER], model.config.image_token_id)


def features(model: Any, golden: Golden) -> Tensor:
    return model.model.vision_model(golden.expected["pixel_values"]).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    return {"input_ids": ids(model, golden, sequence), "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    expected = golden.expected[f"{sequence}.logits"]
    return found[..., : expected.shape[-1]], expected  # the vocabulary may have grown


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_model")


def llava_tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


OWN = Case(
    name="janus_pro", golden="janus_pro", features=features, tokens=tokens, inputs=inputs, logits=logits, tower=tower,
)  # fmt: skip

CASES = (OWN, replace(OWN, name="janus_pro-llava", tower=llava_tower, target="llava", stock=True))
