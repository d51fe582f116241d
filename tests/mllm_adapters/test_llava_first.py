"""The first releases of LLaVA and LLaVA-Med: one Linear, and <im_patch> between <im_start> and <im_end>."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from mllm_adapters.core.registry import open_checkpoint
from tests.builders import byte_tokenizer, refused
from tests.mllm_adapters.llava_checkpoints import a_tower, convert, edit_config, first_llava, swap

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_llava(tmp_path_factory.mktemp("first") / "llava-med-7b")


def picture() -> Image.Image:
    """Every pixel another one, and wider than high."""
    pixels = torch.randint(256, (30, 60, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def by_hand(source: Path, pixels: Tensor, ids: Tensor) -> Tensor:
    """The original's forward: hidden layer -2 without class token, one Linear, put where <im_patch> stands."""
    state = torch.load(source / "pytorch_model.bin")
    tower = CLIPVisionModel.from_pretrained(source / "openai" / "clip-vit-large-patch14")
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    visual = hidden @ state.pop("model.mm_projector.weight").T + state.pop("model.mm_projector.bias")
    config = LlamaConfig.from_pretrained(source)
    lm = LlamaForCausalLM(config).eval()
    lm.load_state_dict(state)
    embeddings = lm.get_input_embeddings()(ids)
    (start,) = (ids[0] == 262).nonzero().flatten().tolist()
    embeddings[0, start + 1 : start + 1 + visual.shape[1]] = visual[0]
    assert ids[0, start + 1 + visual.shape[1]] == 263
    return lm(inputs_embeds=embeddings).logits


def asked(processor: Any) -> dict[str, Tensor]:
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    return processor(text=[text], images=[picture()], return_tensors="pt")


@torch.no_grad()
def test_it_computes_what_the_original_computes(source: Path) -> None:
    model, processor = load_mllm(source)
    batch = asked(processor)
    clip = CLIPImageProcessor.from_pretrained(source / "openai" / "clip-vit-large-patch14")
    pixels = clip(picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        batch["pixel_values"], pixels, atol=1e-5, rtol=0
    )  # shortest side, then centre crop
    found = model(**batch).logits
    torch.testing.assert_close(found, by_hand(source, pixels, batch["input_ids"]), atol=1e-5, rtol=0)
    other = by_hand(source, pixels.flip(-1), batch["input_ids"])
    assert (found - other).abs().max() > 1e-3, "negative control: another picture"


def test_it_is_llava_med_with_the_placeholder_of_its_tokenizer(source: Path, tmp_path: Path) -> None:
    plan = convert(source, tmp_path / "out")
    assert (plan.family, plan.layout, plan.before.tokens) == ("llava-med", "original", 4)
    assert plan.before.resize == "crop"
    assert any("the tokenizer's own <im_patch> = 261" in note for note in plan.notes)
    assert {s.operation for s in plan.steps if "linear_2" in s.name} == {"identity", "zeros"}
    assert plan.config["projector_hidden_act"] == "linear"
    assert plan.config["text_config"]["vocab_size"] == 264, "no row is added"
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = asked(processor)
    ids = batch["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) == 4
    assert [ids.count(i) for i in (262, 263)] == [1, 1]
    with torch.no_grad():
        expected = by_hand(source, batch["pixel_values"], batch["input_ids"])
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)


def test_a_new_tower_keeps_placeholder_and_projector_twice(source: Path, tmp_path: Path) -> None:
    swap(source, a_tower(tmp_path / "one", seed=1), tmp_path / "first")
    again = swap(tmp_path / "first", a_tower(tmp_path / "two", seed=2), tmp_path / "second", image_size=42)
    assert (again.family, again.after.tokens) == ("llava-med", 9)
    model, processor = load_mllm(tmp_path / "second")
    assert model.config.projector_hidden_act == "linear"
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, torch.eye(48))
    batch = asked(processor)
    assert (batch["input_ids"] == 261).sum() == 9
    assert torch.isfinite(model(**batch).logits).all()


def test_a_wider_tower_gets_a_new_linear(source: Path, tmp_path: Path) -> None:
    plan = swap(source, a_tower(tmp_path / "wide", width=64), tmp_path / "out")
    made = {s.name.rpartition("projector.")[2]: s.operation for s in plan.steps if "projector" in s.name}
    assert made == {
        "linear_1.weight": "reinit", "linear_1.bias": "zeros",
        "linear_2.weight": "identity", "linear_2.bias": "zeros",
    }  # fmt: skip
    load_mllm(tmp_path / "out")


def test_under_another_name_it_is_the_first_llava(tmp_path: Path) -> None:
    """Same code, same prompt: nothing but the name tells them apart."""
    source = first_llava(tmp_path / "source", name="liuhaotian/LLaVA-7b-v0", start_end=False)
    model, processor = load_mllm(source)
    assert open_checkpoint(source)[1].spec.name == "llava"
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert text.endswith("###Human: Which disease?\n<im_patch>###Assistant:")
    assert torch.isfinite(model(**asked(processor)).logits).all()


def test_the_first_release_fell_back_to_the_last_layer(tmp_path: Path) -> None:
    source = first_llava(tmp_path / "source")
    edit_config(source, mm_vision_select_layer=None)
    checkpoint, family, _ = open_checkpoint(source)
    assert family.plan(checkpoint).before.feature_layer == -1


def without_tokenizer(folder: Path) -> Path:
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


def with_llamas_tokenizer(folder: Path) -> Path:
    byte_tokenizer().save_pretrained(without_tokenizer(folder))
    return folder


FAULTS = {
    "no tokenizer": (without_tokenizer, "it has no tokenizer with their ids: add the tokenizer files"),
    "LLaMA's tokenizer": (with_llamas_tokenizer, "its tokenizer does not have them within the 264 rows"),
    "BiomedCLIP": (
        lambda f: edit_config(f, mm_vision_tower="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"),
        "checkpoints with a BiomedCLIP tower are not supported",
    ),
    "two layers": (
        lambda f: edit_config(f, mm_projector_type="mlp2x_gelu"),
        "says that the projector is mlp2x_gelu, but the tensors are those of linear",
    ),
    "no tower named": (
        lambda f: edit_config(f, mm_vision_tower=None),
        "set mm_vision_tower to the one that it was trained with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    source = spoil(first_llava(tmp_path / "source"))
    assert message in refused(main, "convert", "--mllm", source, "--out", tmp_path / "out")


def test_a_delta_that_was_not_applied_is_refused(tmp_path: Path) -> None:
    """Its name and shapes are those of the whole model; the final normalization near zero gives it away."""
    source = first_llava(tmp_path / "llava-med-7b-delta", delta=True)
    message = refused(main, "convert", "--mllm", source, "--out", tmp_path / "out")
    assert "0.001 on average, expected about 1: this looks like a delta that has not been added" in message


def test_a_configuration_that_names_no_tower_says_what_to_add(tmp_path: Path) -> None:
    source = first_llava(tmp_path / "source")
    text = (source / "config.json").read_text().replace("mm_vision_tower", "was_vision_tower")
    (source / "config.json").write_text(text)
    message = refused(main, "convert", "--mllm", source, "--out", tmp_path / "out")
    assert "names no vision tower: set mm_vision_tower" in message
