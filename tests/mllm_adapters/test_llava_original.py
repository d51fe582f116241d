"""LLaVA and LLaVA-Med as their authors published them: weights, vocabulary, tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)

from mgll_encoder import load_tower
from mgll_encoder.common.errors import BadDataError, NotFoundError
from mllm_adapters import load_mllm
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.swap.apply import apply_plan
from tests import builders
from tests.mllm_adapters.llava_checkpoints import (
    HOSTS,
    convert,
    original_llava,
    with_sentencepiece,
)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_converted_on_disk_is_what_is_converted_in_memory(
    host: str, golden: Path, tmp_path: Path
) -> None:
    source = original_llava(golden, host, tmp_path / "original")
    family = open_checkpoint(source)[1]
    assert convert(source, tmp_path / "converted").layout == "original"
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = processor(text=["<image>\nWhich?"], images=[Image.new("RGB", (60, 30))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == model.config.image_seq_length
    direct, own = load_mllm(source)
    assert own is not None
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, direct(**batch).logits, atol=1e-5, rtol=0)
    again, family_again, layout_again = open_checkpoint(tmp_path / "converted")
    assert (family_again.spec.name, layout_again) == (family.spec.name, "transformers")
    assert again.config["model_type"] == "llava"


def test_a_projector_in_its_own_file_is_found(golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original", drop_projector=True)
    with pytest.raises(NotFoundError, match=r"no projector, neither in its shards nor as mm_projector\.bin"):
        load_mllm(source)
    original, _, _ = open_checkpoint(golden / "llava" / "checkpoint")
    state = {name: original.read(name) for name in original.tensors if "mm_projector" in name}
    torch.save(state, source / "mm_projector.bin")
    model, _ = load_mllm(source)
    expected = state["model.mm_projector.2.weight"]
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, expected)


def test_the_language_model_is_the_original_one(golden: Path, tmp_path: Path) -> None:
    """Rope base and grouped heads survive: text-only logits equal those of the plain language model."""
    source = original_llava(golden, "llava", tmp_path / "original", safetensors=True)
    model, _ = load_mllm(source, dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    rows = model.get_input_embeddings().num_embeddings
    settings = {name: config[name] for name in same}
    lm = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope, vocab_size=rows)).eval()
    state = load_file(source / "model.safetensors")
    state = {k: v for k, v in state.items() if "mm_projector" not in k and "vision_tower" not in k}
    state["model.embed_tokens.weight"] = model.get_input_embeddings().weight.detach()
    state["lm_head.weight"] = model.lm_head.weight.detach()
    lm.load_state_dict(state)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, lm(input_ids=ids).logits)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_a_trained_tower_in_the_shards_counts_where_the_original_code_reads_it(
    host: str, trained: bool, golden: Path, tmp_path: Path
) -> None:
    """LLaVA takes it if told that it was trained; LLaVA-Med always reads the tower that it names."""
    source = original_llava(golden, host, tmp_path / "original", safetensors=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "unfreeze_mm_vision_tower": trained}))
    named = load_tower(source / "towers" / "clip").model.state_dict()
    weights = load_file(source / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.vision_model.{k}": v + 1 for k, v in named.items()}
    save_file({**weights, **inside}, source / "model.safetensors", metadata={"format": "pt"})
    found = load_mllm(source, dtype=torch.float32)[0].model.vision_tower.embeddings.class_embedding
    shift = 1 if trained and host == "llava" else 0
    torch.testing.assert_close(found, named["embeddings.class_embedding"] + shift)


def test_weights_say_how_large_the_vocabulary_is(golden: Path, tmp_path: Path) -> None:
    """Fine-tunes with added tokens often keep the old vocab_size in their config.json."""
    source = original_llava(golden, "llava", tmp_path / "original")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    model, processor = load_mllm(source)
    assert model.config.text_config.vocab_size == len(builders.byte_tokenizer())
    assert model.config.image_token_index == processor.image_token_id


def test_dtype_is_the_language_models_not_that_of_the_first_tensor(golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original", safetensors=True)
    weights = {k: v.half() for k, v in load_file(source / "model.safetensors").items()}
    first = min(weights, key=lambda name: "embed_tokens" in name)
    save_file({**weights, first: weights[first].float()}, source / "model.safetensors")
    assert open_checkpoint(source)[1].plan(open_checkpoint(source)[0]).config["dtype"] == "float16"


@pytest.mark.parametrize("host", HOSTS)
def test_text_is_cut_as_the_sentencepiece_model_cuts_it(host: str, golden: Path, tmp_path: Path) -> None:
    source = with_sentencepiece(golden, host, tmp_path / "original")
    reference = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint)
    apply_plan(plan, family, checkpoint, tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    text = "USER: Which disease?\nA. Glaucoma ASSISTANT:"
    assert processor.tokenizer(text).input_ids == [1, *reference.encode(text)]
    image = processor(text=["USER: <image>\nWhich"], images=[Image.new("RGB", (9, 9))])["input_ids"][0]
    assert image.count(processor.image_token_id) == plan.after.tokens


def test_a_tokenizer_that_would_be_misread_is_refused(golden: Path, tmp_path: Path) -> None:
    """Under a foreign class the first word loses its space, silently; transformers' AutoTokenizer does so."""
    source = with_sentencepiece(golden, "llava", tmp_path / "original", tokenizer_class="")
    with pytest.raises(BadDataError, match="tokenizes differently from its SentencePiece model"):
        load_mllm(source)
