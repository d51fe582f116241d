"""InternVL's tokenizers, prompts, tiles and processors."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

import mllm_adapters.auto  # noqa: F401
from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mllm_adapters import load_mllm
from mllm_adapters.core.contract import Target
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import AnswerCollator, Collator, encode, prepare_examples
from tests import builders
from tests.mllm_adapters.families.internvl_folders import FLAVOURS, QUESTION, swap, talking
from tests.mllm_adapters.llava_checkpoints import a_tower

SNAPSHOT = Path(__file__).parent / "prompts" / "internvl.txt"


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
    score = Scorer(chat.model, chat.processor).score([item], [[Image.open(chat.work / "images" / "eye.png")]])
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
