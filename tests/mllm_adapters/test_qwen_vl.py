"""Qwen-VL of 2023: what the contract test does not ask."""

import json
import math
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import mllm_adapters.auto  # noqa: F401
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, UserError
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main as swap
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.fates import Added, ConnectorFate, Kept, Reinitialized, Unneeded
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.families.qwen_vl import QWEN_VL
from mllm_adapters.families.qwen_vl.modeling import SequenceTooLong
from mllm_adapters.swap.apply import apply_plan
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
    assert (found - stretched).abs().max() > 10 * TOLERANCE, (
        "negative control: beyond it the original differs"
    )


def test_text_beyond_the_context_is_refused_in_one_line(qwen: Golden, tmp_path: Path) -> None:
    short, _ = load_mllm(edited(open_checkpoint(qwen.folder)[0].folder, tmp_path / "short", seq_length=16))
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
    wrong = apply_plan(
        plan.model_copy(update={"steps": tuple(steps)}), family, checkpoint, tmp_path / "wrong"
    )
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
    source = open_checkpoint(qwen.folder)[0].folder
    for shard in source.glob("*.bin"):
        state |= torch.load(shard, weights_only=True)
    if not state:
        pytest.skip("this golden checkpoint is in safetensors already")
    state["transformer.rotary_emb.inv_freq"] = torch.ones(4)  # some tools save it
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    shutil.copy(source / "config.json", folder)
    other, _ = load_mllm(folder)
    given = inputs(model, qwen, "seq0")
    assert torch.equal(other(**given).logits, model(**given).logits)
    assert [dropped.name for dropped in plan_for(folder).dropped] == ["transformer.rotary_emb.inv_freq"]


@pytest.mark.parametrize(
    ("width", "tower_width", "fate"),
    [
        (32, 64, Reinitialized(before=32, after=64)),
        (32, 32, Kept(width=32)),
        (128, 32, Added(before=128, after=32)),
        (128, 128, Unneeded(width=128)),
        (64, 128, Reinitialized(before=64, after=128)),
    ],
)
def test_the_connector_follows_the_widths(
    tmp_path: Path, width: int, tower_width: int, fate: ConnectorFate
) -> None:
    """The original has no kv_proj where its tower is as wide as its language model."""
    source = write_tiny(tmp_path / "original", tiny_config(width=width))
    assert ("kv_proj" in str(load_mllm(source)[0].state_dict().keys())) == (width != 128)
    tower = clip_tower(tmp_path / "tower", hidden_size=tower_width)
    first = written(source, tmp_path / "first", tower)
    connectors = plan_for(source, tower).connectors
    assert connectors["attn_pool.kv_proj"] == fate
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


def seen_by_hand(
    state: dict[str, torch.Tensor], config: dict[str, Any], pixels: torch.Tensor
) -> torch.Tensor:
    """Visual tokens by the original's formulas (visual.py), straight from the tensors of its file."""
    visual, tensors = (
        config["visual"],
        {name.partition(".visual.")[2]: value for name, value in state.items()},
    )

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6)

    def positions(name: str, count: int) -> torch.Tensor:
        table = tensors[name]
        square = table.T.unflatten(1, (math.isqrt(len(table)), -1))[None]
        fitted = F.interpolate(square, [math.isqrt(count)] * 2, mode="bicubic", align_corners=False)
        return table if count == len(table) else fitted[0].flatten(1).T

    patches = (
        F.conv2d(pixels, tensors["conv1.weight"], stride=visual["patch_size"]).flatten(2).transpose(1, 2)
    )
    x = norm(patches + positions("positional_embedding", patches.shape[1]), "ln_pre")
    for i in range(visual["layers"]):
        block = f"transformer.resblocks.{i}"
        mixed = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj").unflatten(-1, (visual["heads"], -1))
        q, k, v = mixed.transpose(1, 2).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")

    width = visual["output_dim"]
    attention = torch.nn.MultiheadAttention(width, width // 128)
    attention.load_state_dict(
        {n.removeprefix("attn_pool.attn."): t for n, t in tensors.items() if n.startswith("attn_pool.attn.")}
    )
    value = x if visual["width"] == width else linear(x, "attn_pool.kv_proj")
    value = norm(value, "attn_pool.ln_kv").transpose(0, 1)
    query = norm(tensors["attn_pool.query"], "attn_pool.ln_q") + tensors["attn_pool.pos_embed"]
    key = value + positions("attn_pool.pos_embed", len(value))[:, None]
    pooled, _ = attention(query[:, None].expand(-1, len(pixels), -1), key, value)
    return norm(pooled.transpose(0, 1), "ln_post") @ tensors["proj"]


@pytest.mark.parametrize(
    "visual",
    [
        {"image_size": 56, "n_queries": 64, "width": 48, "heads": 3},
        {"image_size": 42, "n_queries": 9, "width": 256, "heads": 4, "patch_size": 7},
    ],
    ids=["with-kv_proj", "without-kv_proj"],
)
@torch.no_grad()
def test_other_grids_heads_and_query_counts_give_what_the_formulas_give(
    tmp_path: Path, visual: dict[str, Any]
) -> None:
    config = {**tiny_config(output_dim=256, **visual), "hidden_size": 256, "kv_channels": 64}
    source = write_tiny(tmp_path / "original", config)
    pixels = torch.randn(2, 3, visual["image_size"], visual["image_size"])
    expected = seen_by_hand(load_file(source / "model.safetensors"), config, pixels)
    model, _ = load_mllm(source)
    found = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert found.shape == (2, visual["n_queries"], 256)


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
        json.dumps(
            {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["x.QWenTokenizer", None]}}
        )
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
            unions = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not unions:
                break
            _, at = min(unions)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


TEXTS = (
    "Which disease does this image show?\nA. Glaucoma\nB. Myopia",
    "Der Sehnerv ist blaß; u\u0308ber 12345 µm — 黄斑 ✓\r\n\r\n  end  ",
    "it's the macula's diabetic glaucoma glaucoma ",
)


def test_text_is_cut_as_the_published_rank_file_cuts_it(chat: Path) -> None:
    _, processor = load_mllm(chat)
    ranks = write_ranks(chat, tiny_config())
    for text in TEXTS:
        found = processor.tokenizer(text).input_ids
        assert found == by_rank(text, ranks)
        assert processor.tokenizer.decode(found) == unicodedata.normalize("NFC", text)
    ids = processor.tokenizer(TEXTS[0]).input_ids
    assert len(ids) < len(TEXTS[0]), "some pieces are joined"


def test_special_tokens_have_the_published_ids() -> None:
    """The published file has 151643 ranks; the ids are those of tokenization_qwen.py."""
    from mllm_adapters.families.qwen_vl.tokenization import special_tokens

    names = special_tokens(151643, 151859, Path("qwen.tiktoken"))
    ids = {name: 151643 + i for i, name in enumerate(names)}
    assert {name: ids[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_204|>")} == {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850,
    }  # fmt: skip
    assert [ids[name] for name in ("<ref>", "<img>", "</img>", "<imgpad>")] == [
        151851,
        151857,
        151858,
        151859,
    ]


def test_the_reloaded_processor_is_the_same(chat: Path, swapped_chat: Path) -> None:
    _, made = load_mllm(chat)
    saved = AutoProcessor.from_pretrained(swapped_chat)
    assert type(saved) is type(made)
    for text in (*TEXTS, "<|im_start|>user\nPicture 1: <img><imgpad></img>\nx<|im_end|><|extra_7|>"):
        assert saved.tokenizer(text).input_ids == made.tokenizer(text).input_ids
    assert saved.chat_template == made.chat_template
    assert (saved.image_token, saved.image_token_id, saved.image_seq_length) == ("<imgpad>", 479, 16)
    assert saved.tokenizer.convert_tokens_to_ids(["<img>", "</img>"]) == [477, 478]
    assert saved.tokenizer.model_max_length == 2048


def test_generation_stops_at_the_end_of_a_turn(chat: Path, swapped_chat: Path) -> None:
    """The published file stops at <|endoftext|> only: its chat code looks for <|im_end|> by itself."""
    specials = [480 - 9 - 205 - 3 + i for i in (0, 2)]
    for folder in (chat, swapped_chat):
        model, processor = load_mllm(folder)
        assert model.generation_config.eos_token_id == specials
        assert processor.tokenizer.convert_ids_to_tokens(specials) == ["<|endoftext|>", "<|im_end|>"]
    settings = json.loads((swapped_chat / "generation_config.json").read_text())
    assert settings["top_p"] == 0.3, "the rest is the source's"


def test_a_conversation_is_written_as_the_original_writes_it(swapped_chat: Path) -> None:
    """Pictures are counted per message, and what stands first is written first."""
    processor = AutoProcessor.from_pretrained(swapped_chat)
    image, text = {"type": "image"}, {"type": "text", "text": "Left or right?"}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "Left."}]},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, image]},
    ]
    picture = "Picture {}: <img><imgpad></img>\n"
    assert processor.apply_chat_template(talk) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{picture.format(1)}{picture.format(2)}Left or right?<|im_end|>\n"
        "<|im_start|>assistant\nLeft.<|im_end|>\n"
        f"<|im_start|>user\nAnd here?{picture.format(1)}<|im_end|>\n"
    )


# --- it trains and answers ---------------------------------------------------------------------------------------


def test_a_training_batch_has_a_finite_loss(swapped_chat: Path, tmp_path: Path) -> None:
    model, processor = load_mllm(swapped_chat)
    builders.picture(tmp_path, "a.png", size=60)
    rows = [
        {"id": i, "image": "a.png", "conversations": turns("<image>\nIs the disc pale?", *talk)}
        for i, talk in enumerate((["No: it is pink."], ["Yes.", "Sure?", "Quite ✓"]))
    ]
    conversations = [Conversation.model_validate(row) for row in rows]
    corpus = Corpus(tmp_path / "train.json", tmp_path, conversations, {"a.png": (60, 60)})
    examples, counts = prepare_examples(corpus, processor, 2048, text_only=False)
    assert counts.kept == 2
    encoded = [encode(example, tmp_path, processor) for example in examples]
    labels = [processor.tokenizer.decode(row["labels"][row["labels"] != IGNORED]) for row in encoded]
    assert labels == ["No: it is pink.<|im_end|>", "Yes.<|im_end|>Quite ✓<|im_end|>"]
    batch = AnswerCollator(processor.tokenizer.pad_token_id)(encoded)
    loss = model(**batch).loss
    whole = {k: v for k, v in batch.items() if k not in ("logits_to_keep", "shift_labels")}
    torch.testing.assert_close(loss, model(**whole).loss)
    assert torch.isfinite(loss)
    loss.backward()
    assert model.attn_pool.kv_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_real_photograph_and_its_question_go_through_together(
    photographs: Path, swapped_chat: Path
) -> None:
    model, processor = load_mllm(swapped_chat)
    photograph = min(photographs.rglob("*.jpg"))
    prompt = (PROMPTS / "qwen_vl.txt").read_text()
    batch = processor(text=[prompt], images=[Image.open(photograph).convert("RGB")], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16
    new = model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert new.shape[1] == batch["input_ids"].shape[1] + 4


# --- full size ---------------------------------------------------------------------------------------------------

LANGUAGE_MODEL = 2 * 151936 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 4096
RESAMPLER = 2 * 256 * 4096 + 4 * 4096**2 + 4 * 4096 + 6 * 4096 + 4096**2  # without kv_proj
OLD_TOWER = (
    1664 * 588 + 256 * 1664 + 2 * 1664 + 48 * (4 * 1664**2 + 4 * 1664 + 2 * 1664 * 8192 + 8192 + 5 * 1664)
)
NEW_TOWER = (
    1024 * 588 + 1025 * 1024 + 1024 + 24 * (4 * 1024**2 + 4 * 1024 + 2 * 1024 * 4096 + 4096 + 5 * 1024)
)
NEW_TOWER += 4 * 1024  # the normalizations before and after the blocks


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten .bin files, cut wherever 2 GB are full, which is within a layer."""
    folder = tmp_path_factory.mktemp("full") / "Qwen-VL-Chat"
    weight_map, size = {}, 0
    for name, shape in published_tensors(CHAT_CONFIG).items():
        size += 2 * torch.Size(shape).numel()
        weight_map[name] = f"pytorch_model-{1 + size // 2**31:05d}-of-00010.bin"
    tensors = {name: ("BF16", shape) for name, shape in published_tensors(CHAT_CONFIG).items()}
    return builders.sparse_shards(folder, CHAT_CONFIG, tensors, weight_map)


def test_the_published_checkpoint_is_covered_to_the_last_tensor(published: Path) -> None:
    checkpoint, family, layout = open_checkpoint(published)
    assert (family, layout) == (QWEN_VL, "original")
    assert len(checkpoint.tensors) == 853, "as in its index file"
    weights = LANGUAGE_MODEL + RESAMPLER + 4096 * 1664 + OLD_TOWER
    assert round(2 * weights / 1e9, 1) == 19.3, "GB of bfloat16, as in its index file"
    check_full_size(family.plan(checkpoint), checkpoint, weights=weights)


@pytest.mark.parametrize(("image_size", "grid"), [(224, 16), (336, 24), (None, 32)])
def test_the_published_checkpoint_takes_the_published_tower(
    published: Path, tmp_path: Path, image_size: int | None, grid: int
) -> None:
    checkpoint, family, _ = open_checkpoint(published)
    plan = family.plan(checkpoint, inspect_tower(published_tower(tmp_path / "mgll")), image_size)
    assert (plan.before.grid, plan.before.width, plan.before.tokens) == (32, 1664, 256)
    assert (plan.after.grid, plan.after.width, plan.after.tokens) == (grid, 1024, 256)
    assert plan.image_token_id == 151859
    assert plan.connectors["attn_pool.kv_proj"] == Reinitialized(before=1664, after=1024)
    if image_size is None:
        weights = LANGUAGE_MODEL + RESAMPLER + 4096 * 1024 + NEW_TOWER
        check_full_size(plan, checkpoint, weights=weights)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": None}, "text-only Qwen.*no 'visual' section.*take Qwen/Qwen-VL"),
        ({"visual": None, "audio": {"n_layer": 32}}, "Qwen-Audio.*expected 'visual'.*take Qwen/Qwen-VL"),
        (
            {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
            r"quantization_config says gptq.*unquantized",
        ),
        ({"no_bias": False}, "config.json: no_bias is False"),
        ({"rotary_pct": 0.5}, "config.json: rotary_pct is 0.5"),
        ({"kv_channels": 16}, "kv_channels x num_attention_heads is 64, expected 128"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"visual": {**tiny_config()["visual"], "n_queries": 15}}, "visual.n_queries is 15, expected 9"),
        (
            {"visual": {**tiny_config()["visual"], "output_dim": 256}},
            "visual.output_dim is 256, expected 128",
        ),
        (
            {"visual": {**tiny_config()["visual"], "image_start_id": 479}},
            "only 480 rows: expected at least 482",
        ),
        ({"visual": {"width": 32}}, "section visual: heads is missing"),
    ],
)
def test_a_checkpoint_that_is_close_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = write_tiny(tmp_path / "original", tiny_config())
    config = {name: value for name, value in {**tiny_config(), **changes}.items() if value is not None}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        plan_for(source)
    assert str(source / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("transformer.wte.weight", "has no language model"),
        ("transformer.visual.attn_pool.query", "has no resampler"),
        ("transformer.visual.attn_pool.kv_proj.weight", "kv_proj.weight is missing"),
        ("transformer.visual.transformer.resblocks.1.attn.in_proj.weight", "3 missing tensors"),
        ("transformer.h.1.mlp.w2.weight", "1 missing tensors.*layers.1.mlp.gate_proj"),
        ("lm_head.weight", "1 missing tensors.*lm_head"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, lost: str, message: str) -> None:
    source = write_tiny(tmp_path / "original", tiny_config())
    state = load_file(source / "model.safetensors")
    del state[lost]
    save_file(state, source / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_mllm(source)
    if "resblocks" not in lost:  # a tower that is replaced need not be whole
        with pytest.raises(UserError, match=message):
            written(source, tmp_path / "swapped", clip_tower(tmp_path / "tower"))


def test_an_adapter_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "original", tiny_config())
    state = load_file(source / "model.safetensors")
    state["transformer.h.0.attn.c_attn.lora_A.default.weight"] = torch.zeros(4, 128)
    save_file(state, source / "model.safetensors")
    with pytest.raises(BadDataError, match=r"lora_A.* is not part of a Qwen-VL checkpoint.*merge it"):
        plan_for(source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:250], "byte 250 is not a token"),
        (
            lambda lines: [*lines[:100], b"???? 100", *lines[101:]],
            "line 101 is .* expected a token in base64",
        ),
        (lambda lines: lines[:100] + lines[101:], "line 101 has rank 101"),
        (
            lambda lines: [*lines[:100], lines[7].split()[0] + b" 100", *lines[101:]],
            "line 101 .* earlier line",
        ),
        (lambda lines: lines[:-1], "has 262 tokens, but visual.image_start_id .* expected 263 tokens"),
    ],
)
def test_a_damaged_rank_file_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    source = write_tiny(tmp_path / "original", tiny_config())
    write_ranks(source, tiny_config())
    lines = (source / "qwen.tiktoken").read_bytes().splitlines()
    (source / "qwen.tiktoken").write_bytes(b"\n".join(damage(lines)) + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        plan_for(source)
    assert str(source / "qwen.tiktoken") in str(caught.value)


def test_it_cannot_be_written_as_a_llava(tmp_path: Path) -> None:
    source, tower = write_tiny(tmp_path / "original", tiny_config()), clip_tower(tmp_path / "tower")
    checkpoint, family, _ = open_checkpoint(source)
    with pytest.raises(InvalidArgumentError, match=r"cannot be written as a LLaVA.*resampler"):
        family.plan(checkpoint, inspect_tower(tower), None, "llava")
    said = builders.refused(swap, "--mllm", source, "--encoder", tower, "--layout", "llava")
    assert "resampler" in said
