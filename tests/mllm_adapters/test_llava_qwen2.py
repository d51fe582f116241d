"""LLaVA on Qwen2 (HuatuoGPT-Vision): read by its fields where it is a plain LLaVA, refused by name where it is not."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mgll_encoder import inspect_tower, vision_config
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from mllm_adapters.core.known_towers import PUBLISHED_TOWERS
from mllm_adapters.core.registry import open_checkpoint
from tests.builders import byte_tokenizer, invoke, refused, sparse_checkpoint, tower_config
from tests.mllm_adapters.families import llava_qwen2
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.families.llava_qwen2 import IMAGE, reference, settings, with_tokenizer, write
from tests.mllm_adapters.llava_checkpoints import a_tower, convert, edit_config, language_model, swap

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]}]


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    model, _ = load_mllm(folder, dtype=torch.float32)
    tokens, row = model.config.image_seq_length, []
    for token in ids.tolist():
        row += [model.config.image_token_id] * tokens if token == IMAGE else [token]
    return model(input_ids=torch.tensor([row]), pixel_values=pixels).logits


@pytest.fixture
def asked() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a question about a picture, and its pixels."""
    return torch.tensor([5, IMAGE, 9, 11]), torch.randn(
        1, 3, 28, 28, generator=torch.Generator().manual_seed(2)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", [{"tied": True}, {"projector": "linear"}, {"projector": "mlp1x_gelu"}], ids=str
)
def test_converted_it_gives_what_its_parts_give(variant: dict[str, Any], asked: Any, tmp_path: Path) -> None:
    """Negative control: without Qwen2's biases, which LLaMA has none of, the figures are far off."""
    whole, (ids, pixels) = reference(**variant), asked
    fields = {"mm_projector_type": variant.get("projector", "mlp2x_gelu")}
    source = write(tmp_path / "source", whole, **fields)
    plan = convert(source, tmp_path / "out")
    assert plan.config["text_config"]["model_type"] == "qwen2"
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = whole.logits(ids, pixels)
    for folder in (source, tmp_path / "out"):
        torch.testing.assert_close(logits_of(folder, ids, pixels)[..., :96], expected, atol=1e-4, rtol=0)
    for name, value in whole.language_model.named_parameters():
        if name.endswith("proj.bias"):
            value.zero_()
    assert (whole.logits(ids, pixels) - expected).abs().max() > 1e-2


def test_the_prompt_and_its_tokens_are_those_of_its_own_script(tmp_path: Path) -> None:
    """cli.py cuts the text at <image> and tokenises what is before and after, without special tokens."""
    source = with_tokenizer(tmp_path / "source")
    plan = convert(source, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    found = processor(text=[text], images=[Image.new("RGB", (60, 30))], return_tensors="pt")
    own = byte_tokenizer()
    before, after = (
        own(part, add_special_tokens=False).input_ids
        for part in ["<|user|>\n", "\nWhich disease?\n<|assistant|>\n"]
    )
    assert found["input_ids"][0].tolist() == [*before, *[plan.image_token_id] * plan.after.tokens, *after]
    assert any("the prompt is HuatuoGPT-Vision's" in note for note in plan.notes)


def test_the_placeholder_takes_a_row_that_no_token_has(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "source")
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    plan = convert(source, tmp_path / "out")
    assert plan.image_token_id < rows
    assert plan.config["text_config"]["vocab_size"] == rows
    assert not any("the vocabulary grows" in note for note in plan.notes)


def test_a_chat_model_inside_is_asked_in_chatml(tmp_path: Path) -> None:
    """Told by the token that ends its answers."""
    source = with_tokenizer(tmp_path / "source", end="<|im_end|>")
    plan = convert(source, tmp_path / "out")
    text = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(
        QUESTION, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhich disease?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert any("the prompt is ChatML" in note for note in plan.notes)


@torch.no_grad()
def test_the_tower_in_its_shards_counts_as_in_its_own_script(asked: Any, tmp_path: Path) -> None:
    """The copy in vit/ is where its code takes the architecture from, not the weights."""
    whole, (ids, pixels) = reference(), asked
    source = write(tmp_path / "source", whole)
    copy = CLIPVisionModel(tower_config(hidden_act="quick_gelu"))
    copy.save_pretrained(source / llava_qwen2.TOWER)
    torch.testing.assert_close(
        logits_of(source, ids, pixels)[..., :96], whole.logits(ids, pixels), atol=1e-4, rtol=0
    )
    notes = convert(source, tmp_path / "out").notes
    assert any("the host's own tower is the one in its shards" in note for note in notes)


def test_it_is_swapped_though_its_tower_is_gone_from_where_it_was(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "source")
    shutil.rmtree(source / "vit")
    tower = a_tower(tmp_path / "mgll")
    command = ("--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
    outcome = invoke(main, *command)
    assert outcome.code == 0, outcome.err
    said = " ".join((outcome.out + outcome.err).split())
    assert "its geometry is that of its tensors in the shards" in said
    model, processor = load_mllm(tmp_path / "out", dtype=torch.float32)
    assert model.config.text_config.model_type == "qwen2"
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (60, 30))], return_tensors="pt")
    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        seen, other = (model(**{**batch, "pixel_values": pixels}).logits for pixels in (noise, 0 * noise))
    assert (seen - other).abs().max() > 1e-3
    assert swap(tmp_path / "out", tower, tmp_path / "again").layout == "transformers"
    assert invoke(main, *command[:4], "--out", tmp_path / "llava", "--layout", "llava").code == 0


def test_a_projector_beside_its_qwen2_is_read(tmp_path: Path) -> None:
    """LLaVA's projector-only folders, whose language model is published by itself."""
    whole = reference()
    source = write(tmp_path / "whole", whole)
    config = json.loads((source / "config.json").read_text())
    state = whole.state()
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "qwen2"}))
    torch.save({n: v for n, v in state.items() if "mm_projector" in n}, folder / "mm_projector.bin")
    shutil.copytree(source / "vit", folder / "vit")
    language_model(tmp_path / "qwen2", config, state)
    found, expected = load_mllm(folder, dtype=torch.float32)[0], load_mllm(source, dtype=torch.float32)[0]
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name
    message = refused(main, "convert", "--mllm", tmp_path / "qwen2", "--out", tmp_path / "out")
    assert "this is a language model, without vision tower and projector" in message


NOT_PLAIN: Mapping[str, tuple[dict[str, Any], str]] = {
    "views": ({"image_aspect_ratio": "anyres_max_9"}, "cut an image into views (anyres)"),
    "rows between": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    "resampler": ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
    "several scales": ({"s2": True}, "s2 is True"),
    "three layers": ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
    "SigLIP": ({"mm_vision_tower": "/data/google/siglip-so400m-patch14-384"}, "with a siglip tower are not supported"),
    "FastVLM": ({"mm_vision_tower": "mobileclip_l_1024"}, "with a mobileclip tower are not supported"),
    "another language model": ({"architectures": ["LlavaQwen3ForCausalLM"]}, "Mistral and Qwen2"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_no_plain_llava_is_refused_by_the_field_that_says_so(name: str, tmp_path: Path) -> None:
    changes, words = NOT_PLAIN[name]
    source = edit_config(write(tmp_path / "source", reference(), vit=False), **changes)
    message = refused(
        main, "--mllm", source, "--encoder", a_tower(tmp_path / "mgll"), "--out", tmp_path / "out"
    )
    assert str(source) in message
    assert words in message
    assert not (tmp_path / "out").exists()


def test_the_class_of_llava_next_is_read_where_its_fields_are_plain(tmp_path: Path) -> None:
    source = write(
        tmp_path / "source", reference(), architectures=["LlavaQwenForCausalLM"], model_type="llava_qwen"
    )
    assert open_checkpoint(source)[1].spec.name == "llava"
    load_mllm(source)


@pytest.mark.parametrize(("size", "tokens"), [(None, 576), (224, 256)])
def test_huatuogpt_vision_7b(size: int | None, tokens: int, tmp_path: Path) -> None:
    """734 tensors in the published shards, 391 of them the tower's; names, shapes and settings from the hub's page.

    152,064 rows for 151,646 tokens: the placeholder needs no new one where the tokenizer is there.
    """
    text = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, bos_token_id=151643, eos_token_id=151643,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        whole = llava_qwen2.Reference(
            CLIPVisionModel(vision_config(PUBLISHED_TOWERS["openai/clip-vit-large-patch14-336"])),
            torch.nn.Sequential(torch.nn.Linear(1024, 3584), torch.nn.GELU(), torch.nn.Linear(3584, 3584)),
            Qwen2ForCausalLM(text),
        )
    shapes = {name: tuple(value.shape) for name, value in whole.state().items()}
    assert len(shapes) == 734
    config = {**settings(text), "mm_hidden_size": 1024}
    source = sparse_checkpoint(tmp_path / "source", config, shapes, "BF16")
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(published_tower(tmp_path / "mgll")), size)
    assert (plan.before.tokens, plan.after.tokens) == (576, tokens)
    rows = 152064 + 64
    projector = 1024 * 3584 + 3584 + 3584 * 3584 + 3584
    clip = 303_507_456 - (576 - tokens) * 1024
    qwen2 = 7_615_616_512 + 2 * 64 * 3584
    assert plan.config["text_config"]["vocab_size"] == rows
    check_full_size(plan, checkpoint, weights=qwen2 + projector + clip)
    assert {step.dtype for step in plan.steps} == {"bfloat16"}
