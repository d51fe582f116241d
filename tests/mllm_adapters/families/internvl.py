"""InternVL."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tests.mllm_adapters.families.case import Case, Golden


def features(model: Any, golden: Golden) -> Tensor:
    output = model.model.vision_tower(golden.expected["pixel_values"], output_hidden_states=True)
    layer = model.config.vision_feature_layer
    return (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[:, 1:]


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    ids = golden.expected[f"{sequence}.input_ids"].clone()
    # The original is told the placeholder at run time; without a tokenizer, here it has a row of its own.
    ids[ids == golden.about["special_ids"]["<IMG_CONTEXT>"]] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    expected = golden.expected[f"{sequence}.logits"]
    return found[..., : expected.shape[-1]], expected  # the vocabulary has grown


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


_OWN = tuple(
    Case(
        name=name, golden=name, features=features, tokens=tokens, inputs=inputs, logits=logits, tower=tower
    )
    for name in ("internvl", "internvl_qwen2", "internvl_internlm2")
)  # fmt: skip

CASES = (
    *_OWN,
    *(replace(case, name=f"{case.name} as llava", target="llava", stock=True) for case in _OWN[-1:]),
)
