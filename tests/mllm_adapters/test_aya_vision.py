"""What is special about Aya Vision: its processor, and a published checkpoint's plan."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AyaVisionProcessor, GotOcr2ImageProcessor

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import BadDataError
from mllm_adapters import load_mllm
from mllm_adapters.core.fates import Reinitialized
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.swap.apply import apply_plan
from tests import builders
from tests.mllm_adapters.families import aya_vision
from tests.mllm_adapters.families.full_size import check_full_size, published_tower

SPECIALS = [
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "TILE",
    "TILE_GLOBAL",
]

PUBLISHED = {
    "model_type": "aya_vision",
    "architectures": ["AyaVisionForConditionalGeneration"],
    "image_token_index": 255036,
    "downsample_factor": 2,
    "alignment_intermediate_size": 28672,
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
        "image_size": 364, "num_hidden_layers": 27, "num_attention_heads": 16, "vision_use_head": False,
    },
    "text_config": {
        "model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}  # fmt: skip
"""CohereLabs/aya-vision-8b, as its class defaults and model card have it."""


def published_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, written down from the layout."""
    vision, text = PUBLISHED["vision_config"], PUBLISHED["text_config"]
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    def norm(name: str, size: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (size,)
        if bias:
            found[f"{name}.bias"] = (size,)

    tower = "vision_tower.vision_model."
    found[f"{tower}embeddings.patch_embedding.weight"] = (width, 3, 14, 14)
    found[f"{tower}embeddings.patch_embedding.bias"] = (width,)
    found[f"{tower}embeddings.position_embedding.weight"] = (26 * 26, width)
    norm(f"{tower}post_layernorm", width)
    for layer in range(vision["num_hidden_layers"]):
        block = f"{tower}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{block}self_attn.{name}", width, width)
        norm(f"{block}layer_norm1", width)
        norm(f"{block}layer_norm2", width)
        linear(f"{block}mlp.fc1", mlp, width)
        linear(f"{block}mlp.fc2", width, mlp)
    middle, hidden = PUBLISHED["alignment_intermediate_size"], text["hidden_size"]
    norm("multi_modal_projector.layernorm", 4 * width)
    linear("multi_modal_projector.linear_1", middle, 4 * width)
    linear("multi_modal_projector.linear_2", hidden, middle // 2)
    found["language_model.model.embed_tokens.weight"] = (text["vocab_size"], hidden)
    found["language_model.model.norm.weight"] = (hidden,)
    for layer in range(text["num_hidden_layers"]):
        block = f"language_model.model.layers.{layer}."
        found[f"{block}input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", 4096), ("k", 1024), ("v", 1024)):
            linear(f"{block}self_attn.{name}_proj", rows, hidden, bias=False)
        linear(f"{block}self_attn.o_proj", hidden, 4096, bias=False)
        for name in ("gate", "up"):
            linear(f"{block}mlp.{name}_proj", text["intermediate_size"], hidden, bias=False)
        linear(f"{block}mlp.down_proj", hidden, text["intermediate_size"], bias=False)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Aya Vision with a complete processor."""
    folder = aya_vision.build(tmp_path / "aya").folder / "checkpoint"
    tokenizer = builders.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIALS, "<image>"]})
    images = GotOcr2ImageProcessor(
        size={"height": 84, "width": 84}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    AyaVisionProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, downsample_factor=2, img_size=84,
        chat_template=builders.CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_processor_writes_as_many_placeholders_as_the_new_tower_gives_tokens(
    source: Path, golden: Path, tmp_path: Path
) -> None:
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(next((golden / "mgll_official").glob("*.pth"))))
    assert (plan.before.tokens, plan.after.tokens, plan.after.tiles) == (9, 9, 12)
    assert plan.before.mean == plan.after.mean == (0.5, 0.5, 0.5)
    out = apply_plan(plan, family, checkpoint, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out)
    picture = builders.picture(tmp_path, "a.png", size=90)
    corpus = Corpus(
        tmp_path / "train.json", tmp_path,
        [Conversation.model_validate({"image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhich disease?"}, {"from": "gpt", "value": "A"},
        ]})],
        {"a.png": (90, 90)},
    )  # fmt: skip
    assert picture.is_file()
    examples, _ = prepare_examples(corpus, processor, 500, False)
    batch = AnswerCollator(0)([encode(examples[0], tmp_path, processor)])
    patches = (batch["input_ids"] == processor.image_token_id).sum()
    assert patches == plan.after.tokens * len(batch["pixel_values"])
    assert batch["pixel_values"].shape[-1] == plan.after.image_size
    side = (
        checkpoint.folder
    )  # its vocabulary is smaller than this tokenizer's: the ids of the batch are looked at only
    assert load_file(side / "model.safetensors")


@pytest.mark.parametrize(("size", "side", "tokens"), [(None, 364, 169), (224, 224, 64), (336, 336, 144)])
def test_a_published_checkpoint_of_full_size(
    tmp_path: Path, size: int | None, side: int, tokens: int
) -> None:
    folder = builders.sparse_checkpoint(tmp_path / "aya-vision-8b", PUBLISHED, published_tensors())
    checkpoint, family, layout = open_checkpoint(folder)
    assert (family.spec.name, layout) == ("aya-vision", "transformers")
    plan = family.plan(checkpoint, inspect_tower(published_tower(tmp_path / "mgll")), size)
    assert (plan.before.tokens, plan.after.image_size, plan.after.tokens) == (169, side, tokens)
    language_model = sum(
        torch.Size(shape).numel()
        for name, shape in published_tensors().items()
        if name.startswith("language_model.")
    )
    projector = 2 * 4096 + 28672 * (4096 + 1) + 4096 * (14336 + 1)
    tower = 303_179_776 + ((side // 14) ** 2 - 256) * 1024
    check_full_size(plan, checkpoint, weights=language_model + projector + tower)
    assert set(plan.connectors.values()) == {Reinitialized(before=1152, after=1024)}


def test_a_file_without_its_tower_is_refused(source: Path, golden: Path) -> None:
    from safetensors.torch import save_file

    weights = source / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(weights).items() if "vision_tower" not in k}, weights, {"format": "pt"}
    )
    checkpoint, family, _ = open_checkpoint(source)
    with pytest.raises(BadDataError, match="has no tensor of vision_tower: is it complete"):
        family.plan(checkpoint, inspect_tower(next((golden / "mgll_official").glob("*.pth"))))


def test_a_prompt_looks_like_this(source: Path) -> None:
    model, processor = load_mllm(source)
    assert type(model).__name__ == "AyaVisionForConditionalGeneration"
    content = [{"type": "image"}, {"type": "text", "text": "Which disease?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhich disease? ASSISTANT:", "the template is the source's own"
