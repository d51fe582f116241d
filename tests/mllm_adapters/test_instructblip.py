"""Somebody gives InstructBLIP the eyes of MGLL."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    InstructBlipForConditionalGeneration,
)

from mgll_encoder.common.errors import (
    InvalidArgumentError,
    NotFoundError,
    UnsupportedCheckpointError,
    UserError,
)
from mllm_adapters import load_mllm
from mllm_adapters.core.fates import Kept, Taken
from mllm_adapters.core.registry import detect, open_checkpoint
from mllm_adapters.core.stages import apply_stage
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.families.instructblip import CASES, inputs
from tests.mllm_adapters.llava_checkpoints import a_tower
from tests.mllm_adapters.tiny_instructblip import (
    QUESTION,
    swap,
    text_tokenizer,
    tiny_instructblip,
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_instructblip(tmp_path_factory.mktemp("models") / "instructblip")


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tower(tmp_path_factory.mktemp("towers") / "mgll", width=32, image_size=28)


@pytest.fixture(scope="module")
def swapped(stock: Path, eyes: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("swap") / "swapped"
    plan = swap(stock, eyes, out)
    model, processor = load_mllm(out, dtype=torch.float32)
    return SimpleNamespace(plan=plan, out=out, model=model, processor=processor)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_the_qformer_gives_what_the_original_gave(case: Any, golden: Path) -> None:
    vectors = Golden(golden / case.golden)
    parts = {name: vectors.folder / path for name, path in (case.parts or {}).items()}
    model, _ = load_mllm(vectors.folder, dtype=torch.float32, parts=parts)
    for sequence in ("seq0", "seq1"):
        given = inputs(model, vectors, sequence)
        seen = model.get_image_features(given["pixel_values"], given["qformer_input_ids"])
        expected = vectors.expected[f"{sequence}.visual_tokens"]
        torch.testing.assert_close(seen.pooler_output, expected, atol=1e-4, rtol=0)
        expected = vectors.expected[f"{sequence}.qformer_output"]
        torch.testing.assert_close(seen.qformer_outputs.last_hidden_state, expected, atol=1e-4, rtol=0)
        other = model.get_image_features(given["pixel_values"], given["qformer_input_ids"].flip(1))
        assert (other.pooler_output - seen.pooler_output).abs().max() > 1e-3, (
            "the Q-Former reads the instruction"
        )


def test_it_generates_what_the_original_generated(golden: Path) -> None:
    vectors = Golden(golden / "instructblip")
    model, _ = load_mllm(vectors.folder, dtype=torch.float32)
    expected = vectors.expected["seq0.greedy"][0].tolist()
    given = inputs(model, vectors, "seq0")
    new = model.generate(**given, do_sample=False, max_new_tokens=8, eos_token_id=None)
    # The vocabulary has grown by rows that the original could not say; its first id is the start token.
    assert new[0, given["input_ids"].shape[1] :].tolist() == expected[-8:]


@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_the_layout_of_2023_gets_a_placeholder_and_says_the_same(kind: str, tmp_path: Path) -> None:
    source = tiny_instructblip(tmp_path / kind, kind)
    checkpoint, family, layout = open_checkpoint(source)
    plan = family.plan(checkpoint)
    size = len(text_tokenizer(kind))
    assert layout == "stock"
    assert plan.image_token_id == size
    assert plan.config["text_config"]["vocab_size"] % 64 == (0 if kind == "llama" else (size + 13) % 64)
    model, processor = load_mllm(source, dtype=torch.float32)
    reference = InstructBlipForConditionalGeneration.from_pretrained(source)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids, read = torch.tensor([[2, 50, 60, 70]]), torch.tensor([[2, 9, 10, 3]])
    given = {"pixel_values": pixels, "qformer_input_ids": read}
    if kind == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 40, 41]])
    visual = reference.get_image_features(pixels, read).pooler_output
    embedded = torch.cat([visual, reference.get_input_embeddings()(ids)], dim=1)
    decoder = {"decoder_input_ids": given["decoder_input_ids"]} if kind == "t5" else {}
    expected = reference.language_model(inputs_embeds=embedded, **decoder).logits
    images = ids.new_full((1, 5), plan.image_token_id)
    found = model(input_ids=torch.cat([images, ids], dim=1), **given).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert processor is not None


def test_a_placeholder_that_is_there_is_kept(tmp_path: Path) -> None:
    source = tiny_instructblip(tmp_path / "new", placeholder=77)
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint)
    assert plan.image_token_id == 77
    assert {step.operation for step in plan.steps} == {"keep"}


def test_tables_of_older_files_are_left_out(stock: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "older"))
    state = load_file(folder / "model.safetensors")
    state["qformer.embeddings.position_ids"] = torch.arange(24)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_mllm(folder, dtype=torch.float32)
    assert model.config.image_token_id == len(text_tokenizer("llama"))


def test_connectors_of_another_width_are_made_anew_and_their_biases_kept(
    stock: Path, swapped: SimpleNamespace
) -> None:
    before, after = load_file(stock / "model.safetensors"), swapped.model.state_dict()
    assert swapped.plan.before.width == 24
    assert swapped.plan.after.width == 32
    connectors = [name for name in swapped.plan.connectors if name.startswith("qformer.")]
    assert len(connectors) == 4, "key and value in layers 0 and 2"
    for connector in connectors:
        assert after[f"{connector}.weight"].shape == (36, 32)
        assert torch.equal(after[f"{connector}.bias"], before[f"{connector}.bias"])
    first, second, *_ = (after[f"{connector}.weight"] for connector in connectors)
    assert not torch.equal(first, second), "each drawn for itself"
    assert torch.equal(after["vision_model.ln_vision.weight"], torch.ones(32))
    assert torch.equal(after["vision_model.ln_vision.bias"], torch.zeros(32))
    for name in ("query_tokens", "language_projection.weight", "qformer.embeddings.word_embeddings.weight"):
        assert torch.equal(after[name], before[name])
    assert swapped.plan.before.tokens == swapped.plan.after.tokens == 5


def test_connectors_of_the_same_width_stay_with_their_norm(stock: Path, tmp_path: Path) -> None:
    plan = swap(stock, a_tower(tmp_path / "tower", width=24), tmp_path / "out")
    assert set(plan.connectors.values()) == {Kept(width=24)}
    before = load_file(stock / "model.safetensors")
    model, _ = load_mllm(tmp_path / "out", dtype=torch.float32)
    found = model.get_submodule("vision_model.ln_vision")
    assert torch.equal(found.weight, before["vision_model.post_layernorm.weight"])
    assert found.eps == 1e-6


@torch.no_grad()
def test_the_qformer_sees_all_tokens_one_block_before_the_end(swapped: SimpleNamespace) -> None:
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert swapped.plan.after.image_size == 56, "the host's 4x4 patches"
    vision = swapped.model.vision_model
    hidden = vision.tower(pixels, output_hidden_states=True).hidden_states
    found = vision(pixels).last_hidden_state
    assert found.shape == (2, 17, 32)
    torch.testing.assert_close(found, vision.ln_vision(hidden[-2]))
    assert (found - vision.ln_vision(hidden[-1])).abs().max() > 1e-3


def trained_qformer(path: Path, width: int, layers: tuple[int, ...] = (0, 2)) -> dict[str, torch.Tensor]:
    """A stage-1 Q-Former as LAVIS saves it."""
    torch.manual_seed(8)
    state = {f"ln_vision.{kind}": torch.randn(width) for kind in ("weight", "bias")}
    for layer in layers:
        for module in ("key", "value"):
            name = f"Qformer.bert.encoder.layer.{layer}.crossattention.self.{module}"
            state |= {f"{name}.weight": torch.randn(36, width), f"{name}.bias": torch.randn(36)}
    state |= {"itm_head.weight": torch.randn(2, 36), "temp": torch.randn(1)}
    torch.save({"model": state}, path)
    return state


def test_connectors_can_come_from_a_qformer_trained_on_clip(stock: Path, eyes: Path, tmp_path: Path) -> None:
    state = trained_qformer(tmp_path / "blip2_pretrained_vitL.pth", 32)
    plan = swap(stock, eyes, tmp_path / "out", {"qformer": tmp_path / "blip2_pretrained_vitL.pth"})
    assert set(plan.connectors.values()) == {Taken(source="blip2_pretrained_vitL.pth", width=32)}
    assert len(plan.connectors) == 5
    model, _ = load_mllm(tmp_path / "out", dtype=torch.float32)
    found = model.get_submodule("qformer.encoder.layer.2.crossattention.attention.value")
    name = "Qformer.bert.encoder.layer.2.crossattention.self.value"
    assert torch.equal(found.weight, state[f"{name}.weight"])
    assert torch.equal(found.bias, state[f"{name}.bias"])
    norm = model.get_submodule("vision_model.ln_vision")
    assert torch.equal(norm.weight, state["ln_vision.weight"])
    assert norm.eps == 1e-5, "that of LAVIS"


@pytest.mark.parametrize(
    ("width", "layers", "complaint"),
    [
        (40, (0, 2), "has shape .*40.*: take a Q-Former trained on a tower of width 32"),
        (32, (0,), "has no Qformer.bert.encoder.layer.2.crossattention.self.key"),
    ],
)
def test_a_qformer_that_does_not_fit_is_refused(
    width: int, layers: tuple[int, ...], complaint: str, stock: Path, eyes: Path, tmp_path: Path
) -> None:
    trained_qformer(tmp_path / "other.pth", width, layers)
    with pytest.raises(InvalidArgumentError, match=complaint):
        swap(stock, eyes, parts={"qformer": tmp_path / "other.pth"})


@torch.no_grad()
def test_with_t5_it_answers_about_the_image(eyes: Path, tmp_path: Path) -> None:
    swap(tiny_instructblip(tmp_path / "t5", "t5"), eyes, tmp_path / "out")
    model, processor = load_mllm(tmp_path / "out", dtype=torch.float32)
    batch = processor(images=Image.new("RGB", (40, 30), (200, 80, 40)), text=QUESTION, return_tensors="pt")
    assert batch["input_ids"][0, -1] == 2, "T5's texts end with </s>"
    assert model.generate(**batch, do_sample=False, min_new_tokens=3, max_new_tokens=3).shape == (1, 4)
    answer = {"decoder_input_ids": torch.tensor([[0, 40]])}
    seen = model(**batch, **answer).logits
    blank = model(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}, **answer).logits
    assert (seen - blank).abs().max() > 1e-3
    stage = apply_stage(model)
    assert not [name for name in stage.names if "language_model" in name or ".tower." in name]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            {"model_type": "blip-2"},
            "this is BLIP-2, whose Q-Former does not read the instruction: take an InstructBLIP",
        ),
        ({"model_type": "instructblipvideo"}, "this is InstructBLIP-Video.*take an InstructBLIP"),
    ],
)
def test_close_relatives_are_refused_by_name(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=complaint):
        detect(config, "config.json")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"text_config": {"model_type": "opt"}}, "its language model is 'opt': supported are llama and t5"),
        ({"image_token_index": 4000}, "image_token_index is 4000, but the vocabulary has only"),
        ({"qformer_config": None}, "qformer_config is None"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_variants_that_are_not_supported_are_refused(
    changes: dict[str, Any], complaint: str, stock: Path, eyes: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "variant"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=complaint):
        swap(folder, eyes)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("language_projection.weight", "language_projection.weight is not in the weights"),
        ("qformer.encoder.layer.1.output.dense.weight", "1 missing tensors"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    name: str, complaint: str, stock: Path, eyes: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "damaged"))
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=complaint):
        swap(folder, eyes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_would_do_nothing_are_refused(stock: Path, eyes: Path, swapped: SimpleNamespace) -> None:
    for part in ("language-model", "vision-tower", "config"):
        with pytest.raises(InvalidArgumentError, match=rf"`parts\['{part}'\]` is for LAVIS' files"):
            swap(stock, eyes, parts={part: stock})
    checkpoint, family, _ = open_checkpoint(stock, {"qformer": stock})
    with pytest.raises(InvalidArgumentError, match=r"`parts\['qformer'\]` goes with a new tower"):
        family.plan(checkpoint)
    checkpoint, family, _ = open_checkpoint(swapped.out)
    with pytest.raises(UnsupportedCheckpointError, match="nothing to convert"):
        family.plan(checkpoint)


def test_a_folder_without_the_qformers_tokenizer_says_so(stock: Path, eyes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "incomplete"))
    shutil.move(folder / "qformer_tokenizer", tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match=r"`parts\['qformer-tokenizer'\]=PATH`"):
        swap(folder, eyes)
    swap(folder, eyes, tmp_path / "out", {"qformer-tokenizer": tmp_path / "elsewhere"})
    assert load_mllm(tmp_path / "out")[1] is not None
