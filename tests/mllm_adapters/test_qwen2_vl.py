"""What is special about the modern Qwen line: patches, merging, M-RoPE, squares, two ages of key prefixes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)

import mllm_adapters.auto  # noqa: F401
from mgll_encoder import image_transform, inspect_tower
from mgll_encoder.common.errors import (
    BadDataError,
    IncompatibleTowerError,
    InvalidArgumentError,
    MismatchError,
    UnsupportedCheckpointError,
)
from mllm_adapters import load_mllm
from mllm_adapters.api import plan_swap
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.fates import Kept, Reinitialized
from mllm_adapters.core.registry import detect, open_checkpoint
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.families.qwen2_vl import QWEN2_VL
from mllm_adapters.families.qwen2_vl.modeling import MgllQwen2VLProcessor, to_images, to_patches
from tests import builders
from tests.mllm_adapters.families import qwen2_vl as tiny
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.retraining import turns

GENERATIONS = tuple(tiny.CONFIGS)
PREFIXES = {"old": tiny.old_prefixes, "new": str}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tower: 28 px, 4 patches, ImageNet's normalization."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder") / "mgll"
    model = CLIPVisionModel(builders.tower_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"height": 28, "width": 28}, "do_center_crop": False,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def plan_of(checkpoint: Path, encoder: Path, size: int | None = 56) -> Plan:
    source, family, _ = open_checkpoint(checkpoint)
    return family.plan(source, inspect_tower(encoder), size)


def swap(checkpoint: Path, encoder: Path, out: Path, size: int | None = 56) -> Plan:
    plan = plan_swap(checkpoint, encoder, image_size=size)
    plan.write(out)
    return plan.plan


# --- before the swap: the stock class itself ------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("generation", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_key_prefixes_of_either_age_load_as_transformers_loads_them(
    generation: str, prefixes: str, tmp_path: Path
) -> None:
    written = tiny.write_checkpoint(tmp_path / "model", generation, PREFIXES[prefixes])
    model, _ = load_mllm(tmp_path / "model", dtype=torch.float32)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    given = tiny.question(torch.randn(1, 3, 84, 84), 14)
    assert torch.equal(model(**given).logits, stock(**given).logits)
    torch.testing.assert_close(model(**given).logits, written(**given).logits)


# --- after the swap: composed by hand -------------------------------------------------------------------------


def by_hand(state: dict[str, Tensor], tower: CLIPVisionModel, image: Tensor, generation: str) -> Tensor:
    """Visual tokens (side/2 · side/2, width) of one picture, from the encoder itself and the merger's tensors."""
    features = tower(image, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][0, 1:]
    side = image.shape[-1] // 14
    normalized = {
        "qwen2_vl": lambda x: F.layer_norm(x, x.shape[-1:], state["ln_q.weight"], state["ln_q.bias"], 1e-6),
        "qwen2_5_vl": lambda x: F.rms_norm(x, x.shape[-1:], state["ln_q.weight"], 1e-6),
        "qwen3_vl": lambda x: F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6),
    }[generation](features)
    first, second = ("linear_fc1", "linear_fc2") if generation == "qwen3_vl" else ("mlp.0", "mlp.2")
    rows = []
    for top in range(0, side, 2):
        for left in range(0, side, 2):
            corners = [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)]
            square = torch.cat([normalized[row * side + column] for row, column in corners])
            hidden = F.gelu(F.linear(square, state[f"{first}.weight"], state[f"{first}.bias"]))
            rows.append(F.linear(hidden, state[f"{second}.weight"], state[f"{second}.bias"]))
    return torch.stack(rows)


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_the_swapped_model_is_tower_merger_and_stock_language_model(
    generation: str, encoder: Path, tmp_path: Path
) -> None:
    stock = tiny.write_checkpoint(tmp_path / "model", generation)
    swap(tmp_path / "model", encoder, tmp_path / "swapped")
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)

    host, trained = tiny.NORMALIZATION[generation], ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    raw = torch.rand(2, 3, 56, 56)
    pixels, trained_pixels = (
        (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in (host, trained)
    )
    given = tiny.question(pixels, 14)
    state = {
        k.removeprefix("model.visual.merger."): v for k, v in model.state_dict().items() if ".merger." in k
    }
    tower = CLIPVisionModel.from_pretrained(encoder)
    visual = torch.cat([by_hand(state, tower, picture[None], generation) for picture in trained_pixels])
    found = model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output
    torch.testing.assert_close(torch.cat(list(found)), visual, atol=1e-4, rtol=0)

    # The stock model's own embedding, positions and layers; only its visual tokens are given.
    embedded = stock.get_input_embeddings()(given["input_ids"])
    embedded[given["input_ids"] == tiny.IMAGE] = visual
    positions, _ = stock.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
    )
    hidden = stock.model.language_model(inputs_embeds=embedded, position_ids=positions).last_hidden_state
    torch.testing.assert_close(model(**given).logits, stock.lm_head(hidden), atol=1e-4, rtol=0)

    flat = stock.model.language_model(inputs_embeds=embedded).last_hidden_state
    assert (stock.lm_head(flat) - stock.lm_head(hidden)).abs().max() > 1e-2, "negative control: 1-D positions"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_only_what_reads_the_tower_is_made_anew(generation: str, encoder: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "model", generation)
    plan = plan_of(tmp_path / "model", encoder)
    made = {step.name: step.operation for step in plan.steps if step.operation not in ("keep", "tower")}
    merger = "model.visual.merger."
    expected = {
        "qwen2_vl": {"ln_q.weight": "ones", "ln_q.bias": "zeros", "mlp.0.weight": "reinit", "mlp.0.bias": "zeros"},
        "qwen2_5_vl": {"ln_q.weight": "ones", "mlp.0.weight": "reinit", "mlp.0.bias": "zeros"},
        "qwen3_vl": {
            "norm.weight": "ones", "norm.bias": "zeros", "linear_fc1.weight": "reinit", "linear_fc1.bias": "zeros",
        },
    }[generation]  # fmt: skip
    assert made == {merger + name: operation for name, operation in expected.items()}
    assert set(plan.connectors.values()) == {Reinitialized(before=plan.before.width, after=plan.after.width)}
    gone = {tensor.name for tensor in plan.dropped if "deepstack" in tensor.name}
    assert len(gone) == (12 if generation == "qwen3_vl" else 0)
    assert any("deepstack is left out: 2 mergers" in note for note in plan.notes) == (
        generation == "qwen3_vl"
    )


def test_a_merger_whose_width_fits_is_kept_whole(encoder: Path, tmp_path: Path) -> None:
    vision = {**tiny.CONFIGS["qwen2_vl"]["vision_config"], "embed_dim": 32}
    tiny.write_checkpoint(tmp_path / "model", "qwen2_vl", vision_config=vision)
    plan = plan_of(tmp_path / "model", encoder)
    assert {step.operation for step in plan.steps} == {"keep", "tower"}
    assert set(plan.connectors.values()) == {Kept(width=32)}


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_shards_of_the_language_model_are_linked_whatever_their_prefixes(
    prefixes: str, encoder: Path, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_5_vl", PREFIXES[prefixes])
    shard(tmp_path / "model")
    swap(tmp_path / "model", encoder, tmp_path / "swapped")
    inodes = {file.stat().st_ino for file in (tmp_path / "swapped").glob("*.safetensors")}
    assert (tmp_path / "model" / "language.safetensors").stat().st_ino in inodes
    load_mllm(tmp_path / "swapped")


def shard(folder: Path) -> None:
    """Split a checkpoint's one file into language model and eyes."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: "eyes.safetensors" if "visual." in name else "language.safetensors" for name in state}
    for file in set(files.values()):
        save_file({k: v for k, v in state.items() if files[k] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_saved_by_transformers_it_still_loads_and_takes_another_tower(
    generation: str, encoder: Path, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "model", generation)
    plan = swap(tmp_path / "model", encoder, tmp_path / "swapped")
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    QWEN2_VL.image_processor(plan).save_pretrained(tmp_path / "saved")
    again = swap(tmp_path / "saved", encoder, tmp_path / "again", size=None)
    assert again.after == plan.after, "the size that was asked for stays"
    model_again, _ = load_mllm(tmp_path / "again", dtype=torch.float32)
    given = tiny.question(torch.randn(1, 3, 56, 56), 14)
    torch.testing.assert_close(model_again(**given).logits, model(**given).logits, atol=1e-4, rtol=0)


def test_videos_and_pictures_of_other_sizes_are_refused(encoder: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    swap(tmp_path / "model", encoder, tmp_path / "swapped")
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    with pytest.raises(BadDataError, match=r"patches, expected \[1, 4, 4\].* 56 x 56 px"):
        model(**tiny.question(torch.randn(1, 3, 84, 84), 14))
    clip = tiny.question(torch.randn(1, 3, 56, 56), 14)
    video = {"pixel_values_videos": clip.pop("pixel_values"), "video_grid_thw": clip.pop("image_grid_thw")}
    with pytest.raises(UnsupportedCheckpointError, match="does not support video"):
        model(**clip, **video)


# --- the processor --------------------------------------------------------------------------------------------

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
         "<|video_pad|>")  # fmt: skip


@dataclass(frozen=True)
class Complete:
    """A swapped checkpoint whose source has a tokenizer."""

    plan: Plan
    folder: Path


def with_tokenizer(folder: Path, generation: str = "qwen2_5_vl") -> Path:
    """A checkpoint as published: tokenizer and image processor, the byte-level way."""
    tokenizer = builders.byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(MARKS)}, replace_extra_special_tokens=False
    )
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    tokens = {"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"]}
    changes: dict[str, Any] = {"vocab_size": 288}
    if generation == "qwen3_vl":
        changes = {"text_config": {**tiny.CONFIGS[generation]["text_config"], **changes}}
    tiny.write_checkpoint(folder, generation, **tokens, **changes)
    tokenizer.save_pretrained(folder)
    mean, std = tiny.NORMALIZATION[generation]
    patch = 16 if generation == "qwen3_vl" else 14
    Qwen2VLImageProcessor(image_mean=mean, image_std=std, patch_size=patch).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def complete(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Complete:
    folder = tmp_path_factory.mktemp("complete")
    plan = swap(with_tokenizer(folder / "model"), encoder, folder / "swapped")
    return Complete(plan, folder / "swapped")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    builders.picture(tmp_path / "images", "a.png")
    builders.picture(tmp_path / "images", "b.png", (0, 0, 250), size=90)
    return tmp_path / "images"


def test_patches_are_those_of_the_stock_processor_and_can_be_put_together_again() -> None:
    images = torch.randn(2, 3, 84, 84)
    patches = to_patches(images, 14, 2, 2)
    stock, *_ = Qwen2VLImageProcessor().patchify(images, 14, 2, 2)
    assert torch.equal(patches, stock.flatten(0, 1))
    assert torch.equal(to_images(patches, 6, 14, 2, 2), images)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_a_picture_of_any_shape_becomes_the_square_that_the_tower_knows(
    resize: str, encoder: Path, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_vl")
    plan = plan_of(tmp_path / "model", encoder)
    plan = plan.model_copy(update={"after": plan.after.model_copy(update={"resize": resize})})
    QWEN2_VL.image_processor(plan).save_pretrained(tmp_path / "processor")
    (tmp_path / "processor" / "config.json").write_text(json.dumps(plan.config))
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    picture = Image.effect_noise((90, 41), 80).convert("RGB")
    made = processor([picture, picture.transpose(Image.Transpose.ROTATE_90)], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert torch.equal(
        to_images(made["pixel_values"][:16], 4, 14, 2, 2)[0], image_transform(plan.after)(picture)
    )
    assert processor.get_number_of_image_patches(41, 90) == 16


def test_picture_and_question_go_through_auto_processor_and_model(complete: Complete) -> None:
    processor = AutoProcessor.from_pretrained(complete.folder)
    assert type(processor) is MgllQwen2VLProcessor
    model = AutoModelForImageTextToText.from_pretrained(complete.folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Glaucoma?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = processor(text=[text], images=[Image.new("RGB", (90, 41), "red")], return_tensors="pt")
    placeholders = given["input_ids"] == complete.plan.image_token_id
    assert placeholders.sum() == complete.plan.after.tokens == 4
    assert torch.equal(given["mm_token_type_ids"].bool(), placeholders)
    out = model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape[1] == given["input_ids"].shape[1] + 2


def test_videos_are_refused_by_the_processor(complete: Complete) -> None:
    processor = AutoProcessor.from_pretrained(complete.folder)
    with pytest.raises(UnsupportedCheckpointError, match="does not support video"):
        processor(text=["<|video_pad|>"], videos=[torch.zeros(4, 3, 28, 28)])


def test_the_chat_template_of_the_source_is_kept(encoder: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'as published' }}"}))
    swap(folder, encoder, tmp_path / "swapped")
    assert AutoProcessor.from_pretrained(tmp_path / "swapped").chat_template == "{{ 'as published' }}"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_prompt_of_a_question_about_one_picture(generation: str, encoder: Path, tmp_path: Path) -> None:
    processor = QWEN2_VL.processor(plan_of(with_tokenizer(tmp_path / "model", generation), encoder))
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Is the disc pale?\nA. Yes"}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    name = "qwen3-vl" if generation == "qwen3_vl" else "qwen2-vl"
    assert text == (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def test_training_batches_of_unequal_rows_have_a_loss(complete: Complete, images: Path) -> None:
    model, processor = load_mllm(complete.folder, dtype=torch.float32)
    talks = (
        ("<image>\nPale?", "No."),
        ("<image><image>\nWhich of the two is the paler one?", "The second, by far."),
    )
    names: tuple[Any, ...] = ("a.png", ["a.png", "b.png"])
    rows = [
        Conversation.model_validate({"id": str(i), "image": name, "conversations": turns(*talk)})
        for i, (name, talk) in enumerate(zip(names, talks, strict=True))
    ]
    corpus = Corpus(images / "train.json", images, rows, {"a.png": (40, 40), "b.png": (90, 90)})
    examples, counts = prepare_examples(corpus, processor, 512, text_only=False)
    assert counts.kept == 2
    encoded = [encode(example, images, processor) for example in examples]
    answers = [processor.tokenizer.decode(row["labels"][row["labels"] != IGNORED]) for row in encoded]
    assert answers == ["No.<|im_end|>", "The second, by far.<|im_end|>"]
    batch = AnswerCollator(processor.tokenizer.pad_token_id)(encoded)
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert batch["image_grid_thw"].shape == (3, 3)
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    alone = [model(**AnswerCollator(0)([row])).loss for row in encoded]
    learnt = torch.tensor([(row["labels"] != IGNORED).sum() for row in encoded])
    torch.testing.assert_close(loss, (torch.stack(alone) * learnt).sum() / learnt.sum(), atol=1e-4, rtol=0)


# --- the published checkpoints, by their headers --------------------------------------------------------------

PUBLISHED_TEXT = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False,
    "sliding_window": 32768, "max_window_layers": 28, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **PUBLISHED_TEXT,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl": {
        **PUBLISHED_TEXT, "max_position_embeddings": 128000,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2, "temporal_patch_size": 2,
        },
    },
    "qwen3_vl": {
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144, "rope_theta": 5e6, "dtype": "bfloat16", "attention_bias": False,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "bos_token_id": 151643, "eos_token_id": 151645, "model_type": "qwen3_vl_text",
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24], "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl",
        },
    },
}  # fmt: skip
"""config.json of Qwen2-VL-7B-Instruct, Qwen2.5-VL-7B-Instruct, Qwen3-VL-8B-Instruct, as far as it matters here."""

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def language_model(prefix: str, c: dict[str, Any], bias: bool) -> Shapes:
    """Qwen2's decoder (biases on q, k, v) or Qwen3's (normalized q and k instead)."""
    width, head = c["hidden_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (c["vocab_size"], width),
        "lm_head.weight": (c["vocab_size"], width),
    }
    shapes |= norm(f"{prefix}norm", width, bias=False)
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        for part, out in (("q", q), ("k", kv), ("v", kv)):
            shapes |= linear(f"{layer}self_attn.{part}_proj", out, width, bias)
        if not bias:
            shapes |= norm(f"{layer}self_attn.q_norm", head, False) | norm(
                f"{layer}self_attn.k_norm", head, False
            )
        shapes |= linear(f"{layer}self_attn.o_proj", width, q, bias=False)
        for part in ("gate", "up"):
            shapes |= linear(f"{layer}mlp.{part}_proj", c["intermediate_size"], width, bias=False)
        shapes |= linear(f"{layer}mlp.down_proj", width, c["intermediate_size"], bias=False)
        shapes |= norm(f"{layer}input_layernorm", width, False) | norm(
            f"{layer}post_attention_layernorm", width, False
        )
    return shapes


def qwen2_eyes(c: dict[str, Any]) -> Shapes:
    width = 1280
    shapes: Shapes = {"visual.patch_embed.proj.weight": (width, 3, 2, 14, 14)}
    for i in range(32):
        block = f"visual.blocks.{i}."
        shapes |= norm(f"{block}norm1", width) | norm(f"{block}norm2", width)
        shapes |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        shapes |= linear(f"{block}mlp.fc1", 4 * width, width) | linear(f"{block}mlp.fc2", width, 4 * width)
    shapes |= norm("visual.merger.ln_q", width)
    return (
        shapes
        | linear("visual.merger.mlp.0", 5120, 5120)
        | linear("visual.merger.mlp.2", c["hidden_size"], 5120)
    )


def qwen2_5_eyes(c: dict[str, Any]) -> Shapes:
    width, mlp = 1280, 3420
    shapes: Shapes = {"visual.patch_embed.proj.weight": (width, 3, 2, 14, 14)}
    for i in range(32):
        block = f"visual.blocks.{i}."
        shapes |= norm(f"{block}norm1", width, False) | norm(f"{block}norm2", width, False)
        shapes |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        shapes |= linear(f"{block}mlp.gate_proj", mlp, width) | linear(f"{block}mlp.up_proj", mlp, width)
        shapes |= linear(f"{block}mlp.down_proj", width, mlp)
    shapes |= norm("visual.merger.ln_q", width, False)
    return (
        shapes
        | linear("visual.merger.mlp.0", 5120, 5120)
        | linear("visual.merger.mlp.2", c["hidden_size"], 5120)
    )


def qwen3_eyes(c: dict[str, Any]) -> Shapes:
    width, mlp, merged = 1152, 4304, 4608
    eyes = "model.visual."
    shapes: Shapes = {
        f"{eyes}patch_embed.proj.weight": (width, 3, 2, 16, 16),
        f"{eyes}patch_embed.proj.bias": (width,),
    }
    shapes |= {f"{eyes}pos_embed.weight": (2304, width)}
    for i in range(27):
        block = f"{eyes}blocks.{i}."
        shapes |= norm(f"{block}norm1", width) | norm(f"{block}norm2", width)
        shapes |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        shapes |= linear(f"{block}mlp.linear_fc1", mlp, width) | linear(f"{block}mlp.linear_fc2", width, mlp)
    for merger, normed in (("merger", width), *((f"deepstack_merger_list.{i}", merged) for i in range(3))):
        shapes |= norm(f"{eyes}{merger}.norm", normed) | linear(f"{eyes}{merger}.linear_fc1", merged, merged)
        shapes |= linear(f"{eyes}{merger}.linear_fc2", c["text_config"]["hidden_size"], merged)
    return shapes


PUBLISHED_SHAPES: dict[str, Callable[[dict[str, Any]], Shapes]] = {
    "qwen2_vl": lambda c: language_model("model.", c, True) | qwen2_eyes(c),
    "qwen2_5_vl": lambda c: language_model("model.", c, True) | qwen2_5_eyes(c),
    "qwen3_vl": lambda c: language_model("model.language_model.", c["text_config"], False) | qwen3_eyes(c),
}

PUBLISHED_WEIGHTS = {"qwen2_vl": 8_291_375_616, "qwen2_5_vl": 8_292_166_656, "qwen3_vl": 8_767_123_696}
"""Parameters as the model pages count them."""

QWEN2_7B, QWEN3_8B = 7_615_616_512, 8_190_735_360
"""Parameters of the language models, as their pages count them."""

CLIP_L_448 = 303_179_776 + (32**2 - 16**2) * 1024
"""CLIP ViT-L/14 with the positions of 448 px instead of 224."""

SWAPPED_WEIGHTS = {
    "qwen2_vl": QWEN2_7B + CLIP_L_448 + 2 * 1024 + 5120 * (4096 + 1) + 3584 * (5120 + 1),
    "qwen2_5_vl": QWEN2_7B + CLIP_L_448 + 1024 + 5120 * (4096 + 1) + 3584 * (5120 + 1),
    "qwen3_vl": QWEN3_8B + CLIP_L_448 + 2 * 1024 + 4608 * (4096 + 1) + 4096 * (4608 + 1),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_published_checkpoint_of_full_size(generation: str, tmp_path: Path) -> None:
    config, shapes = PUBLISHED[generation], PUBLISHED_SHAPES[generation](PUBLISHED[generation])
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == PUBLISHED_WEIGHTS[generation]
    folder = builders.sparse_checkpoint(tmp_path / "7b", {"model_type": generation, **config}, shapes, "BF16")
    tower = inspect_tower(published_tower(tmp_path / "mgll"))
    checkpoint, family, _ = open_checkpoint(folder)
    plan = family.plan(checkpoint, tower)
    check_full_size(plan, checkpoint, weights=SWAPPED_WEIGHTS[generation])
    assert plan.before.tokens == plan.after.tokens == 256
    assert plan.before.image_size == (512 if generation == "qwen3_vl" else 448)
    assert plan.after.image_size == 448
    assert {step.dtype for step in plan.steps} == {"bfloat16"}
    assert [family.plan(checkpoint, tower, size).after.tokens for size in (224, 336, 448)] == [64, 144, 256]
    with pytest.raises(IncompatibleTowerError, match="try 224"):
        family.plan(checkpoint, tower, 238)  # 17 patches: not an even number


def test_a_fine_tune_with_three_vision_fields_in_float32(tmp_path: Path) -> None:
    """MBZUAI/AIN: vision_config leaves out Qwen2-VL's defaults; weights are F32, though config.json says bfloat16."""
    full, short = PUBLISHED["qwen2_vl"], {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}
    config = {"model_type": "qwen2_vl", **full, "vision_config": short}
    shapes = PUBLISHED_SHAPES["qwen2_vl"](full)
    folder = builders.sparse_checkpoint(tmp_path / "ain", config, shapes, "F32")
    checkpoint, family, _ = open_checkpoint(folder)
    plan = family.plan(checkpoint, inspect_tower(published_tower(tmp_path / "mgll")))
    check_full_size(plan, checkpoint, weights=SWAPPED_WEIGHTS["qwen2_vl"])
    assert {step.dtype for step in plan.steps} == {"float32"}
    assert (plan.before.image_size, plan.before.tokens) == (448, 256)


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_audio"}, "Qwen2-Audio takes audio, not images: take Qwen2-VL"),
        ({"model_type": "qwen2_5_omni"}, "Qwen2.5-Omni is not supported"),
        ({"model_type": "qwen3_vl_moe", "vision_config": {}}, "mixture of experts is not supported"),
        ({"model_type": "qwen2"}, "language model, without vision tower"),
        (
            {"model_type": "qwen2_5_vl", "vision_config": {}, "quantization_config": {"quant_method": "awq"}},
            "quantization_config says awq.* use the unquantized checkpoint",
        ),
        (
            {"model_type": "qwen2_vl", "vision_config": {}, "quantization_config": {"quant_method": "gptq"}},
            "quantization_config says gptq",
        ),
    ],
)
def test_relatives_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=message):
        detect(config, "config.json")


def test_a_model_quantised_while_loading_is_still_of_the_family() -> None:
    config = {**PUBLISHED["qwen2_vl"], "model_type": "qwen2_vl"}
    found, _ = detect({**config, "quantization_config": {"quant_method": "bitsandbytes"}}, "model")
    assert found is QWEN2_VL


def test_a_checkpoint_quantised_on_disk_takes_no_tower(encoder: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_vl")
    edit(tmp_path / "model", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"config.json: quantization_config says bitsandbytes.* use the unquantized",
    ):
        plan_of(tmp_path / "model", encoder)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder: Path, part: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if part not in k}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_config_that_names_a_clip_under_a_stock_model_type_never_gives_random_weights(
    generation: str, encoder: Path, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "model", generation)
    plan = swap(tmp_path / "model", encoder, tmp_path / "swapped")
    edit(
        tmp_path / "swapped",
        model_type=generation,
        vision_config=plan.config["vision_config"]["tower_config"],
    )
    with pytest.raises(MismatchError, match="do not belong together"):
        load_mllm(tmp_path / "swapped")


def test_an_incomplete_checkpoint_is_refused_in_one_line(encoder: Path, tmp_path: Path) -> None:
    for part, message in (
        ("visual.", "is this the language model only"),
        ("merger.mlp.0", r"visual.merger.mlp.0.weight is missing: complete the download"),
    ):
        folder = tmp_path / part
        tiny.write_checkpoint(folder, "qwen2_vl")
        without(folder, part)
        with pytest.raises(BadDataError, match=message):
            plan_of(folder, encoder)


def test_a_missing_layer_of_the_language_model_is_noticed_before_anything_is_written(
    encoder: Path, tmp_path: Path
) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_vl")
    without(tmp_path / "model", "layers.1.mlp")
    with pytest.raises(MismatchError, match="3 missing tensors"):
        swap(tmp_path / "model", encoder, tmp_path / "swapped")
    assert not (tmp_path / "swapped").exists()


def test_a_config_of_another_size_is_refused(encoder: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_vl")
    edit(tmp_path / "model", vision_config={**tiny.CONFIGS["qwen2_vl"]["vision_config"], "embed_dim": 20})
    with pytest.raises(MismatchError, match=r"tower of width 20, but .*ln_q.weight has shape \[40\]"):
        plan_of(tmp_path / "model", encoder)


def test_tokenizer_and_config_must_mean_the_same_placeholder(encoder: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    edit(folder, image_token_id=7)
    with pytest.raises(MismatchError, match="expected 7"):
        QWEN2_VL.processor(plan_of(folder, encoder))


def test_it_cannot_be_written_as_a_llava(encoder: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_vl")
    source, family, _ = open_checkpoint(tmp_path / "model")
    assert family.spec.targets == ("own",)
    with pytest.raises(InvalidArgumentError, match="M-RoPE"):
        family.plan(source, inspect_tower(encoder), None, "llava")


def test_the_plan_says_what_changes_for_the_user(encoder: Path, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    notes = "\n".join(plan_of(tmp_path / "model", encoder, None).notes)
    assert "448 x 448 px and becomes 256 visual tokens" in notes
    assert "video input is refused" in notes
    assert "takes images of any size and keeps their shape" in notes


def test_stock_processor_is_left_alone_before_the_swap(tmp_path: Path) -> None:
    _, processor = load_mllm(with_tokenizer(tmp_path / "model", "qwen2_vl"))
    assert type(processor) is Qwen2VLProcessor
