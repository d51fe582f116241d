"""What is special about InternVL: its pixel shuffle, its tokenizers, its tiles, its sizes and its relatives."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from eval_mcq.schema import MCQItem
from eval_mcq.score import LetterScorer
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import UserError
from mgll_encoder.preprocess import image_processor
from mllm_adapters import load_mllm
from mllm_adapters.apply import apply_plan
from mllm_adapters.contract import Plan, Target
from mllm_adapters.conversations import read_corpus
from mllm_adapters.examples import AnswerCollator, Collator, encode, prepare_examples
from mllm_adapters.registry import open_checkpoint
from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower

QUESTION = "Which disease does this image show?"

ALPHABET = "".join(map(chr, range(32, 127)))

SNAPSHOT = Path(__file__).parent / "prompts" / "internvl.txt"


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def swap(
    source: Path, out: Path, tower: Path | None, target: Target = "own", size: int | None = None
) -> Plan:
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(tower) if tower else None, size, target)
    apply_plan(plan, family, checkpoint, out)
    return plan


# --- the tower --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_first_releases_see_their_tokens_column_by_column(golden: Path, tmp_path: Path) -> None:
    """``ps_version`` v1: the same tokens in transposed order, before and after a swap."""
    source = golden / "internvl" / "checkpoint"
    expected = load_file(golden / "internvl" / "expected.safetensors")
    grid = int(expected["visual_tokens"].shape[1] ** 0.5)
    about = json.loads((source / "config.json").read_text())
    turn = {"v1": "v2", "v2": "v1"}[about["ps_version"]]
    other = edited(source, tmp_path / "other", lambda c: c.update(ps_version=turn, pad2square=False))
    model, _ = load_mllm(other, dtype=torch.float32)
    assert model.config.model_type == {"v1": "mgll_internvl", "v2": "internvl"}[turn]
    found = model.get_image_features(expected["pixel_values"]).pooler_output
    turned = expected["visual_tokens"].unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(found, turned, atol=1e-4, rtol=0)
    assert (found - expected["visual_tokens"]).abs().max() > 1e-3, "negative control: the order matters"

    plan = swap(
        edited(source, tmp_path / "v1", lambda c: c.update(ps_version="v1")),
        tmp_path / "swapped",
        a_tower(tmp_path / "tower"),
    )
    assert plan.config["ps_version"] == "v1"
    assert any("column by column" in note for note in plan.notes)
    silent = edited(source, tmp_path / "silent", lambda c: c.pop("ps_version"))
    assert load_mllm(silent)[0].config.ps_version == "v1", "the original code's default"


@torch.no_grad()
def test_another_input_size_resamples_the_position_table(golden: Path, tmp_path: Path) -> None:
    """As the original does at run time; here, the stock model's own interpolation is the reference."""
    source = golden / "internvl_qwen2" / "checkpoint"
    vision = json.loads((source / "config.json").read_text())["vision_config"]
    size = 2 * vision["image_size"]
    model, _ = load_mllm(
        edited(source, tmp_path / "big", lambda c: c.update(force_image_size=size)), dtype=torch.float32
    )
    native, _ = load_mllm(
        edited(source, tmp_path / "same", lambda c: c.update(force_image_size=None)), dtype=torch.float32
    )
    assert model.config.image_seq_length == 4 * native.config.image_seq_length
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found, expected = (m.model.vision_tower(pixels).last_hidden_state for m in (model, native))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_tower_of_another_width_gets_a_new_norm_and_first_layer(golden: Path, tmp_path: Path) -> None:
    """As with InternViT-6B: 4 x 3200 -> 4 x 1024; the second layer stays."""
    source = golden / "internvl" / "checkpoint"
    tower = a_tower(tmp_path / "tower", width=24)
    plan = swap(source, tmp_path / "swapped", tower)
    fates = {name.rpartition(".")[2]: fate for name, fate in plan.readers.items()}
    assert fates.keys() == {"layer_norm", "linear_1"}
    assert all("re-initialised" in fate for fate in fates.values())
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    projector, (checkpoint, _, _) = model.model.multi_modal_projector, open_checkpoint(source)
    assert torch.equal(projector.layer_norm.weight, torch.ones(4 * 24))
    assert not projector.linear_1.bias.any()
    assert projector.linear_1.weight.std() > 0
    assert torch.equal(projector.linear_2.weight, checkpoint.read("mlp1.3.weight").float())


@torch.no_grad()
def test_the_swapped_model_is_tower_then_shuffle_then_projector(golden: Path, tmp_path: Path) -> None:
    source = edited(
        golden / "internvl_qwen2" / "checkpoint", tmp_path / "v2", lambda c: c.update(ps_version="v2")
    )
    swap(source, tmp_path / "swapped", a_tower(tmp_path / "tower"))
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    grid = side // model.config.vision_config.patch_size
    rows = seen.unflatten(1, (grid // 2, 2, grid // 2, 2))  # [1, row, down, column, right, C]
    joined = rows.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
    checkpoint, _, _ = open_checkpoint(source)
    projector = {k: checkpoint.read(k) for k in checkpoint.tensors if k.startswith("mlp1.")}
    inner = torch.nn.functional.layer_norm(
        joined, joined.shape[-1:], projector["mlp1.0.weight"], projector["mlp1.0.bias"]
    )
    inner = torch.nn.functional.gelu(inner @ projector["mlp1.1.weight"].T + projector["mlp1.1.bias"])
    expected = inner @ projector["mlp1.3.weight"].T + projector["mlp1.3.bias"]
    found = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_converted_checkpoint_takes_the_tower_as_the_original_does(golden: Path, tmp_path: Path) -> None:
    """What the hub calls ``-hf``: read as it is, swapped to the very same model."""
    original, tower = golden / "internvl_internlm2" / "checkpoint", a_tower(tmp_path / "tower")
    source = edited(original, tmp_path / "v2", lambda c: c.update(ps_version="v2", pad2square=False))
    swap(source, tmp_path / "converted", None)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["model_type"] == "internvl"
    assert config["tie_word_embeddings"] is False, "the stock class would tie them by default"
    plans = [swap(source, tmp_path / "direct", tower), swap(tmp_path / "converted", tmp_path / "via", tower)]
    states = [load_mllm(tmp_path / name, dtype=torch.float32)[0].state_dict() for name in ("direct", "via")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert plans[0].after == plans[1].after


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tied"), [(Qwen3Config, False), (Qwen2Config, True), (LlamaConfig, False)])
def test_other_language_models_keep_their_logits(
    kind: type[Any], tied: bool, golden: Path, tmp_path: Path
) -> None:
    """Qwen3 (InternVL 3.5), a tied Qwen2, and a LLaMA with biases; no golden vectors exist for these."""
    checkpoint, _, _ = open_checkpoint(golden / "internvl_qwen2" / "checkpoint")
    width = checkpoint.tensors["mlp1.3.weight"].shape[0]
    text = kind(
        vocab_size=90, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        **({"attention_bias": True} if kind is LlamaConfig else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(text).eval()
    state = {n: checkpoint.read(n) for n in checkpoint.tensors if not n.startswith("language_model.")}
    state |= {f"language_model.{n}": value.clone() for n, value in language_model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    llm = {**text.to_dict(), "rope_theta": 5e5, "architectures": [type(language_model).__name__]}
    llm = {name: value for name, value in llm.items() if name != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps({**checkpoint.config, "llm_config": llm}))
    model, _ = load_mllm(tmp_path, dtype=torch.float32)
    ids = torch.arange(5, 30)[None]
    found = model(input_ids=ids).logits[..., :90]
    torch.testing.assert_close(found, language_model(input_ids=ids).logits, atol=1e-5, rtol=0)
    tower = a_tower(tmp_path / "tower")
    swap(tmp_path, tmp_path / "swapped", tower)
    after, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    assert (after.lm_head.weight is after.get_input_embeddings().weight) == tied
    torch.testing.assert_close(after(input_ids=ids).logits[..., :90], found, atol=1e-5, rtol=0)


def test_a_llava_has_as_many_tokens_and_says_that_its_projector_is_new(golden: Path, tmp_path: Path) -> None:
    source = golden / "internvl_qwen2" / "checkpoint"
    plan = swap(source, tmp_path / "llava", a_tower(tmp_path / "tower"), "llava")
    assert plan.after.tokens == plan.before.tokens
    assert plan.after.image_size == int(plan.before.tokens**0.5) * plan.after.patch_size
    assert "re-initialised" in plan.readers["multi_modal_projector.linear_1"]
    with pytest.raises(UserError, match="a LLaVA has a CLIP tower"):
        swap(source, tmp_path / "none", None, "llava")


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_tower_that_crops_or_pads_brings_its_image_processor(
    rule: str, golden: Path, tmp_path: Path
) -> None:
    source = talking(golden, "qwen2", tmp_path / "original")
    plan = swap(source, tmp_path / "swapped", a_tower(tmp_path / "tower", resize=rule))
    processor = AutoProcessor.from_pretrained(tmp_path / "swapped")
    photo = Image.effect_noise((80, 50), 60).convert("RGB")
    batch = processor(text=["<IMG_CONTEXT>"], images=[photo], return_tensors="pt")
    expected = image_processor(plan.after)(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert (batch["input_ids"] == plan.image_token_id).sum() == plan.after.tokens


# --- tokenizers, prompts, processors ----------------------------------------------------------------------

ADDED = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def sentencepiece(folder: Path, pieces: list[str], dummy_prefix: bool) -> int:
    """Train a SentencePiece model; how many pieces it has."""
    SentencePieceTrainer.train(
        sentence_iterator=iter([ALPHABET, QUESTION, "user assistant USER ASSISTANT Glaucoma Myopia system the"]),
        model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=False, add_dummy_prefix=dummy_prefix, user_defined_symbols=pieces,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return int(SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size())


def token_settings(ids: dict[str, int], **more: object) -> str:
    decoder = {
        str(i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                 "single_word": False}
        for token, i in ids.items()
    }  # fmt: skip
    return json.dumps({"added_tokens_decoder": decoder, **more})


def internlm2_files(folder: Path) -> dict[str, int]:
    """Its markers take the ids of unused pieces of the model, the others come after it; its class is remote code."""
    unused = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
    size = sentencepiece(folder, unused, dummy_prefix=False)
    reader = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {token: reader.piece_to_id(piece) for token, piece in zip(ADDED[:2], reversed(unused), strict=True)}
    ids |= {token: size + i for i, token in enumerate(ADDED[2:])}
    remote = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    more = {
        "additional_special_tokens": ADDED,
        "add_bos_token": True,
        "add_eos_token": False,
        "sp_model_kwargs": None,
    }
    settings = token_settings(ids, tokenizer_class="InternLM2Tokenizer", auto_map=remote, **ends, **more)
    (folder / "tokenizer_config.json").write_text(settings)
    (folder / "added_tokens.json").write_text(json.dumps({k: i for k, i in ids.items() if i >= size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({**ends, "additional_special_tokens": ADDED}))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('never run')\n")
    return ids


def qwen2_files(folder: Path) -> dict[str, int]:
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(alphabet))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ids = {token: len(alphabet) + i for i, token in enumerate(["<|endoftext|>", *ADDED])}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    settings = token_settings(ids, tokenizer_class="Qwen2Tokenizer", add_bos_token=False, **ends)
    (folder / "tokenizer_config.json").write_text(settings)
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    return ids


def llama_files(folder: Path) -> dict[str, int]:
    size = sentencepiece(folder, [], dummy_prefix=True)
    ids = {token: size + i for i, token in enumerate(ADDED)}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        token_settings(ids, tokenizer_class="LlamaTokenizer", **ends)
    )
    return ids


FLAVOURS = {
    "internlm2": ("internvl_internlm2", internlm2_files, "internlm2-chat"),
    "qwen2": ("internvl_qwen2", qwen2_files, "internvl2_5"),
    "llama": ("internvl", llama_files, "vicuna_v1.1"),
}


def talking(golden: Path, flavour: str, folder: Path, **changes: object) -> Path:
    """A golden checkpoint completed with a tokenizer, in one file, as small published ones are."""
    name, write, template = FLAVOURS[flavour]
    checkpoint, _, _ = open_checkpoint(golden / name / "checkpoint")
    state = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    folder.mkdir(parents=True)
    rows = max(write(folder).values()) + 3  # published embeddings are longer than their tokenizers
    for name in state:
        if name.endswith(
            ("embed_tokens.weight", "tok_embeddings.weight", "lm_head.weight", "language_model.output.weight")
        ):
            state[name] = state[name][torch.arange(rows) % state[name].shape[0]].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    usual = {"ps_version": "v2", "pad2square": False, "dynamic_image_size": True, "use_thumbnail": True}
    config = {**checkpoint.config, **usual, "template": template, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=FLAVOURS)
def chat(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    work = tmp_path_factory.mktemp("chat")
    source = talking(golden, request.param, work / "original")
    plan = swap(source, work / "swapped", a_tower(work / "tower"))
    model, processor = load_mllm(work / "swapped", dtype=torch.float32)
    decoder = json.loads((source / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(i) for i, token in decoder.items()}
    return SimpleNamespace(
        flavour=request.param, work=work, source=source, plan=plan, model=model, processor=processor, ids=ids
    )


def test_the_prompt_is_the_originals(chat: SimpleNamespace) -> None:
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = chat.processor.apply_chat_template(asked, add_generation_prompt=True)
    frozen = SNAPSHOT.read_text(encoding="utf-8").split("=== ")[1:]
    expected = dict(part.split("\n", 1) for part in frozen)
    assert prompt + "\n" == expected[chat.flavour]


def test_every_token_keeps_its_id(chat: SimpleNamespace) -> None:
    own = AutoProcessor.from_pretrained(chat.work / "swapped").tokenizer
    for token, i in chat.ids.items():
        assert own.convert_tokens_to_ids(token) == i, token
    assert chat.plan.image_token_id == chat.ids["<IMG_CONTEXT>"]
    text = f"<|im_start|>user\nA. {QUESTION}<|im_end|>"
    ids = own(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == chat.ids["<|im_start|>"]
    assert ids[-1] == chat.ids["<|im_end|>"]
    model = chat.source / "tokenizer.model"
    if model.is_file():
        reader = SentencePieceProcessor(model_file=str(model))
        assert own(QUESTION, add_special_tokens=False)["input_ids"] == reader.encode(QUESTION)
        assert own(QUESTION)["input_ids"] == [reader.bos_id(), *reader.encode(QUESTION)]
    assert own.decode(ids) == text


def test_no_code_of_the_source_is_copied(chat: SimpleNamespace) -> None:
    assert not list((chat.work / "swapped").glob("*.py"))
    assert "auto_map" not in (chat.work / "swapped" / "config.json").read_text()
    assert "auto_map" not in (chat.work / "swapped" / "tokenizer_config.json").read_text()


@torch.no_grad()
def test_processor_and_model_agree_on_a_picture(chat: SimpleNamespace) -> None:
    processor = AutoProcessor.from_pretrained(chat.work / "swapped")
    photo = Image.effect_noise((90, 40), 60).convert("RGB")
    batch = processor(text=[f"<IMG_CONTEXT>\n{QUESTION}"], images=[photo], return_tensors="pt")
    ids = batch["input_ids"][0]
    places = (ids == chat.plan.image_token_id).nonzero().flatten()
    assert len(places) == chat.plan.after.tokens == chat.model.config.image_seq_length
    assert ids[places[0] - 1] == chat.ids["<img>"]
    assert ids[places[-1] + 1] == chat.ids["</img>"]
    assert batch["pixel_values"].shape[0] == 1, "a wide picture is not cut into tiles"
    blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    assert (chat.model(**batch).logits - chat.model(**blank).logits).abs().max() > 1e-3


def test_it_can_be_trained_and_asked(chat: SimpleNamespace) -> None:
    builders.picture(chat.work / "images", "eye.png")
    rows = [{"id": "1", "image": "eye.png", "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "Glaucoma"}]}]  # fmt: skip
    (chat.work / "train.json").write_text(json.dumps(rows))
    corpus = read_corpus(chat.work / "train.json", chat.work / "images")
    examples, counts = prepare_examples(corpus, chat.processor, 2048, False)
    assert counts.kept == 1
    encoded = encode(examples[0], corpus.folder, chat.processor)
    answer = chat.processor.tokenizer.decode(encoded["labels"][encoded["labels"] != -100])
    stop = "</s>" if chat.flavour == "llama" else "<|im_end|>"
    assert answer.strip() == f"Glaucoma{stop}"
    pad = chat.processor.tokenizer.pad_token_id
    loss = chat.model(**AnswerCollator(pad)([encoded])).loss
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, chat.model(**Collator(pad)([encoded])).loss)
    item = MCQItem(
        id="1", images=["eye.png"], question=QUESTION, options=["Glaucoma", "Myopia"], answer=0, category="x"
    )
    score = LetterScorer(chat.model, chat.processor).score(
        [item], [[Image.open(chat.work / "images" / "eye.png")]]
    )
    assert sum(score[0].probabilities) == pytest.approx(1)


def test_generation_stops_where_an_answer_ends(chat: SimpleNamespace) -> None:
    stop = chat.processor.tokenizer.eos_token_id if chat.flavour == "llama" else chat.ids["<|im_end|>"]
    assert stop in chat.model.generation_config.eos_token_id


@torch.no_grad()
def test_a_conversion_loads_with_stock_processor_and_tiles(chat: SimpleNamespace) -> None:
    swap(chat.source, chat.work / "converted", None)
    processor = AutoProcessor.from_pretrained(chat.work / "converted")
    assert type(processor).__name__ == "InternVLProcessor"
    model, report = AutoModelForImageTextToText.from_pretrained(
        chat.work / "converted", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wide = Image.effect_noise((90, 30), 60).convert("RGB")
    prompt = f"<IMG_CONTEXT>\n{QUESTION}"
    batch = processor(text=[prompt], images=[wide], return_tensors="pt")
    tiles = len(batch["pixel_values"])
    assert tiles > 1, "three tiles side by side and a thumbnail"
    assert (batch["input_ids"] == model.config.image_token_id).sum() == tiles * model.config.image_seq_length
    direct, own = load_mllm(chat.source)
    assert torch.equal(
        own(text=[prompt], images=[wide], return_tensors="pt")["input_ids"], batch["input_ids"]
    )
    torch.testing.assert_close(model(**batch).logits, direct(**batch).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("target", ["own", "llava"])
def test_what_was_written_takes_another_tower_and_keeps_its_words(
    target: Target, chat: SimpleNamespace, tmp_path: Path
) -> None:
    """From the transformers layout, stock or ours, tokenizer, template and placeholder go on."""
    swap(chat.source, tmp_path / "stock", None)
    first = swap(chat.source, tmp_path / "first", chat.work / "tower", target)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    photo = Image.effect_noise((60, 40), 60).convert("RGB")
    given = []
    for name in ("first", "stock"):
        again = swap(tmp_path / name, tmp_path / f"{name}-again", chat.work / "tower", target)
        assert (again.after, again.image_token_id) == (first.after, first.image_token_id)
        for folder in (tmp_path / name,) * (name == "first") + (tmp_path / f"{name}-again",):
            processor = AutoProcessor.from_pretrained(folder)
            prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
            given.append(processor(text=[prompt], images=[photo], return_tensors="pt"))
    for other in given[1:]:
        assert torch.equal(other["input_ids"], given[0]["input_ids"])
        assert torch.equal(other["pixel_values"], given[0]["pixel_values"])


@torch.no_grad()
def test_a_llava_writes_the_marks_around_its_image(chat: SimpleNamespace) -> None:
    swap(chat.source, chat.work / "llava", chat.work / "tower", "llava")
    model, processor = load_mllm(chat.work / "llava", dtype=torch.float32)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    batch = processor(text=[prompt], images=[Image.new("RGB", (50, 40))], return_tensors="pt")
    ids = batch["input_ids"][0]
    places = (ids == model.config.image_token_id).nonzero().flatten()
    assert len(places) == model.config.image_seq_length
    assert ids[places[0] - 1] == chat.ids["<img>"]
    assert ids[places[-1] + 1] == chat.ids["</img>"]
    assert torch.isfinite(model(**batch).logits).all()
