"""Qwen-VL of 2023: what the contract test does not ask."""

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from eval_mcq.schema import MCQItem
from eval_mcq.score import LetterScorer
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import UserError
from mllm_adapters import load_mllm
from mllm_adapters.apply import apply_plan
from mllm_adapters.cli.swap import main as swap
from mllm_adapters.contract import Plan
from mllm_adapters.conversations import Conversation, Corpus
from mllm_adapters.examples import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.families.qwen_vl import QWEN_VL
from mllm_adapters.modeling.qwen_vl import SequenceTooLong
from mllm_adapters.registry import open_checkpoint
from tests import builders
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.families.qwen_vl import (
    CHAT_CONFIG,
    inputs,
    logits,
    published_tensors,
    tiny_config,
    write_ranks,
    write_tiny,
)
from tests.mllm_adapters.retraining import turns

TOLERANCE = 1e-4
PROMPTS = Path(__file__).parent / "prompts"


@pytest.fixture(scope="module")
def qwen(golden: Path) -> Golden:
    if not (golden / "qwen_vl").is_dir():
        pytest.skip(f"{golden} has no qwen_vl")
    return Golden(golden / "qwen_vl")


@pytest.fixture(scope="module")
def model(qwen: Golden) -> Any:
    return load_mllm(qwen.folder, dtype=torch.float32)[0]


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()  # it may be read-only
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def clip_tower(folder: Path, **changes: Any) -> Path:
    """An untrained CLIP tower in a folder of its own, as transformers saves it."""
    torch.manual_seed(1)
    CLIPVisionModel(builders.tower_config(**changes)).save_pretrained(folder)
    return folder


def plan_for(source: Path, tower: Path | None = None, image_size: int | None = None) -> Plan:
    checkpoint, family, _ = open_checkpoint(source)
    return family.plan(checkpoint, inspect_tower(tower) if tower else None, image_size)


def written(source: Path, out: Path, tower: Path | None = None, image_size: int | None = None) -> Path:
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(tower) if tower else None, image_size)
    return apply_plan(plan, family, checkpoint, out)


# --- the language model, and where it ends -----------------------------------------------------------------


@torch.no_grad()
def test_text_within_the_context_is_exact(qwen: Golden, model: Any) -> None:
    found = model(input_ids=qwen.expected["longtext.input_ids"]).logits
    torch.testing.assert_close(found, qwen.expected["text.logits"], atol=TOLERANCE, rtol=0)
    stretched = qwen.expected["longtext.logits_seq_length_16"]
    assert (found - stretched).abs().max() > 10 * TOLERANCE, "negative control: beyond it the original differs"


def test_text_beyond_the_context_is_refused_in_one_line(qwen: Golden, tmp_path: Path) -> None:
    short, _ = load_mllm(edited(qwen.folder / "checkpoint", tmp_path / "short", seq_length=16))
    ids = qwen.expected["longtext.input_ids"]
    assert short(input_ids=ids[:, :16]).logits.shape[1] == 16
    with pytest.raises(SequenceTooLong, match=f"has {ids.shape[1]} tokens.*context is 16 tokens") as caught:
        short(input_ids=ids)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, UserError)
    with pytest.raises(SequenceTooLong, match="has 17 tokens"):
        short.generate(ids[:, :10], do_sample=False, max_new_tokens=9, min_new_tokens=9)


def test_a_model_that_never_stretches_keeps_its_whole_context(tmp_path: Path) -> None:
    config = {**tiny_config(), "use_dynamic_ntk": False, "use_logn_attn": False}
    plan = plan_for(write_tiny(tmp_path / "plain", config))
    assert plan.config["text_config"]["max_position_embeddings"] == 8192


def test_it_generates_what_the_original_generated(qwen: Golden, model: Any) -> None:
    given, expected = inputs(model, qwen, "seq0"), qwen.expected["seq0.greedy"]
    new = model.generate(**given, do_sample=False, max_new_tokens=expected.shape[1], eos_token_id=None)
    assert torch.equal(new[:, given["input_ids"].shape[1] :], expected)


@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(qwen: Golden, model: Any) -> None:
    given = inputs(model, qwen, "seq0")
    ids = torch.nn.functional.pad(given["input_ids"], (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(given["input_ids"]), (5, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=given["pixel_values"]
    )
    found, expected = logits(padded.logits[:, 5:], qwen, "seq0")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# --- mix-ups that only the numbers show --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        (r"mlp.up_proj", {"sources": ("w1", "w2")}),
        (r"vision_tower.layers.\d+.attn.[qkv]_proj", {"groups": 1}),
    ],
)
@torch.no_grad()
def test_a_mix_up_of_the_original_tensors_would_be_noticed(
    qwen: Golden, tmp_path: Path, pattern: str, change: dict[str, Any]
) -> None:
    """Negative control: gate for up projection, and queries, keys, values in thirds instead of per head."""
    checkpoint, family, _ = open_checkpoint(qwen.folder)
    plan = family.plan(checkpoint)
    steps = []
    for step in plan.steps:
        if regex.match(pattern, step.name) and "groups" in change:
            step = step.model_copy(update={"arguments": {**step.arguments, **change}})
        elif regex.match(r".*" + pattern, step.name) and "sources" in change:
            step = step.model_copy(update={"sources": (step.sources[0].replace(*change["sources"]),)})
        steps.append(step)
    wrong = apply_plan(plan.model_copy(update={"steps": tuple(steps)}), family, checkpoint, tmp_path / "wrong")
    mixed, _ = load_mllm(wrong, dtype=torch.float32)
    found, expected = logits(mixed(**inputs(mixed, qwen, "seq0")).logits, qwen, "seq0")
    assert (found - expected).abs().max() > 10 * TOLERANCE


def test_placeholders_and_images_must_match(qwen: Golden, model: Any) -> None:
    given = inputs(model, qwen, "seq1")
    with pytest.raises(ValueError, match="placeholders for 1 images"):
        model(input_ids=given["input_ids"], pixel_values=given["pixel_values"][:1])
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 8), pixel_values=given["pixel_values"])


# --- other draws of the same form ----------------------------------------------------------------------------


@torch.no_grad()
def test_one_safetensors_file_gives_what_bin_shards_give(qwen: Golden, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    state: dict[str, torch.Tensor] = {}
    for shard in (qwen.folder / "checkpoint").glob("*.bin"):
        state |= torch.load(shard, weights_only=True)
    if not state:
        pytest.skip("this golden checkpoint is in safetensors already")
    state["transformer.rotary_emb.inv_freq"] = torch.ones(4)  # some tools save it
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    shutil.copy(qwen.folder / "checkpoint" / "config.json", folder)
    other, _ = load_mllm(folder)
    given = inputs(model, qwen, "seq0")
    assert torch.equal(other(**given).logits, model(**given).logits)
    assert [dropped.name for dropped in plan_for(folder).dropped] == ["transformer.rotary_emb.inv_freq"]


@pytest.mark.parametrize(
    ("width", "tower_width", "fate"),
    [(32, 64, "re-initialised"), (32, 32, "kept"), (128, 32, "added"), (128, 128, "none"), (64, 128, "re-init")],
)
def test_the_reader_follows_the_widths(tmp_path: Path, width: int, tower_width: int, fate: str) -> None:
    """The original has no kv_proj where its tower is as wide as its language model."""
    source = write_tiny(tmp_path / "original", tiny_config(width=width))
    assert ("kv_proj" in str(load_mllm(source)[0].state_dict().keys())) == (width != 128)
    tower = clip_tower(tmp_path / "tower", hidden_size=tower_width)
    first = written(source, tmp_path / "first", tower)
    readers = plan_for(source, tower).readers
    assert readers["attn_pool.kv_proj"].startswith(fate)
    swapped, _ = load_mllm(first)
    ids = torch.tensor([[1, 477, *[479] * 16, 478, 2]])
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.isfinite(swapped(input_ids=ids, pixel_values=pixels).logits).all()
    # and once more, with a tower of another width
    other = clip_tower(tmp_path / "other", hidden_size=48)
    again, _ = load_mllm(written(first, tmp_path / "again", other))
    assert again.attn_pool.kv_proj.weight.shape == (128, 48)


@torch.no_grad()
def test_a_swapped_model_is_the_same_after_saving(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "original", tiny_config())
    swapped, _ = load_mllm(written(source, tmp_path / "swapped", clip_tower(tmp_path / "tower")))
    swapped.save_pretrained(tmp_path / "saved")
    saved, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    given = {"input_ids": torch.tensor([[477, *[479] * 16, 478]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    assert torch.equal(saved(**given).logits, swapped(**given).logits)
    third, _ = load_mllm(written(tmp_path / "saved", tmp_path / "again", clip_tower(tmp_path / "tower2")))
    assert torch.isfinite(third(**given).logits).all()


@torch.no_grad()
def test_our_layout_of_the_original_tower_takes_a_new_tower_too(tmp_path: Path) -> None:
    source, tower = write_tiny(tmp_path / "original", tiny_config()), clip_tower(tmp_path / "tower")
    converted = written(source, tmp_path / "converted")
    direct, _ = load_mllm(written(source, tmp_path / "direct", tower))
    detour, _ = load_mllm(written(converted, tmp_path / "detour", tower))
    assert detour.state_dict().keys() == direct.state_dict().keys()
    for name, value in direct.state_dict().items():
        assert torch.equal(detour.state_dict()[name], value), name
    assert detour.config.to_dict() | {"_name_or_path": ""} == direct.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_tiny(tmp_path / "original", tiny_config(), dtype)
    half, _ = load_mllm(written(source, tmp_path / "swapped", clip_tower(tmp_path / "tower")))
    assert {value.dtype for value in half.state_dict().values()} == {dtype}
    given = {"input_ids": torch.tensor([[477, *[479] * 16, 478]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    assert half(**given).logits.dtype == dtype


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "original", {**tiny_config(), "tie_word_embeddings": True})
    state = load_file(source / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, source / "model.safetensors")
    tied, _ = load_mllm(written(source, tmp_path / "converted"))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert torch.equal(tied.get_input_embeddings().weight, state["transformer.wte.weight"])


# --- tokens per image and preprocessing ------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 28, 56, 84])
def test_the_number_of_tokens_is_that_of_the_queries_whatever_the_image_size(
    tmp_path: Path, image_size: int | None
) -> None:
    config = tiny_config()
    source = write_tiny(tmp_path / "original", config)
    write_ranks(source, config)
    out = written(source, tmp_path / "swapped", clip_tower(tmp_path / "tower"), image_size)
    swapped, processor = load_mllm(out)
    batch = processor(text=["a <imgpad> b"], images=[Image.new("RGB", (50, 30))], return_tensors="pt")
    assert batch["pixel_values"].shape[-1] == (image_size or 28)
    assert (batch["input_ids"] == 479).sum() == 16 == swapped.config.image_seq_length
    assert torch.isfinite(swapped(**batch).logits).all()


def test_pictures_are_prepared_as_the_original_prepares_them(qwen: Golden) -> None:
    processor = QWEN_VL.image_processor(plan_for(qwen.folder))
    pictures = [Image.open(qwen.folder / name) for name in qwen.about["images"]]
    found = processor(pictures, return_tensors="pt")["pixel_values"]
    # The original rounds resized pictures to 8 bits: one step is 1/255 over a standard deviation of 0.26.
    torch.testing.assert_close(found, qwen.expected["pixel_values"], atol=1.01 / 255 / 0.26, rtol=0)


# --- the tokenizer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-VL-Chat in the original layout, with its tokenizer."""
    config = tiny_config()
    folder = write_tiny(tmp_path_factory.mktemp("qwen") / "chat", config)
    write_ranks(folder, config)
    published = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "top_k": 0, "top_p": 0.3,
                 "do_sample": True, "max_new_tokens": 512}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(published))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["x.QWenTokenizer", None]}})
    )
    return folder


@pytest.fixture(scope="module")
def swapped_chat(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a CLIP tower."""
    folder = tmp_path_factory.mktemp("swapped")
    return written(chat, folder / "chat-clip", clip_tower(folder / "tower"))


def by_rank(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Encode as tiktoken does: whole pieces first, else join the neighbours of lowest rank, leftmost first."""
    ids: list[int] = []
    for piece in regex.findall(PRETOKENIZE_REGEX, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while True:
            unions = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not unions:
                break
            _, at = min(unions)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids
