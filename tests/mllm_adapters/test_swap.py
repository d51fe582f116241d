"""Somebody puts an MGLL tower into a LLaVA."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mgll_encoder import load_tower
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD
from mllm_adapters import load_mllm
from mllm_adapters.core.fates import Kept
from mllm_adapters.core.registry import open_checkpoint
from tests.mllm_adapters.families.llava import expand
from tests.mllm_adapters.llava_checkpoints import (
    HOSTS,
    golden_tower,
    normalized,
    swap,
)


@pytest.fixture(scope="module", params=HOSTS)
def swapped(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("swap") / "swapped"
    source = golden / request.param / "checkpoint"
    encoder = next((golden / "mgll_official").glob("*.pth"))
    plan = swap(source, encoder, out)
    return SimpleNamespace(plan=plan, out=out, source=source, encoder=encoder)


def by_hand(swapped: SimpleNamespace, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """MGLL features -> projector -> LM, composed of separately loaded parts."""
    config = json.loads((swapped.out / "config.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(swapped.out.glob("*.safetensors")):
        weights |= load_file(file)
    weights = {name: value.float() for name, value in weights.items()}
    after = swapped.plan.after
    tower = load_tower(swapped.encoder).model
    output = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    hidden = output.hidden_states[after.feature_layer][:, 0 if after.class_token else 1 :]
    part = {k.removeprefix("multi_modal_projector."): v for k, v in weights.items()}
    inner = torch.nn.functional.gelu(hidden @ part["linear_1.weight"].T + part["linear_1.bias"])
    visual = inner @ part["linear_2.weight"].T + part["linear_2.bias"]

    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    text = dict(config["text_config"])
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[text.pop("model_type")](**text)).eval()
    prefix = "language_model."
    if text["tie_word_embeddings"]:
        weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}model.embed_tokens.weight"]
    lm.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    embeddings = lm.get_input_embeddings()(ids)
    embeddings[ids == swapped.plan.image_token_id] = visual.reshape(-1, visual.shape[-1])
    return lm(inputs_embeds=embeddings).logits


def test_the_swapped_model_is_mgll_features_then_projector_then_language_model(
    swapped: SimpleNamespace,
) -> None:
    after = swapped.plan.after
    torch.manual_seed(0)
    picture = torch.rand(1, 3, after.image_size, after.image_size)
    ids = torch.tensor([[1, 5] + [swapped.plan.image_token_id] * after.tokens + [7, 9]])
    model, _ = load_mllm(swapped.out, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=normalized(picture, after.mean, after.std)).logits
        expected = by_hand(swapped, normalized(picture, IMAGENET_MEAN, IMAGENET_STD), ids)
        unfolded = by_hand(swapped, normalized(picture, after.mean, after.std), ids)
    # A host in float16 stores the tower in float16, after folding; the tower by hand was never rounded.
    tolerance = 1e-4 if swapped.plan.config["dtype"] == "float32" else 1e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert (found - unfolded).abs().max() > 5 * tolerance, "the normalization must have been folded"


def test_the_plan_says_what_changes(swapped: SimpleNamespace) -> None:
    plan = swapped.plan
    assert plan.swapped
    assert plan.processor is None  # the golden folders hold no tokenizer
    assert plan.after.tokens == plan.before.tokens
    config = json.loads((swapped.source / "config.json").read_text())
    own = json.loads((golden_tower(swapped.source) / "config.json").read_text())
    activation = own.get("vision_config", own)["hidden_act"]  # a CLIP, or its vision model alone
    assert (plan.before.activation, plan.after.activation) == (activation, "gelu")
    assert plan.before.resize == ("pad" if config["image_aspect_ratio"] == "pad" else "crop")
    assert plan.after.resize == "squash"
    assert any(f"<image> = {plan.image_token_id}" in note for note in plan.notes)
    written = {}
    for file in swapped.out.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            written |= {k: tuple(weights.get_slice(k).get_shape()) for k in weights.keys()}  # noqa: SIM118
    assert written == {step.name: step.shape for step in plan.steps}


def test_untouched_tensors_are_bit_equal_and_new_rows_are_the_mean(swapped: SimpleNamespace) -> None:
    checkpoint, _, _ = open_checkpoint(swapped.source)
    found, _ = load_mllm(swapped.out)
    rows = found.get_input_embeddings().weight
    original = checkpoint.read("model.embed_tokens.weight")
    assert torch.equal(rows[: original.shape[0]], original)
    assert rows.shape[0] % 64 == 0
    torch.testing.assert_close(rows[original.shape[0]], original.double().mean(0).to(original.dtype))
    name = "layers.0.mlp.down_proj.weight"
    assert torch.equal(found.model.language_model.get_parameter(name), checkpoint.read(f"model.{name}"))


def the_tower_inside(source: Path, outside: Path, folder: Path) -> Path:
    """A trained tower in the shards, as a folder with the configuration of the one that it comes from."""
    checkpoint, _, _ = open_checkpoint(source)
    prefix = "model.vision_tower.vision_tower."
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    if not names:
        return outside
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (folder / file).write_text((outside / file).read_text())
    state = {name.removeprefix(prefix): checkpoint.read(name).contiguous() for name in names}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("host", HOSTS)
def test_putting_the_hosts_own_tower_in_changes_nothing(host: str, golden: Path, tmp_path: Path) -> None:
    """The strictest control there is: the logits stay those of the original code."""
    source = golden / host / "checkpoint"
    config = json.loads((source / "config.json").read_text())
    tower = golden_tower(source)
    if host == "llava" and config.get("unfreeze_mm_vision_tower"):
        tower = the_tower_inside(source, tower, tmp_path / "inside")
    plan = swap(source, tower, tmp_path / "same")
    assert plan.connectors == {"multi_modal_projector.linear_1": Kept(width=plan.after.width)}
    model, _ = load_mllm(tmp_path / "same", dtype=torch.float32)
    expected = load_file(golden / host / "expected.safetensors")
    ids = expand(expected["seq0.input_ids"][0], plan.image_token_id, plan.after.tokens)
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=expected["pixel_values"][:1]).logits
    torch.testing.assert_close(
        found[..., : expected["seq0.logits"].shape[-1]], expected["seq0.logits"], atol=1e-4, rtol=0
    )


def test_without_a_tokenizer_the_preprocessing_travels_all_the_same(
    swapped: SimpleNamespace, tmp_path: Path
) -> None:
    settings = json.loads((swapped.out / "preprocessor_config.json").read_text())
    assert settings["size"] == {
        "height": swapped.plan.after.image_size,
        "width": swapped.plan.after.image_size,
    }
    assert settings["do_center_crop"] is False
    plan = swap(swapped.out, swapped.encoder, tmp_path / "again")
    assert plan.before == swapped.plan.after


def test_the_model_card_says_what_the_checkpoint_is_made_of(swapped: SimpleNamespace) -> None:
    card = (swapped.out / "README.md").read_text()
    assert f"`{swapped.encoder.name}`" in card
    assert "multi_modal_projector.linear_1" in card
    assert f"| activation | {swapped.plan.before.activation} | gelu |" in card
    assert str(swapped.source.absolute().parent) not in card, "a card is published: no paths of this machine"
