"""What is special about PaliGemma: a tower that is read at its end, a prompt that is seen in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GemmaTokenizer,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mgll_encoder import inspect_tower, load_tower
from mgll_encoder.common.errors import BadDataError
from mllm_adapters import load_mllm
from mllm_adapters.core.fates import Kept, Reinitialized
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.data.dataset import IGNORED, AnswerCollator, encode_with
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.swap.apply import apply_plan
from tests import builders
from tests.builders import rendered
from tests.mllm_adapters import complete
from tests.mllm_adapters.families import paligemma
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.llava_checkpoints import a_tower

PUBLISHED: dict[str, Any] = {
    "model_type": "paligemma",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "hidden_size": 2048,
    "projection_dim": 2048,
    "image_token_index": 257152,
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
        "num_hidden_layers": 27, "num_attention_heads": 16, "projection_dim": 2048, "vision_use_head": False,
    },
    "text_config": {
        "model_type": "gemma", "vocab_size": 257216, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
    },
}  # fmt: skip
"""google/paligemma-3b-mix-224, as its class defaults and documentation have it."""

PROMPTS = Path(__file__).parent / "prompts"


def published_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, written down from the layout."""
    width, mlp, hidden = 1152, 4304, 2048
    tower = "vision_tower.vision_model."
    found: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (width,),
        f"{tower}embeddings.position_embedding.weight": (256, width),
        "multi_modal_projector.linear.weight": (hidden, width),
        "multi_modal_projector.linear.bias": (hidden,),
        "language_model.model.embed_tokens.weight": (257216, hidden),
        "language_model.model.norm.weight": (hidden,),
    }
    for norm in ("post_layernorm", *(f"encoder.layers.{i}.layer_norm{k}" for i in range(27) for k in (1, 2))):
        found |= {f"{tower}{norm}.weight": (width,), f"{tower}{norm}.bias": (width,)}
    for i in range(27):
        linear = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        for name, shape in {**linear, "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}.items():
            block = f"{tower}encoder.layers.{i}.{name}"
            found |= {f"{block}.weight": shape, f"{block}.bias": shape[:1]}
    for i in range(18):
        block = f"language_model.model.layers.{i}."
        found |= {f"{block}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        found |= {
            f"{block}self_attn.{n}_proj.weight": (r, hidden) for n, r in (("q", 2048), ("k", 256), ("v", 256))
        }
        found |= {
            f"{block}self_attn.o_proj.weight": (hidden, 2048),
            f"{block}mlp.down_proj.weight": (hidden, 16384),
        }
        found |= {f"{block}mlp.{n}_proj.weight": (16384, hidden) for n in ("gate", "up")}
    return found


def published_folder(folder: Path) -> Path:
    """A tiny PaliGemma as Google publishes it: its own processor, no chat template."""
    images = SiglipImageProcessor(size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, builders.byte_tokenizer())
    text = {**paligemma.TEXT, "vocab_size": len(processor.tokenizer)}
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    paligemma.model_of({**paligemma.CONFIG, "text_config": text, "image_token_index": image}).save_pretrained(
        folder
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "paligemma")


@pytest.fixture(scope="module")
def mgll(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete.encoder(tmp_path_factory.mktemp("tower") / "mgll")


@pytest.fixture(scope="module")
def swapped(published: Path, mgll: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, family, _ = open_checkpoint(published)
    plan = family.plan(checkpoint, inspect_tower(mgll))
    return apply_plan(plan, family, checkpoint, tmp_path_factory.mktemp("swap") / "out")


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((70, 50)).convert("RGB")


def asked(processor: Any, question: str) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[text], images=[picture()], return_tensors="pt"))


@torch.no_grad()
def test_a_converted_model_is_asked_as_google_asks_it_and_answers_the_same(
    published: Path, tmp_path: Path
) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(published, dtype=torch.float32).eval()
    theirs = dict(
        PaliGemmaProcessor.from_pretrained(published)(
            text=["<image>Which disease?"], images=[picture()], return_tensors="pt"
        )
    )
    theirs.pop("labels")
    checkpoint, family, layout = open_checkpoint(published)
    assert layout == "published"
    folder = apply_plan(family.plan(checkpoint), family, checkpoint, tmp_path / "base")
    for model, processor in (load_mllm(published), load_mllm(folder)):
        ours = asked(processor, "Which disease?")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        expected = stock(**theirs).logits
        torch.testing.assert_close(model(**ours).logits, expected, atol=0, rtol=0)
    causal = {**ours, "token_type_ids": torch.ones_like(ours["input_ids"])}
    assert (model(**causal).logits - expected).abs().max() > 1e-2, "the prompt is seen in both directions"


def test_gemmas_tokenizer_writes_bos_after_the_image_and_nowhere_else(mgll: Path, tmp_path: Path) -> None:
    host = published_folder(tmp_path / "host")
    for file in host.glob("tokenizer*"):
        file.unlink()
    texts = ["<pad>", "<eos>", "<bos>", "<image>", "<unk>", "\n", "▁", *map(chr, range(33, 127))]
    tokenizer = GemmaTokenizer(vocab={text: i for i, text in enumerate(texts)}, merges=[], add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(host)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id, "as published"
    checkpoint, family, _ = open_checkpoint(host)
    out = apply_plan(family.plan(checkpoint, inspect_tower(mgll)), family, checkpoint, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor.tokenizer) is GemmaTokenizer
    given = asked(processor, "a?")
    assert processor.decode(given["input_ids"][0]) == "<image>" * 17 + "<bos>a?\n"
    assert given["token_type_ids"].shape == given["input_ids"].shape


@torch.no_grad()
def test_the_projector_reads_the_end_of_the_tower_and_its_class_token(swapped: Path, mgll: Path) -> None:
    model, processor = load_mllm(swapped, dtype=torch.float32)
    given = asked(processor, "?")
    read: list[torch.Tensor] = []
    projector = model.model.multi_modal_projector
    projector.linear.register_forward_pre_hook(lambda _, found: read.append(found[0]))
    model(**given)
    hidden = model.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states
    assert len(hidden) == load_tower(mgll).spec.depth + 1
    torch.testing.assert_close(read[0], hidden[-1], atol=0, rtol=0)
    assert read[0].shape[1] == 17 == int((given["input_ids"] == processor.image_token_id).sum())


def test_an_answer_is_learnt_causally_after_a_prompt_that_does_not_see_it(swapped: Path) -> None:
    model, processor = load_mllm(swapped, dtype=torch.float32)
    rows = []
    for answer in ("A", "B drusen"):
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
        said = Conversation.model_validate({"image": "a.png", "conversations": turns})
        rows.append(encode_with(rendered(said, processor), [picture()], processor))
    first, second = rows
    learnt = first["labels"] != IGNORED
    assert processor.decode(first["labels"][learnt]) == "A</s>"
    assert torch.equal(first["token_type_ids"], learnt.long())
    given = asked(processor, "Which?")["input_ids"][0]
    assert torch.equal(first["input_ids"][~learnt], given), (
        "what comes before it is the prompt of an evaluation"
    )
    batch = AnswerCollator(0)([first, second])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    with torch.no_grad():
        found = model(**{name: batch[name] for name in names}).logits
        for row, of_row in zip(rows, found, strict=True):
            alone = {k: row[k][None] for k in ("input_ids", "attention_mask", "token_type_ids")}
            expected = model(**alone, pixel_values=row["pixel_values"]).logits[0]
            torch.testing.assert_close(of_row[: len(expected)], expected, atol=1e-5, rtol=0)
    prompt = len(given)
    torch.testing.assert_close(found[0, : prompt - 1], found[1, : prompt - 1], atol=1e-5, rtol=0)


def test_option_texts_are_scored_as_each_by_itself(swapped: Path) -> None:
    model, processor = load_mllm(swapped, dtype=torch.float32)
    scorer = Scorer(model, processor, mode="options")
    item = MCQItem(
        id="q", images=["x"], question="What?", options=["drusen", "a cataract"], answer=0, category="x"
    )
    (score,) = scorer.score([item], [[picture()]])
    assert score.log_likelihoods is not None
    for text, found in zip(item.options, score.log_likelihoods, strict=True):
        batch = dict(processor(text=[scorer.prompt(item) + text], images=[picture()], return_tensors="pt"))
        length = len(processor.tokenizer(text).input_ids)
        batch["token_type_ids"][:, -length:] = 1
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1].log_softmax(dim=-1)
        each = logits.gather(1, batch["input_ids"][0, 1:, None])[-length:]
        assert found == pytest.approx(float(each.sum()), abs=1e-3)


def test_a_prompt_looks_like_this(swapped: Path) -> None:
    _, processor = load_mllm(swapped)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Glaucoma"}]},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == (PROMPTS / "paligemma.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("size", "side", "tokens"), [(None, 224, 257), (336, 336, 577)])
def test_a_published_checkpoint_of_full_size(
    tmp_path: Path, size: int | None, side: int, tokens: int
) -> None:
    folder = builders.sparse_checkpoint(tmp_path / "paligemma-3b", PUBLISHED, published_tensors())
    checkpoint, family, layout = open_checkpoint(folder)
    assert (family.spec.name, layout) == ("paligemma", "published")
    plan = family.plan(checkpoint, inspect_tower(published_tower(tmp_path / "mgll")), size)
    assert (plan.before.tokens, plan.after.image_size, plan.after.tokens) == (256, side, tokens)
    language_model = sum(
        torch.Size(shape).numel()
        for n, shape in published_tensors().items()
        if n.startswith("language_model.")
    )
    tower = 303_179_776 + ((side // 14) ** 2 - 256) * 1024
    check_full_size(plan, checkpoint, weights=language_model + 2048 * 1025 + tower)
    assert plan.connectors == {"multi_modal_projector.linear": Reinitialized(before=1152, after=1024)}


def test_a_projector_of_the_towers_width_is_kept(published: Path, tmp_path: Path) -> None:
    checkpoint, family, _ = open_checkpoint(published)
    plan = family.plan(checkpoint, inspect_tower(a_tower(tmp_path / "mgll", width=40)))
    assert plan.connectors == {"multi_modal_projector.linear": Kept(width=40)}


def test_a_file_without_its_tower_is_refused(tmp_path: Path, mgll: Path) -> None:
    folder = paligemma.build(tmp_path / "tiny").folder / "checkpoint"
    weights = folder / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(weights).items() if "vision_tower" not in k}, weights, {"format": "pt"}
    )
    checkpoint, family, _ = open_checkpoint(folder)
    with pytest.raises(BadDataError, match="has no tensor of vision_tower: is it complete"):
        family.plan(checkpoint, inspect_tower(mgll))
