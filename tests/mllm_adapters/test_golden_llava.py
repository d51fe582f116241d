"""LLaVA and LLaVA-Med give what their original code gave: beyond the contract, padded batches and greedy answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from mllm_adapters import load_mllm
from tests.mllm_adapters.families.llava import expand

FAMILIES = ["llava", "llava_med"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, golden: Path) -> SimpleNamespace:
    folder = golden / request.param
    model, _ = load_mllm(folder / "checkpoint", dtype=torch.float32)
    return SimpleNamespace(
        model=model,
        expected=load_file(folder / "expected.safetensors"),
        about=json.loads((folder / "expected.json").read_text()),
    )


def features(case: SimpleNamespace) -> torch.Tensor:
    config = case.model.config
    with torch.no_grad():
        output = case.model.model.vision_tower(case.expected["pixel_values"], output_hidden_states=True)
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return output.hidden_states[config.vision_feature_layer][:, first:]


def test_the_other_activation_in_the_hosts_tower_would_be_noticed(case: SimpleNamespace) -> None:
    """Negative control: the wrong activation is far outside the tolerance."""
    other = {"quick_gelu": "gelu", "gelu": "quick_gelu"}[case.model.config.vision_config.hidden_act]
    layers = case.model.model.vision_tower.encoder.layers
    original = layers[0].mlp.activation_fn
    for layer in layers:
        layer.mlp.activation_fn = ACT2FN[other]
    wrong = features(case)
    for layer in layers:
        layer.mlp.activation_fn = original
    assert (wrong - case.expected["vision_features"]).abs().max() > 10 * TOLERANCE


def test_it_generates_what_the_original_generated(case: SimpleNamespace) -> None:
    expected = case.expected["seq0.greedy"][0].tolist()
    tokens = case.expected["visual_tokens"].shape[1]
    ids = expand(case.expected["seq0.input_ids"][0], case.model.config.image_token_id, tokens)
    pixels = case.expected["pixel_values"][case.about["image_index"]["seq0"]]
    new = case.model.generate(
        input_ids=ids, pixel_values=pixels, do_sample=False, max_new_tokens=len(expected), eos_token_id=None
    )
    found = new[0, ids.shape[1] :].tolist()
    start = (
        case.model.config.text_config.bos_token_id
    )  # which the original's generate puts before the new ids
    answer = expected[1:] if expected[0] == start else expected
    assert found[: len(answer)] == answer


def test_a_padded_batch_gives_the_logits_of_the_original(case: SimpleNamespace) -> None:
    tokens = case.expected["visual_tokens"].shape[1]
    rows = [
        expand(ids[mask.bool()], case.model.config.image_token_id, tokens)[0]
        for ids, mask in zip(
            case.expected["batch.input_ids"], case.expected["batch.attention_mask"], strict=True
        )
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    pixels = case.expected["pixel_values"][case.about["image_index"]["batch"]]
    with torch.no_grad():
        found = case.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    expected = case.expected["batch.logits"]
    real = case.expected["batch.merged_attention_mask"].bool()
    torch.testing.assert_close(found[..., : expected.shape[-1]][real], expected[real], atol=TOLERANCE, rtol=0)
