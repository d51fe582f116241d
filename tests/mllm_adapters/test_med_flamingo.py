"""Somebody puts an MGLL tower into a Med-Flamingo."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import mllm_adapters.auto  # noqa: F401
from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mgll_encoder import Tower, TowerSpec, inspect_tower, save_tower
from mgll_encoder.common.errors import (
    BadDataError,
    MismatchError,
    NotFoundError,
    UnsupportedCheckpointError,
    UserError,
)
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD
from mllm_adapters import load_mllm
from mllm_adapters.api import plan_swap
from mllm_adapters.core.fates import Kept, Reinitialized
from mllm_adapters.core.registry import detect, open_checkpoint
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.families.med_flamingo.blocks import FlamingoConfig, attended_image
from mllm_adapters.families.med_flamingo.modeling import FlamingoForConditionalGeneration
from tests import builders
from tests.mllm_adapters.families import full_size
from tests.mllm_adapters.families import med_flamingo as family
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.llava_checkpoints import sentencepiece_tokenizer
from tests.mllm_adapters.retraining import turns

State = dict[str, Tensor]
PROMPT = Path(__file__).parent / "prompts" / "med-flamingo.txt"
VOCABULARY = 310
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}


# --- a host of our own making: other dims than the golden one, with a tokenizer --------------------------------


def tiny_model() -> FlamingoForConditionalGeneration:
    """Untrained, but with open gates; three layers, a gated block before each."""
    torch.manual_seed(0)
    config = FlamingoConfig(
        vision_config=builders.tower_config(hidden_size=64, num_attention_heads=1, hidden_act="quick_gelu"),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY + 3, hidden_size=40, intermediate_size=56, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=VOCABULARY + 2, eos_token_id=2,
        ),
        image_token_id=VOCABULARY + 1, cross_attention_interval=1, cross_attention_heads=1,
        cross_attention_intermediate_size=160, perceiver_latents=5, perceiver_depth=1, perceiver_heads=2,
        perceiver_intermediate_size=256,
    )  # fmt: skip
    model = FlamingoForConditionalGeneration(config).eval()
    for block in model.model.cross_attention.values():
        block.attn_gate.data.fill_(1.0)
        block.ff_gate.data.fill_(0.5)
    return model


def original_names(model: FlamingoForConditionalGeneration) -> State:
    """What open_flamingo >= 2.0 would save of it: the perceiver, the embedding, the gated blocks."""
    names = (
        (r"model\.perceiver\.(.+)", r"perceiver.\1"),
        (r"model\.language_model\.(embed_tokens.+)", r"lang_encoder.model.\1"),
        (r"model\.cross_attention\.(\d+)\.(.+)", r"lang_encoder.model.layers.\1.gated_cross_attn_layer.\2"),
    )
    return {
        re.sub(pattern, new, name): value.clone()
        for name, value in model.state_dict().items()
        for pattern, new in names
        if re.fullmatch(pattern, name)
    }


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_host(tmp_path_factory.mktemp("hosts") / "med-flamingo")


def write_host(folder: Path) -> Path:
    """model.pt, a LLaMA with the tokenizer that it was published with, and a CLIP folder."""
    folder.mkdir()
    model = tiny_model()
    torch.save({"epoch": 3, "model_state_dict": original_names(model)}, folder / "model.pt")
    config = LlamaConfig(
        **{**model.config.text_config.to_dict(), "vocab_size": VOCABULARY, "pad_token_id": None}
    )
    language = LlamaForCausalLM(config)
    state = model.model.language_model.state_dict()
    state["embed_tokens.weight"] = state["embed_tokens.weight"][:VOCABULARY]
    language.model.load_state_dict(state)
    language.lm_head.load_state_dict({"weight": model.lm_head.weight[:VOCABULARY]})
    language.save_pretrained(folder / "llama-7b-hf")
    sentencepiece_tokenizer(folder / "llama-7b-hf", "LLaMATokenizer")
    model.model.vision_tower.save_pretrained(folder / "clip-vit")
    return folder


def an_encoder(folder: Path, width: int = 64) -> Path:
    """An MGLL tower of 42 px, in 9 patches."""
    torch.manual_seed(5)
    spec = TowerSpec(
        width=width, depth=2, heads=4, mlp_width=64, patch_size=14, image_size=42, activation="gelu"
    )
    config = builders.tower_config(hidden_size=width, image_size=42, num_hidden_layers=2)
    return save_tower(Tower.from_model(CLIPVisionModel(config), spec), folder)


def swap(source: Path, encoder: Path, out: Path, image_size: int | None = None) -> Any:
    plan = plan_swap(source, encoder, image_size=image_size)
    plan.write(out)
    return plan.plan


@pytest.fixture(scope="module")
def swapped(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swapped")
    swap(host, an_encoder(folder / "mgll"), folder / "out")
    return folder / "out"


def ask(processor: Any, images: int = 1) -> str:
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "Which disease?"}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def pictures(number: int) -> list[Image.Image]:
    return [Image.effect_noise((50 + 9 * i, 40), 90).convert("RGB") for i in range(number)]


# --- the original's numbers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Golden:
    return Golden(golden / "med_flamingo")


@pytest.fixture(scope="module")
def original(vectors: Golden) -> Any:
    return load_mllm(vectors.folder, dtype=torch.float32)[0]


def given(original: Any, vectors: Golden, sequence: str) -> dict[str, Tensor]:
    return family.inputs(original, vectors, sequence)


@torch.no_grad()
@pytest.mark.parametrize("sequence", ["seq0", "seq1"])
def test_the_mask_that_med_flamingo_was_trained_with_gives_its_logits(
    original: Any, vectors: Golden, sequence: str
) -> None:
    expected = vectors.expected[f"{sequence}.of002_logits"]
    today = original(**given(original, vectors, sequence)).logits[..., : expected.shape[-1]]
    assert (today - expected).abs().max() > 0.1, "negative control: the masks differ"
    original.config.media_mask = "legacy"
    found = original(**given(original, vectors, sequence)).logits[..., : expected.shape[-1]]
    original.config.media_mask = "preceding"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_token_attends_to_the_picture_before_it_or_after_it() -> None:
    ids = torch.tensor([[0, 9, 0, 0, 9, 0, 0, 0]])
    assert attended_image(ids, 9, "preceding").tolist() == [[0, 1, 1, 1, 2, 2, 2, 2]]
    assert attended_image(ids, 9, "legacy").tolist() == [[1, 1, 2, 2, 2, 0, 0, 0]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_it_generates_what_the_original_generated(original: Any, vectors: Golden, use_cache: bool) -> None:
    expected, added = vectors.expected["seq0.greedy"], vectors.about["special_ids"].values()
    found = original.generate(
        **given(original, vectors, "seq0"), do_sample=False, max_new_tokens=expected.shape[1],
        eos_token_id=None, suppress_tokens=list(added), use_cache=use_cache,
    )  # fmt: skip
    assert found[:, -expected.shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("media_mask", ["preceding", "legacy"])
@pytest.mark.parametrize("beams", [1, 3])
def test_new_tokens_attend_to_the_pictures_of_their_own_row(
    original: Any, vectors: Golden, media_mask: str, beams: int
) -> None:
    """A left-padded batch of rows with one and two pictures says what each row says alone, cache or not."""
    rows = [given(original, vectors, name) for name in ("seq0", "seq1")]
    longest = max(row["input_ids"].shape[1] for row in rows)
    padding = original.config.text_config.pad_token_id
    ids = torch.cat(
        [
            torch.nn.functional.pad(r["input_ids"], (longest - r["input_ids"].shape[1], 0), value=padding)
            for r in rows
        ]
    )
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != padding).long(),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
    }
    original.config.media_mask = media_mask
    options = {**GREEDY, "num_beams": beams}
    cached = original.generate(**batch, **options)
    plain = original.generate(**batch, **options, use_cache=False)
    alone = [original.generate(**row, **options)[0, -4:] for row in rows]
    original.config.media_mask = "preceding"
    assert torch.equal(cached, plain)
    assert cached[:, -4:].tolist() == [row.tolist() for row in alone]


@torch.no_grad()
def test_a_cache_continued_by_hand_needs_to_be_told_the_picture(original: Any, vectors: Golden) -> None:
    whole = given(original, vectors, "seq1")
    expected = original(**whole).logits[:, -2:]
    first = original(**{**whole, "input_ids": whole["input_ids"][:, :-2]}, use_cache=True)
    rest = {"input_ids": whole["input_ids"][:, -2:], "past_key_values": first.past_key_values}
    with pytest.raises(ValueError, match="pass attended_images"):
        original(**rest)
    last = attended_image(whole["input_ids"], original.config.image_token_id, "preceding")[:, -2:]
    found = original(**rest, visual_tokens=first.visual_tokens, attended_images=last).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pictures_and_placeholders_must_be_equally_many(original: Any, vectors: Golden) -> None:
    two = given(original, vectors, "seq1")
    with pytest.raises(ValueError, match="1 images for 2 image tokens"):
        original(**{**two, "pixel_values": two["pixel_values"][:1]})
    with pytest.raises(ValueError, match="no images"):
        original(input_ids=two["input_ids"])
    original(input_ids=two["input_ids"][:, :1])  # text alone is fine


# --- the names that open_flamingo has used ---------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Where the parts of the golden checkpoint lie; ``state`` holds each gated block under both of its names."""

    language: Path
    clip: Path | None
    state: State


@pytest.fixture(scope="module")
def parts(vectors: Golden) -> Parts:
    checkpoint, med_flamingo, _ = open_checkpoint(vectors.folder)
    plan = med_flamingo.plan(checkpoint)
    state = {name.removeprefix("module."): checkpoint.read(name) for name in checkpoint.tensors}
    inside, beside = "lang_encoder.model.layers", "lang_encoder.gated_cross_attn_layers"
    for name, value in list(state.items()):
        if match := re.fullmatch(rf"{inside}\.(\d+)\.gated_cross_attn_layer\.(.+)", name):
            state[f"{beside}.{match[1]}.{match[2]}"] = value
        elif match := re.fullmatch(rf"{beside}\.(\d+)\.(.+)", name):
            state[f"{inside}.{match[1]}.gated_cross_attn_layer.{match[2]}"] = value
    return Parts(plan.parts["language-model"], plan.tower, state)


def without(state: State, part: str) -> State:
    return {name: value for name, value in state.items() if part not in name}


def whole_language_model(parts: Parts) -> State:
    """As if nothing had been frozen: the layers under both of their names, and the head."""
    language = LlamaForCausalLM.from_pretrained(parts.language).state_dict()
    rows = len(parts.state["lang_encoder.model.embed_tokens.weight"]) - len(language["lm_head.weight"])
    added = language["lm_head.weight"].double().mean(dim=0, keepdim=True).float().expand(rows, -1)
    found = dict(parts.state) | {
        "lang_encoder.lm_head.weight": torch.cat([language["lm_head.weight"], added])
    }
    found["lang_encoder.model.norm.weight"] = language["model.norm.weight"]
    for name, value in language.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            found[f"lang_encoder.model.layers.{match[1]}.decoder_layer.{match[2]}"] = value
            found[f"lang_encoder.old_decoder_blocks.{match[1]}.{match[2]}"] = value
    return found


def with_clip(parts: Parts, *, whole: bool) -> State:
    """The CLIP in the weight file: all of it, as release 0.0.2 has it, or its vision tower."""
    if parts.clip is None:
        return parts.state
    clip = torch.load(parts.clip, weights_only=True)
    if whole:
        return parts.state | {f"vision_encoder.{name}": value for name, value in clip.items()}
    vision = [name for name in clip if name.startswith("visual.")]
    return parts.state | {f"vision_encoder.{name.removeprefix('visual.')}": clip[name] for name in vision}


VARIANTS: dict[str, Callable[[Parts], Any]] = {
    "release 2.0: once, wrapped": lambda parts: {
        "epoch": 1,
        "model_state_dict": without(without(parts.state, "lang_encoder.gated_cross"), "inv_freq"),
    },
    "the other name alone": lambda parts: without(parts.state, ".gated_cross_attn_layer."),
    "from distributed training": lambda parts: {f"module.{name}": v for name, v in parts.state.items()},
    "nothing frozen": whole_language_model,
    "with CLIP, 0.0.2": lambda parts: with_clip(parts, whole=True),
    "with CLIP, 2.0": lambda parts: with_clip(parts, whole=False),
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_names_that_open_flamingo_has_used_are_read(
    variant: str, original: Any, parts: Parts, vectors: Golden, tmp_path: Path
) -> None:
    state = VARIANTS[variant](parts)
    shutil.copytree(parts.language, tmp_path / "llama", copy_function=shutil.copyfile)
    if "CLIP" not in variant and parts.clip is not None:
        (tmp_path / "clip").mkdir()
        shutil.copyfile(parts.clip, tmp_path / "clip" / parts.clip.name)
    if variant == "nothing frozen":
        for shard in [f for f in (tmp_path / "llama").iterdir() if f.name != "config.json"]:
            shard.unlink()
        tensors = {name: value.clone() for name, value in state.items()}
        save_file(tensors, tmp_path / "checkpoint.safetensors")
    else:
        torch.save(state, tmp_path / "checkpoint.pt")
    model, _ = load_mllm(tmp_path, dtype=torch.float32)
    inputs = given(original, vectors, "seq1")
    assert torch.equal(model(**inputs).logits, original(**inputs).logits)


def test_parts_may_lie_beside_the_folder_or_be_named(original: Any, parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(parts.state, folder / "model.pt")
    shutil.copytree(parts.language, tmp_path / "llama", copy_function=shutil.copyfile)
    clip = {} if parts.clip is None else {"vision-tower": parts.clip}
    for place in (folder, tmp_path):
        state = load_mllm(place, dtype=torch.float32, parts=clip)[0].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


# --- what is not supported is refused --------------------------------------------------------------------------


def spoilt(parts: Parts, folder: Path, change: Callable[[State], object]) -> Path:
    shutil.copytree(parts.language, folder / "llama", copy_function=shutil.copyfile)
    if parts.clip is not None:
        shutil.copyfile(parts.clip, folder / parts.clip.name)
    state = dict(parts.state)
    change(state)
    torch.save(state, folder / "model.pt")
    return folder


def rename(old: str, new: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in [name for name in state if old in name]:
            state[name.replace(old, new)] = state.pop(name)

    return change


def edit_one_alias(state: State) -> None:
    name = next(
        name for name in state if name.startswith("lang_encoder.gated") and name.endswith("to_q.weight")
    )
    state[name] = state[name] + 1


def widen_one_alias(state: State) -> None:
    name = next(
        name for name in state if name.startswith("lang_encoder.gated") and name.endswith("to_q.weight")
    )
    state[name] = torch.zeros(3, 3)


def lose_a_block(state: State) -> None:
    numbers = {int(match[1]) for name in state if (match := re.search(r"layers\.(\d+)\.gated", name))}
    if len(numbers) == 1:
        pytest.skip("one block only")
    last = max(numbers)
    for name in [n for n in state if f"layers.{last}.gated" in n or f"gated_cross_attn_layers.{last}." in n]:
        del state[name]


def lose_rows(state: State) -> None:
    name = "lang_encoder.model.embed_tokens.weight"
    state[name] = state[name][:-3]


def lose(part: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return change


SPOILT: dict[str, tuple[Callable[[State], object], str]] = {
    "edited": (edit_one_alias, "two names of one tensor, but hold different values"),
    "edited shape": (widen_one_alias, "two names of one tensor, but differ"),
    "incomplete": (lose_a_block, "the file is incomplete, or this is not the LLaMA"),
    "other LLaMA": (lose_rows, "give the right one with `parts\\['language-model'\\]=FOLDER`"),
    "untrained": (lose("perceiver."), "has no perceiver: expected the trained weights"),
    "no blocks": (lose("gated_cross_attn"), "has no gated cross-attention blocks"),
    "truncated": (lose("perceiver.layers.0.0.to_q"), "perceiver.layers.0.0.to_q.weight is missing"),
    "MPT": (
        rename("lang_encoder.model.embed_tokens", "lang_encoder.transformer.wte"),
        "its language model is an MPT .*OpenFlamingo-9B",
    ),
    "RedPajama": (
        rename("lang_encoder.model.embed_tokens", "lang_encoder.gpt_neox.embed_in"),
        "its language model is a GPT-NeoX",
    ),
    "video": (
        lambda s: s.update({"perceiver.frame_embs": torch.zeros(4, 8)}),
        "trained on videos",
    ),
    "foreign": (
        lambda s: s.update({"lang_encoder.model.layers.0.lora_A": torch.zeros(4, 8)}),
        "lora_A is not part of a Flamingo",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_weight_file_that_cannot_be_right_is_refused(fault: str, parts: Parts, tmp_path: Path) -> None:
    change, message = SPOILT[fault]
    with pytest.raises(UserError, match=message) as refusal:
        load_mllm(spoilt(parts, tmp_path / "host", change))
    assert "\n" not in str(refusal.value)
    assert "model.pt" in str(refusal.value) or "lang_encoder" in str(refusal.value)


def test_a_missing_part_is_named_with_the_option_that_supplies_it(parts: Parts, tmp_path: Path) -> None:
    alone = tmp_path / "around" / "alone"
    alone.mkdir(parents=True)
    torch.save(without(parts.state, "vision_encoder"), alone / "model.pt")
    with pytest.raises(NotFoundError, match=r"`parts\['language-model'\]=FOLDER`"):
        load_mllm(alone)
    with pytest.raises(NotFoundError, match=r"`parts\['vision-tower'\]=PATH`"):
        load_mllm(alone, parts={"language-model": parts.language})
    with pytest.raises(BadDataError, match="is not a LLaMA"):
        load_mllm(alone, parts={"language-model": tmp_path})
    for name in ("one", "two"):
        shutil.copytree(parts.language, alone / name, copy_function=shutil.copyfile)
    with pytest.raises(NotFoundError, match="one and two are LLaMAs"):
        load_mllm(alone)


def test_a_swapped_checkpoint_without_its_tower_or_blocks_is_refused(swapped: Path, tmp_path: Path) -> None:
    encoder = inspect_tower(an_encoder(tmp_path / "mgll"))
    for part, message in (
        ("vision_tower", "has no tensors under"),
        ("cross_attention", "complete the download"),
    ):
        folder = tmp_path / part
        shutil.copytree(swapped, folder)
        state = {name: value for f in folder.glob("*.safetensors") for name, value in load_file(f).items()}
        for file in folder.glob("model*"):
            file.unlink()
        save_file(without(state, part), folder / "model.safetensors")
        checkpoint, med_flamingo, _ = open_checkpoint(folder)
        with pytest.raises(BadDataError, match=message):
            med_flamingo.plan(checkpoint, encoder)
        with pytest.raises(MismatchError, match="missing tensors"):
            load_mllm(folder)


@pytest.mark.parametrize(
    ("model_type", "message"), [("idefics", "IDEFICS"), ("idefics2", "IDEFICS"), ("otter", "Otter")]
)
def test_other_flamingos_are_refused_by_name(model_type: str, message: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=f"{message}.*Med-Flamingo's model.pt"):
        detect({"model_type": model_type}, "here/config.json")


# --- the swap --------------------------------------------------------------------------------------------------


def test_the_swapped_model_keeps_grid_and_normalization_of_its_host(host: Path, tmp_path: Path) -> None:
    plan = swap(host, an_encoder(tmp_path / "mgll"), tmp_path / "out")
    assert (plan.before.image_size, plan.after.image_size) == (28, 28)
    assert (plan.after.mean, plan.after.std, plan.after.resize) == (CLIP_MEAN, CLIP_STD, "squash")
    assert plan.before.resize == "crop"
    assert plan.connectors == {"model.perceiver": Kept(width=64)}
    assert plan.config["model_type"] == "mgll_flamingo"
    assert any("lm_head has no trained rows" in note for note in plan.notes)


@torch.no_grad()
def test_the_rows_that_the_original_does_not_save_are_the_mean_of_the_others(original: Any) -> None:
    rows = original.lm_head.weight
    torch.testing.assert_close(rows[-3:], rows[:-3].mean(dim=0).expand(3, -1))


def test_a_llama_that_has_its_own_padding_gets_two_tokens(host: Path, tmp_path: Path) -> None:
    shutil.copytree(host, tmp_path / "host")
    state = original_names(tiny_model())
    state["lang_encoder.model.embed_tokens.weight"] = state["lang_encoder.model.embed_tokens.weight"][:-1]
    torch.save(state, tmp_path / "host" / "model.pt")
    model, processor = load_mllm(tmp_path / "host")
    assert model.config.image_token_id == processor.image_token_id == VOCABULARY + 1
    assert len(processor.tokenizer) == model.lm_head.out_features == VOCABULARY + 2
    assert processor.tokenizer.pad_token == "<unk>"


def test_a_tower_of_another_width_renews_what_reads_it(host: Path, tmp_path: Path) -> None:
    plan = swap(host, an_encoder(tmp_path / "mgll", width=32), tmp_path / "out", image_size=42)
    assert plan.connectors["model.perceiver"] == Reinitialized(before=64, after=32, because="latents")
    assert plan.connectors["model.cross_attention.*.attn.to_kv"] == Reinitialized(before=64, after=32)
    renewed = {step.name for step in plan.steps if step.operation in ("reinit", "ones", "zeros")}
    kept = {step.name for step in plan.steps} - renewed
    assert {name for name in kept if "perceiver" in name} == set()
    assert all(("perceiver" in n) or n.endswith("attn.to_kv.weight") for n in renewed)
    model, processor = load_mllm(tmp_path / "out")
    inputs = processor(text=[ask(processor)], images=pictures(1), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (42, 42)
    look = model(**inputs).logits
    assert (look - model(**{**inputs, "pixel_values": 0 * inputs["pixel_values"]}).logits).abs().max() > 1e-3
    assert plan.config["perceiver_intermediate_size"] == 128, "four times the features, as before"


def test_the_clip_file_of_a_host_is_not_needed_where_it_is_replaced(tmp_path: Path) -> None:
    """As published: ViT-L/14 features of width 1024; a damaged file of OpenAI's is named when it is needed."""
    source, encoder = published(tmp_path / "host", clip=False), full_size.published_tower(tmp_path / "mgll")
    (source / "clip").mkdir()
    with zipfile.ZipFile(source / "clip" / "ViT-L-14.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    checkpoint, med_flamingo, _ = open_checkpoint(source)
    assert med_flamingo.plan(checkpoint, inspect_tower(encoder)).before.image_size == 224
    with pytest.raises(BadDataError, match=r"ViT-L-14\.pt is a zip file, not a checkpoint"):
        med_flamingo.plan(checkpoint)


# --- the processor ---------------------------------------------------------------------------------------------


def test_the_processor_writes_one_placeholder_per_picture(swapped: Path) -> None:
    processor = AutoProcessor.from_pretrained(swapped)
    assert type(processor).__name__ == "FlamingoProcessor"
    tokenizer = processor.tokenizer
    added = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"])
    assert added == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    assert tokenizer.pad_token == "<PAD>"
    texts = [ask(processor), ask(processor, images=2)]
    batch = processor(text=texts, images=pictures(3), padding=True, return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [1, 2]
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert batch["attention_mask"][0, 0] == 0, "padded on the left"
    assert batch["input_ids"][1, 0] == tokenizer.bos_token_id
    model, loaded = load_mllm(swapped)
    assert type(loaded) is type(processor)
    new = model.generate(**batch, **GREEDY)[:, -4:]
    assert not torch.isin(new, torch.tensor([processor.image_token_id, tokenizer.pad_token_id])).any()


def test_the_prompt_is_the_published_one(swapped: Path) -> None:
    processor = AutoProcessor.from_pretrained(swapped)
    question = {"type": "text", "text": "What is shown in the middle of the picture?"}
    asked = [{"role": "user", "content": [{"type": "image"}, question]}]
    shot = [*asked, {"role": "assistant", "content": "The optic disc."}]
    rendered = processor.apply_chat_template(asked, add_generation_prompt=True)
    few = processor.apply_chat_template([*shot, *asked], add_generation_prompt=True)
    assert f"{rendered}\n{few}\n" == PROMPT.read_text()


def test_training_learns_the_answers(swapped: Path, tmp_path: Path) -> None:
    model, processor = load_mllm(swapped)
    builders.picture(tmp_path, "a.png")
    rows = [
        Conversation.model_validate(
            {"id": i, "image": "a.png", "conversations": turns("<image>\nWhich?", answer)}
        )
        for i, answer in enumerate(["Glaucoma", "Myopia of the retina"])
    ]
    corpus = Corpus(tmp_path / "train.json", tmp_path, rows, {"a.png": (40, 40)})
    examples, counts = prepare_examples(corpus, processor, 64, text_only=False)
    assert counts.kept == 2
    encoded = [encode(example, tmp_path, processor) for example in examples]
    learnt = encoded[0]["labels"][encoded[0]["labels"] != IGNORED]
    assert processor.tokenizer.decode(learnt).strip() == "Glaucoma<|endofchunk|>"
    batch = AnswerCollator(processor.tokenizer.pad_token_id)(encoded)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.model.perceiver.latents.grad.abs().max() > 0


def test_questions_are_answered_by_letter(swapped: Path) -> None:
    scorer = Scorer(*load_mllm(swapped))
    items = [
        MCQItem(id=str(n), images=["x"] * n, question="Which disease?", options=["Glaucoma", "Myopia"],
                answer=0, category="x")
        for n in (1, 2)
    ]  # fmt: skip
    images = pictures(3)
    together = scorer.score(items, [images[:1], images[1:]])
    alone = [
        scorer.score([item], [seen])[0] for item, seen in zip(items, (images[:1], images[1:]), strict=True)
    ]
    for found, expected in zip(together, alone, strict=True):
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


# --- full size -------------------------------------------------------------------------------------------------


def published(folder: Path, *, clip: bool = True) -> Path:
    """Med-Flamingo of full size by its headers: OpenFlamingo-9B's shapes on LLaMA-7B and ViT-L/14."""
    width, text = 1024, 4096
    shapes: dict[str, tuple[int, ...]] = {
        "perceiver.latents": (64, width),
        "perceiver.norm.weight": (width,),
        "perceiver.norm.bias": (width,),
        "lang_encoder.model.embed_tokens.weight": (32003, text),
    }
    for layer in range(6):
        inner = f"perceiver.layers.{layer}"
        for norm in ("0.norm_media", "0.norm_latents", "1.0"):
            shapes |= {f"{inner}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        shapes |= {
            f"{inner}.0.to_q.weight": (512, width), f"{inner}.0.to_kv.weight": (1024, width),
            f"{inner}.0.to_out.weight": (width, 512), f"{inner}.1.1.weight": (4096, width),
            f"{inner}.1.3.weight": (width, 4096),
        }  # fmt: skip
    block = {
        "attn_gate": (1,), "ff_gate": (1,), "attn.norm.weight": (text,), "attn.norm.bias": (text,),
        "attn.to_q.weight": (512, text), "attn.to_kv.weight": (1024, width), "attn.to_out.weight": (text, 512),
        "ff.0.weight": (text,), "ff.0.bias": (text,), "ff.1.weight": (16384, text), "ff.3.weight": (text, 16384),
    }  # fmt: skip
    for layer in range(3, 32, 4):
        for alias in (f"gated_cross_attn_layers.{layer}", f"model.layers.{layer}.gated_cross_attn_layer"):
            shapes |= {f"lang_encoder.{alias}.{name}": shape for name, shape in block.items()}
    for layer in range(32):
        shapes[f"lang_encoder.model.layers.{layer}.decoder_layer.self_attn.rotary_emb.inv_freq"] = (64,)
    builders.sparse_checkpoint(folder, {}, shapes, "F32")
    (folder / "config.json").unlink()

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": text, "hidden_act": "silu",
        "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-6,
        "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    language: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, text), "lm_head.weight": (32000, text), "model.norm.weight": (text,),
    }  # fmt: skip
    for layer in range(32):
        name = f"model.layers.{layer}"
        language |= {f"{name}.self_attn.{x}_proj.weight": (text, text) for x in "qkvo"}
        language |= {f"{name}.mlp.{x}_proj.weight": (11008, text) for x in ("gate", "up")}
        language |= {
            f"{name}.mlp.down_proj.weight": (text, 11008), f"{name}.input_layernorm.weight": (text,),
            f"{name}.post_attention_layernorm.weight": (text,), f"{name}.self_attn.rotary_emb.inv_freq": (64,),
        }  # fmt: skip
    builders.sparse_checkpoint(folder / "llama-7b-hf", config, language, "F16")
    if clip:
        tower = full_size.published_tower(folder / "clip-vit-large-patch14")
        settings = json.loads((tower / "config.json").read_text())
        (tower / "config.json").write_text(json.dumps({**settings, "hidden_act": "quick_gelu"}))
    return folder


LANGUAGE = 2 * 32003 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
PERCEIVER = (
    64 * 1024 + 6 * (4 * 1024 + 512 * 1024 + 1024**2 + 1024 * 512 + 2 * 1024 + 2 * 4096 * 1024) + 2 * 1024
)
BLOCK = 2 * 4096 + 512 * 4096 + 1024**2 + 4096 * 512 + 2 + 2 * 4096 + 2 * 16384 * 4096
VIT = 1024 + 3 * 14**2 * 1024 + 4 * 1024 + 24 * (4 * (1024**2 + 1024) + 4 * 1024 + 2 * 4096 * 1024 + 5 * 1024)


@pytest.mark.parametrize(
    ("image_size", "grid"), [(None, 16), (224, 16), (336, 24)], ids=["default", "224", "336"]
)
def test_the_published_checkpoint_is_covered_tensor_by_tensor(
    tmp_path: Path, image_size: int | None, grid: int
) -> None:
    source, encoder = published(tmp_path / "host"), full_size.published_tower(tmp_path / "mgll")
    checkpoint, med_flamingo, _ = open_checkpoint(source)
    plan = med_flamingo.plan(checkpoint, inspect_tower(encoder), image_size)
    weights = LANGUAGE + PERCEIVER + 8 * BLOCK + VIT + 1024 * (1 + grid**2)
    full_size.check_full_size(plan, checkpoint, weights=weights)
    assert (plan.before.tokens, plan.after.tokens, plan.after.grid) == (64, 64, grid)
    assert plan.image_token_id == 32001


def test_the_published_checkpoint_converts_as_it_is(tmp_path: Path) -> None:
    source = published(tmp_path / "host")
    checkpoint, med_flamingo, _ = open_checkpoint(source)
    plan = med_flamingo.plan(checkpoint)
    full_size.check_full_size(
        plan, checkpoint, weights=LANGUAGE + PERCEIVER + 8 * BLOCK + VIT + 1024 * (1 + 16**2)
    )
    assert plan.after == plan.before
    assert plan.after.activation == "quick_gelu"
    assert plan.after.resize == "crop"
    assert plan.config["text_config"]["eos_token_id"] == [2, 32000]
