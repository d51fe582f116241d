"""What LLaVA and LLaVA-Med are asked, word by word, and that processor and model can learn from it and answer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.score import Scorer
from mllm_adapters import load_mllm
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import AnswerCollator, encode, prepare_examples
from tests import builders
from tests.mllm_adapters.families import llava_qwen2
from tests.mllm_adapters.llava_checkpoints import convert, first_llava, original_llava

PROMPTS = Path(__file__).parent / "prompts"

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "B"}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]


class Asked(NamedTuple):
    """A converted checkpoint that holds everything."""

    name: str
    folder: Path
    plan: Plan
    model: Any
    processor: Any


@pytest.fixture(scope="module", params=["llava", "llava-med", "llava-med-v1.0", "llava-qwen2"])
def asked(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("asked")
    if request.param == "llava-med-v1.0":
        source = first_llava(folder / "source")
    elif request.param == "llava-qwen2":
        source = llava_qwen2.with_tokenizer(folder / "source")
    else:
        source = original_llava(golden, request.param.replace("-", "_"), folder / "source")
    plan = convert(source, folder / "out")
    model, processor = load_mllm(folder / "out", dtype=torch.float32)
    return Asked(request.param, folder / "out", plan, model, processor)


def test_the_prompt_is_the_originals(asked: Asked) -> None:
    """Frozen: a one-image question, its answer, and another question."""
    stock = AutoProcessor.from_pretrained(asked.folder)
    frozen = (PROMPTS / f"{asked.name}.txt").read_text()
    assert stock.apply_chat_template(MESSAGES, add_generation_prompt=True) == frozen
    assert open_checkpoint(asked.folder)[1].spec.name == asked.plan.family
    assert asked.name.startswith(asked.plan.family)


def test_a_real_picture_gets_as_many_placeholders_as_tokens(asked: Asked) -> None:
    prompt = asked.processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    batch = asked.processor(text=[prompt], images=[Image.new("RGB", (60, 30))], return_tensors="pt")
    assert (batch["input_ids"] == asked.plan.image_token_id).sum() == asked.plan.after.tokens
    with torch.no_grad():
        assert torch.isfinite(asked.model(**batch).logits).all()


def test_it_learns_from_answers_only(asked: Asked, tmp_path: Path) -> None:
    picture = builders.picture(tmp_path / "images", "a.png")
    rows = [
        {"image": picture.name, "conversations": [
            {"from": "human", "value": "<image>\nWhich disease?"}, {"from": "gpt", "value": answer},
        ]}
        for answer in ("Glaucoma", "No disease")
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    corpus = read_corpus(tmp_path / "train.json", picture.parent)
    examples, counts = prepare_examples(corpus, asked.processor, max_length=1024, text_only=False)
    assert counts.kept == 2
    encoded = [encode(example, picture.parent, asked.processor) for example in examples]
    learnt = encoded[0]["input_ids"][encoded[0]["labels"] != -100]
    end = {"llava-med-v1.0": "###", "llava-qwen2": "<|endoftext|>"}.get(asked.name, "</s>")
    assert asked.processor.tokenizer.decode(learnt).strip() == f"Glaucoma{end}"
    batch = AnswerCollator(asked.processor.tokenizer.pad_token_id)(encoded)
    assert torch.isfinite(asked.model(**batch).loss)


def test_it_answers_a_question_with_a_letter(asked: Asked) -> None:
    item = MCQItem(
        id="1", images=["a.png"], question="Which?", options=["Glaucoma", "Myopia"], answer=0, category="g"
    )
    scorer = Scorer(asked.model, asked.processor)
    (score,) = scorer.score([item], [[Image.new("RGB", (40, 40))]])
    assert sum(score.probabilities) == pytest.approx(1)
