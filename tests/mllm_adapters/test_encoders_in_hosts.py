"""Encoders other than CLIP in multimodal models: an ordinary checkpoint, which computes what its parts compute."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mgll_encoder import UnsupportedCheckpointError, load_tower, save_tower
from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.tower.architectures import ARCHITECTURES
from mllm_adapters import load_mllm, plan_swap
from mllm_adapters.cli import retrain
from mllm_adapters.cli.swap import main
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.processing import llava_processor
from mllm_adapters.core.provenance import read_record
from mllm_adapters.examples.assembly import assemble, tower_contract
from mllm_adapters.examples.language_models import CHATML, tiny
from mllm_adapters.training.memory import Setting, estimate
from tests.builders import invoke, refused
from tests.mgll_encoder.test_encoders import saved
from tests.mllm_adapters import complete
from tests.mllm_adapters.llava_checkpoints import a_tower, original_llava, swap
from tests.mllm_adapters.retraining import color_rows, write_json
from tests.mllm_adapters.test_feature_cache import check_equal, prepared

HOSTED = [row.name for row in ARCHITECTURES.values() if not row.not_in_hosts and row.name != "clip"]
hosted = pytest.mark.parametrize("name", HOSTED)
TOLERANCE = 1e-5


def a_general_tower(name: str, folder: Path) -> Path:
    saved(name, folder, 56)
    return folder


def asked(out: Path) -> dict[str, Tensor]:
    processor = AutoProcessor.from_pretrained(out)
    pictures = [Image.effect_noise((60, 40), 90).convert("RGB")]
    return processor(text=["<image>Which disease?"], images=pictures, return_tensors="pt")


def by_hand(out: Path, tower: Path, plan: Plan, batch: dict[str, Tensor]) -> Tensor:
    """Logits of tower, projector and language model put one after another, with the tower's own pixels."""
    model = AutoModelForImageTextToText.from_pretrained(out)
    alone = load_tower(tower, image_size=plan.after.image_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (plan.after.mean, plan.after.std))
    own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in (alone.spec.mean, alone.spec.std))
    pixels = (batch["pixel_values"] * std + mean - own_mean) / own_std
    with torch.inference_mode():
        states = alone.model(pixels, output_hidden_states=True).hidden_states
        leading = alone.header.architecture.leading
        tokens = model.model.multi_modal_projector(states[plan.after.feature_layer][:, leading:])
        words = model.get_input_embeddings()(batch["input_ids"])
        places = batch["input_ids"] == model.config.image_token_index
        assert places.sum() == tokens.shape[0] * tokens.shape[1] == plan.after.tokens
        words[places] = tokens.flatten(0, 1)
        states = model.model.language_model(inputs_embeds=words, attention_mask=batch["attention_mask"])
        return model.lm_head(states.last_hidden_state)


@hosted
def test_a_swapped_llava_is_an_ordinary_checkpoint(name: str, tiny_llava: Path, tmp_path: Path) -> None:
    tower, out = a_general_tower(name, tmp_path / "tower"), tmp_path / "out"
    plan = swap(tiny_llava, tower, out)
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["model_type"] == ARCHITECTURES[name].model_type
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == ("full" if name == "siglip" else "default")
    assert (config["image_seq_length"], plan.after.tokens) == (4, 4)

    batch = asked(out)
    with torch.inference_mode():
        found = model(**batch).logits
    torch.testing.assert_close(found, by_hand(out, tower, plan, batch), rtol=0, atol=TOLERANCE)
    other_std = tuple(2 * one for one in plan.after.std)
    for wrong in ({"feature_layer": -1}, {"std": other_std}):
        spoilt = plan.model_copy(update={"after": plan.after.model_copy(update=wrong)})
        assert (found - by_hand(out, tower, spoilt, batch)).abs().max() > 10 * TOLERANCE


@hosted
def test_an_original_llava_takes_it_too(name: str, golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "source")
    tower, out = a_general_tower(name, tmp_path / "tower"), tmp_path / "out"
    plan = swap(source, tower, out)
    model, report = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    batch = asked(out)
    with torch.inference_mode():
        found = model(**batch).logits
    torch.testing.assert_close(found, by_hand(out, tower, plan, batch), rtol=0, atol=TOLERANCE)


@hosted
def test_towers_of_any_kind_replace_each_other(name: str, tiny_llava: Path, tmp_path: Path) -> None:
    """CLIP -> another -> itself, trained -> CLIP again: the model's vision tower is exactly the last one."""
    swap(tiny_llava, a_general_tower(name, tmp_path / "one"), tmp_path / "first")
    for number, other in enumerate((name, *HOSTED)):
        tower = a_general_tower(other, tmp_path / f"{number}")
        plan = swap(tmp_path / "first", tower, tmp_path / f"out {number}")
        assert plan.after.tokens == plan.before.tokens == 4
        batch = asked(tmp_path / f"out {number}")
        model, _ = load_mllm(tmp_path / f"out {number}")
        with torch.inference_mode():
            found = model(**batch).logits
        expected = by_hand(tmp_path / f"out {number}", tower, plan, batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    swap(tmp_path / "first", a_tower(tmp_path / "clip"), tmp_path / "back")
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.vision_feature_select_strategy == "default"


@hosted
def test_a_swap_verifies_and_can_be_undone(name: str, tiny_llava: Path, tmp_path: Path) -> None:
    tower, out = a_general_tower(name, tmp_path / "tower"), tmp_path / "out"
    done = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out)
    assert done.code == 0, done.err
    verified = invoke(main, "verify", out)
    assert verified.code == 0, verified.err
    restored = invoke(main, "restore", out, "--mllm", tiny_llava, "--out", tmp_path / "restored")
    assert restored.code == 0, restored.err
    before, after = load_mllm(tiny_llava)[0], load_mllm(tmp_path / "restored")[0]
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    taken = invoke(main, "restore", out, "--to-encoder", "--out", tmp_path / "taken")
    assert taken.code == 0, taken.err
    again = load_tower(tmp_path / "taken")
    assert again.spec.architecture == name
    inside = load_mllm(out)[0].model.vision_tower.state_dict()
    assert all(torch.equal(value, inside[key]) for key, value in again.model.state_dict().items())


@hosted
def test_it_is_written_as_a_delta(name: str, tiny_llava: Path, tmp_path: Path) -> None:
    tower, out = a_general_tower(name, tmp_path / "tower"), tmp_path / "delta"
    done = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--delta-only")
    assert done.code == 0, done.err
    swap(tiny_llava, tower, tmp_path / "whole")
    expected, found = (
        load_mllm(tmp_path / "whole")[0].state_dict(),
        load_mllm(tiny_llava, delta=out)[0].state_dict(),
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_registers_are_refused_before_anything_is_read(tiny_llava: Path, tmp_path: Path) -> None:
    tower = a_general_tower("dinov2_with_registers", tmp_path / "tower")
    line = refused(main, "--mllm", tiny_llava, "--encoder", tower, "--out", tmp_path / "out")
    assert "is a DINOv2 with registers, its register tokens are between class token and patch tokens" in line
    assert not (tmp_path / "out").exists()


def test_a_table_for_larger_images_is_resampled_once(tiny_llava: Path, tmp_path: Path) -> None:
    """A DINOv2 whose processor says 224 px has its positions for 518 px: the host's grid is made of those."""
    saved("dinov2", tmp_path / "tower", 42)
    plan = swap(tiny_llava, tmp_path / "tower", tmp_path / "out")
    found = load_mllm(tmp_path / "out")[0].model.vision_tower.embeddings.position_embeddings[0, 0]
    once = load_tower(tmp_path / "tower", image_size=28).model.embeddings.position_embeddings[0]
    table = load_mllm(tmp_path / "out")[0].model.vision_tower.embeddings.position_embeddings[0]
    assert torch.equal(found, once[0])
    shift = table[1:] - once[1:]  # that of the host's normalization, the same for all patches
    assert (shift - shift[:1]).abs().max() < TOLERANCE
    assert plan.after.image_size == 28


def test_a_plan_says_what_is_wrong_with_a_host(tiny_llava: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llava / "config.json").read_text())
    config["vision_config"]["model_type"] = "pixtral"
    (tmp_path / "host").mkdir()
    for file in tiny_llava.iterdir():
        (tmp_path / "host" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "host" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"vision_config: field 'model_type' is 'pixtral': expected clip_vision_model or",
    ):
        plan_swap(tmp_path / "host", a_tower(tmp_path / "tower"))


@hosted
def test_it_is_aligned_estimated_and_retrained_from_a_cache(
    name: str, tiny_llava: Path, tmp_path: Path
) -> None:
    """The projector is fitted to images, memory is told beforehand, and the frozen tower is run once per image."""
    tower, out, images = a_general_tower(name, tmp_path / "tower"), tmp_path / "aligned", tmp_path / "images"
    rows = color_rows(images)
    for place in range(12):
        Image.effect_noise((60, 40), 40 + 10 * place).convert("RGB").save(images / f"noise {place}.png")
    done = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--align", images)
    assert done.code == 0, done.err
    verified = invoke(main, "verify", out)
    assert verified.code == 0, verified.err
    record = json.loads((out / "mgll_swap.json").read_text())
    assert record["plan"]["alignment"]

    for stage in ("projector", "full"):
        told = estimate(
            json.loads((out / "config.json").read_text()), stage, Setting(2, 48, precision=torch.float32)
        )
        model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        assert told.weights == sum(parameter.nbytes for parameter in model.parameters())

    data = write_json(tmp_path / "train.json", rows)
    trained = invoke(
        retrain.main, "--model", out, "--data", data, "--images", images, "--epochs", 1, "--learning-rate", 0.1,
        "--batch-size", 2, "--workers", 0, "--report-to", "none", "--out", tmp_path / "trained",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "cache" in trained.err
    before, after = (load_mllm(folder)[0].state_dict() for folder in (out, tmp_path / "trained"))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed
    assert all("multi_modal_projector" in key for key in changed)


@hosted
def test_cached_features_give_the_same_loss_and_gradients(
    name: str, tiny_llava: Path, tmp_path: Path
) -> None:
    swap(tiny_llava, a_general_tower(name, tmp_path / "tower"), tmp_path / "out")
    place = SimpleNamespace(
        data=write_json(tmp_path / "train.json", color_rows(tmp_path / "images")), images=tmp_path / "images"
    )
    check_equal(prepared(tmp_path / "out", place))


@hosted
@pytest.mark.parametrize("host", ["aya-vision", "paligemma"])
def test_hosts_whose_class_builds_any_tower_take_it(name: str, host: str, tmp_path: Path) -> None:
    """Aya Vision reads one hidden state, PaliGemma a tower's end; both with the tower that config.json names."""
    source = complete.BUILDERS[host](tmp_path / "host", lambda: pytest.fail("needs no golden folder"))
    tower, out = a_general_tower(name, tmp_path / "tower"), tmp_path / "out"
    done = invoke(main, "--mllm", source, "--encoder", tower, "--out", out)
    assert done.code == 0, done.err
    model, report = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    assert invoke(main, "verify", out).code == 0

    plan = read_record(out).plan_with(json.loads((out / "config.json").read_text()))
    alone = load_tower(tower, image_size=plan.after.image_size)
    pixels = torch.randn(2, 3, plan.after.image_size, plan.after.image_size)
    host_mean, host_std, mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (plan.after.mean, plan.after.std, alone.spec.mean, alone.spec.std)
    )
    with torch.inference_mode():
        output = alone.model((pixels * host_std + host_mean - mean) / std, output_hidden_states=True)
        leading = alone.header.architecture.leading
        read = {"aya-vision": output.hidden_states[-2][:, leading:], "paligemma": output.last_hidden_state}
        expected = model.model.multi_modal_projector(read[host])
        found = model.model.get_image_features(pixels).pooler_output
    found = torch.stack(list(found)) if isinstance(found, list) else found
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=TOLERANCE)
    assert plan.after.tokens == found[0].shape[0]


def test_other_hosts_refuse_it_before_anything_is_read(golden: Path, tmp_path: Path) -> None:
    tower = a_general_tower("dinov2", tmp_path / "tower")
    for host in (
        "qwen-vl",
        "instructblip",
        "internvl",
        "janus-pro",
        "mini-gemini",
        "med-flamingo",
        "qwen2-vl",
    ):
        source = complete.BUILDERS[host](tmp_path / host, lambda: golden)
        line = refused(main, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
        assert "is a DINOv2: a swapped " in line, line
        assert line.endswith("can have a CLIP ViT as its tower")


@hosted
@pytest.mark.parametrize("host", ["internvl", "janus-pro"])
def test_a_family_that_is_written_as_a_llava_takes_it_there(
    name: str, host: str, golden: Path, tmp_path: Path
) -> None:
    source = complete.BUILDERS[host](tmp_path / "host", lambda: golden)
    tower, out = a_general_tower(name, tmp_path / "tower"), tmp_path / "out"
    done = invoke(main, "--mllm", source, "--encoder", tower, "--out", out, "--layout", "llava")
    assert done.code == 0, done.err
    model, report = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values())
    plan = read_record(out).plan_with(json.loads((out / "config.json").read_text()))
    assert model.config.vision_feature_select_strategy == plan.after.select_strategy
    processor = AutoProcessor.from_pretrained(out)
    picture = Image.effect_noise((60, 40), 90).convert("RGB")
    batch = processor(text=[processor.image_token + "Which?"], images=[picture], return_tensors="pt")
    with torch.inference_mode():
        found = model(**batch).logits
    torch.testing.assert_close(found, by_hand(out, tower, plan, batch), rtol=0, atol=10 * TOLERANCE)
    again = invoke(main, "--mllm", out, "--encoder", tower, "--out", tmp_path / "again")
    assert again.code == 0, again.err


@hosted
def test_a_small_llava_is_built_on_it_and_swapped(name: str, tmp_path: Path) -> None:
    """As scripts/build_smol_llava.py joins a tower and a language model; then the same tower, trained, goes in."""
    tower = load_tower(a_general_tower(name, tmp_path / "tower"), image_size=28)
    speech = tiny(["Which disease?"], ["glaucoma", "cataract"], seed=0)
    contract, host = tower_contract(tower.spec), tmp_path / "llava"
    assemble(tower, speech, seed=0).save_pretrained(host)
    llava_processor(contract, speech.tokenizer, CHATML).save_pretrained(host)
    model, report = AutoModelForImageTextToText.from_pretrained(host, output_loading_info=True)
    assert not any(report.values())
    pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        states = tower.model(pixels, output_hidden_states=True).hidden_states[contract.feature_layer]
        expected = model.model.multi_modal_projector(states[:, tower.header.architecture.leading :])
        found = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert found.shape[1] == 4

    trained = save_tower(tower, tmp_path / "trained")
    plan = swap(host, trained, tmp_path / "out")
    assert (plan.before.feature_layer, plan.after.tokens) == (contract.feature_layer, 4)
    before, after = (load_mllm(folder)[0].state_dict() for folder in (host, tmp_path / "out"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_no_small_llava_is_built_on_registers(tmp_path: Path) -> None:
    tower = load_tower(a_general_tower("dinov2_with_registers", tmp_path / "tower"))
    with pytest.raises(
        IncompatibleTowerError, match="a DINOv2 with registers cannot be in a LLaVA: its register tokens"
    ):
        tower_contract(tower.spec)
