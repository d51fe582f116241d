"""An InstructBLIP with new eyes reads, learns and answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
)

import mllm_adapters.auto  # noqa: F401
from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mllm_adapters import load_mllm
from mllm_adapters.core.stages import apply_stage
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import IGNORED, AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower
from tests.mllm_adapters.tiny_instructblip import QUESTION, swap, text_tokenizer, tiny_instructblip

PROMPTS = Path(__file__).parent / "prompts"


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


def test_the_prompt_is_image_and_question(swapped: SimpleNamespace) -> None:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
    prompt = swapped.processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == (PROMPTS / "instructblip.txt").read_text().removesuffix("\n")
    conversation += [{"role": "assistant", "content": [{"type": "text", "text": "B"}]}]
    assert swapped.processor.apply_chat_template(conversation) == f"{prompt} B</s>"


def test_visual_tokens_come_before_the_token_that_begins_a_text(swapped: SimpleNamespace) -> None:
    processor = AutoProcessor.from_pretrained(swapped.out)
    assert type(processor) is type(swapped.processor)
    image = Image.new("RGB", (50, 40), (200, 80, 40))
    one = processor(images=[image], text=[f"<image>{QUESTION}"], return_tensors="pt")
    placeholder = swapped.plan.image_token_id
    letters = text_tokenizer("llama")(QUESTION).input_ids
    assert letters[0] == 2
    assert one["input_ids"].tolist() == [[placeholder] * 5 + letters]
    assert one["pixel_values"].shape == (1, 3, 56, 56)
    read = processor.qformer_tokenizer.decode(one["qformer_input_ids"][0])
    assert read.startswith("[CLS]")
    assert one["qformer_input_ids"].shape == (1, 24), "cut to what the Q-Former has positions for"
    assert "image" not in processor.qformer_tokenizer.decode(
        processor(images=[image], text=["<image>a b"], return_tensors="pt")["qformer_input_ids"][0]
    )
    stock_style = processor(images=image, text=QUESTION, return_tensors="pt")
    assert torch.equal(stock_style["input_ids"], one["input_ids"])
    bare = processor(images=[image], text=["<image>"], add_special_tokens=False)
    assert bare["input_ids"] == [[placeholder] * 5]
    with pytest.raises(ValueError, match="put <image> before the text"):
        processor(images=[image], text=["see <image>"])


def test_a_batch_of_two_texts_gives_what_each_gives_alone(swapped: SimpleNamespace) -> None:
    images = [Image.new("RGB", (50, 40), color) for color in ((200, 80, 40), (0, 90, 250))]
    texts = ["<image>a b c?", "<image>what is it?"]
    batch = swapped.processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert batch["qformer_attention_mask"].sum(dim=1).tolist() != [batch["qformer_input_ids"].shape[1]] * 2
    with torch.no_grad():
        together = swapped.model(**batch).logits[:, -1]  # padded on the left
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            alone = swapped.model(
                **swapped.processor(images=[image], text=[text], return_tensors="pt")
            ).logits
            torch.testing.assert_close(together[row], alone[0, -1], atol=1e-4, rtol=0)


def conversation(question: str, answer: str, image: str | None = "a.png") -> Conversation:
    tag = "<image>\n" if image else ""
    turns = [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return Conversation.model_validate({"id": question, "image": image, "conversations": turns})


@pytest.mark.parametrize("which", ["stock", "swapped"])
def test_it_learns_from_conversations_and_the_qformer_never_reads_an_answer(
    which: str, stock: Path, swapped: SimpleNamespace, tmp_path: Path
) -> None:
    model, processor = (
        load_mllm(stock, dtype=torch.float32) if which == "stock" else (swapped.model, swapped.processor)
    )
    builders.picture(tmp_path, "a.png")
    rows = [conversation("a b?", "zzz"), conversation("c d e f?", "yes it is")]
    examples, counts = prepare_examples(
        Corpus(tmp_path / "x.json", tmp_path, rows, {"a.png": (40, 40)}), processor, 64, False
    )
    assert counts.kept == 2
    encoded = [encode(example, tmp_path, processor) for example in examples]
    learnt = encoded[0]["labels"][encoded[0]["labels"] != IGNORED]
    assert processor.tokenizer.decode(learnt) == " zzz</s>"
    assert encoded[0]["input_ids"][:6].tolist() == [processor.image_token_id] * 5 + [2]
    assert (
        processor.qformer_tokenizer.decode(encoded[0]["qformer_input_ids"][0], skip_special_tokens=True)
        == "a b ?"
    )
    batch = AnswerCollator(processor.tokenizer.pad_token_id)(encoded)
    assert batch["qformer_input_ids"].shape[0] == 2
    stage = apply_stage(model)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert any(name.endswith("crossattention.attention.key.weight") for name in stage.names)
    plain = {name: value for name, value in batch.items() if name not in ("logits_to_keep", "shift_labels")}
    torch.testing.assert_close(model(**plain).loss, loss)
    model.zero_grad(set_to_none=True)


def test_text_alone_will_do(swapped: SimpleNamespace, tmp_path: Path) -> None:
    text = swapped.processor(text=["Which disease is it?"], return_tensors="pt")
    assert "qformer_input_ids" not in text
    with torch.no_grad():
        found = swapped.model(**text).logits
        expected = swapped.model.language_model(**text).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["stock", "swapped"])
def test_eval_mcq_can_put_questions_to_it(which: str, stock: Path, swapped: SimpleNamespace) -> None:
    model, processor = (
        load_mllm(stock, dtype=torch.float32) if which == "stock" else (swapped.model, swapped.processor)
    )
    scorer = Scorer(model, processor)
    items = [
        MCQItem(
            id=str(i),
            images=["a.png"],
            question=QUESTION[: 20 + i],
            options=["Glaucoma", "Myopia"],
            answer=0,
            category="x",
        )
        for i in range(2)
    ]
    scorer.check_options(items)
    images = [[Image.new("RGB", (50, 40), color)] for color in ((200, 80, 40), (0, 90, 250))]
    together = scorer.score(items, images)
    for item, image, score in zip(items, images, together, strict=True):
        alone = scorer.score([item], [image])[0]
        assert score.probabilities == pytest.approx(alone.probabilities, abs=1e-4)


def test_two_images_of_one_text_are_each_seen_with_its_instruction(swapped: SimpleNamespace) -> None:
    images = [Image.new("RGB", (50, 40), color) for color in ((200, 80, 40), (0, 90, 250))]
    batch = swapped.processor(images=images, text=["<image><image>a b?"], return_tensors="pt")
    assert batch["input_ids"][0, :11].tolist() == [swapped.plan.image_token_id] * 10 + [2]
    assert torch.equal(batch["qformer_input_ids"][0], batch["qformer_input_ids"][1])
    with torch.no_grad():
        seen = swapped.model(**batch).logits
        turned = swapped.model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}).logits
    assert (seen - turned).abs().max() > 1e-4
