"""Any model that stock transformers loads is a row of the table: its letters are those of its own pipeline."""

import json
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval_mcq import run
from eval_mcq.backends.stock import StockModel, is_stock
from eval_mcq.items.schema import LETTERS, load_bench
from eval_mcq.scoring.prompt import Ask, order, render
from eval_mcq.scoring.score import Scorer
from mgll_encoder.common.errors import (
    InvalidArgumentError,
    MismatchError,
    UnsupportedCheckpointError,
)
from mgll_encoder.common.images import open_image
from tests.eval_mcq.helpers import DISEASES, question, write_bench
from tests.eval_mcq.stock_models import STOCK

NUM2WORDS = find_spec("num2words") is not None
"""What the processor of SmolVLM imports."""

ARCHITECTURES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "smolvlm" and not NUM2WORDS, reason="no num2words"))
    for name in STOCK
]
SHAPES = [(28, 28), (70, 30), (31, 90), (120, 118), (56, 28), (40, 200)]
"""Pictures of different tiles in every architecture that has tiles."""


@cache
def _place() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="stock-")


@cache
def stock(name: str) -> Path:
    """The tiny model of an architecture; written once."""
    return STOCK[name](Path(_place().name) / name)


@cache
def reference(name: str):
    """Its stock model and processor, loaded as transformers' documentation has it."""
    folder = stock(name)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture
def bench(tmp_path) -> Path:
    """Questions of different lengths, with two to four options, on noisy pictures of different shapes."""
    generator = torch.Generator().manual_seed(3)
    questions = []
    for i in range(8):
        width, height = SHAPES[i % len(SHAPES)]
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        options = [f"drusen{' here' * i}", "a cataract", "nothing", "much"][: 2 + i % 3]
        questions.append(
            question(
                f"q{i}", f"{i}.png", question="What is seen" + " here" * (3 * i % 5) + "?", options=options,
                answer=i % 2, category=DISEASES[i % 2], patient=f"p{i}",
            )
        )  # fmt: skip
    return write_bench(tmp_path / "bench.jsonl", questions, categories=["AMD", "Cataract"])


def asked(bench: Path) -> list[tuple[Ask, list[Image.Image]]]:
    loaded = load_bench(bench)
    return [
        (Ask(item, i % len(item.options)), [open_image(path) for path in loaded.image_paths(item)])
        for i, item in enumerate(loaded.items)
    ]


def by_hand(name: str, ask: Ask, images: list[Image.Image]) -> list[float]:
    """Letters' probabilities from the stock pipeline: its chat template with the picture in it, one forward pass."""
    model, processor = reference(name)
    content = [
        *({"type": "image", "image": image} for image in images),
        {"type": "text", "text": render(ask.item, ask.rotation)},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].double()
    letters = LETTERS[: len(ask.item.options)]
    ids = processor.tokenizer.convert_tokens_to_ids(list(letters))
    shown = logits[ids].softmax(dim=0).tolist()
    places = order(len(shown), ask.rotation)
    return [shown[places.index(option)] for option in range(len(shown))]


def scores(scorer: Scorer, questions) -> list[list[float]]:
    prepared = [scorer.prepare([ask], images) for ask, images in questions]
    return [score.probabilities for (score,) in scorer.answer(prepared)]


def off(one, other) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_letters_are_those_of_the_stock_pipeline_in_a_batch_and_alone(name, bench):
    questions = asked(bench)
    expected = [by_hand(name, ask, images) for ask, images in questions]
    scorer = StockModel(stock(name), name).load()
    together = scores(scorer, questions)
    alone = [scores(scorer, [one])[0] for one in questions]
    assert scorer.engine.together, "padding changed its numbers"
    assert off(together, expected) < 1e-5
    assert off(alone, expected) < 1e-5
    # negative control: the pictures, the order of the options and the words all matter at this tolerance
    turned = [(ask, [image.rotate(180) for image in images]) for ask, images in questions]
    assert off(scores(scorer, turned), expected) > 1e-3
    unrotated = [(Ask(ask.item), images) for ask, images in questions]
    assert off(scores(scorer, unrotated), expected) > 1e-3


@pytest.mark.parametrize("name", ["idefics3", "gemma3", "mllama"])
def test_likelihoods_of_option_texts_are_those_of_the_stock_model(name, bench):
    questions = asked(bench)[:3]
    scorer = StockModel(stock(name), name, "options").load()
    model, processor = reference(name)
    tokens = processor.tokenizer
    prepared = [scorer.prepare([ask], images) for ask, images in questions]
    for (ask, images), (score,) in zip(questions, scorer.answer(prepared), strict=True):
        prompt = scorer.prompt(ask.item, ask.rotation)
        for option, found, count in zip(ask.item.options, score.log_likelihoods, score.tokens, strict=True):
            text = f"{prompt}{scorer.writer.lead}{option}"
            special = not prompt.startswith(tokens.bos_token)
            inputs = processor(text=text, images=[images], return_tensors="pt", add_special_tokens=special)
            tail = tokens(f"{scorer.writer.lead}{option}", add_special_tokens=False)["input_ids"]
            assert inputs["input_ids"][0, -len(tail) :].tolist() == tail
            with torch.no_grad():
                log_probabilities = model(**inputs).logits[0].double().log_softmax(dim=-1)
            by_hand = sum(
                float(log_probabilities[place - 1, token])
                for place, token in enumerate(tail, start=len(log_probabilities) - len(tail))
            )
            assert (found, count) == (pytest.approx(by_hand, abs=1e-3), len(tail))


@pytest.mark.parametrize("name", ["llava-onevision", "gemma3"])
def test_replies_of_a_left_padded_batch_are_those_of_each_question_alone(name, bench):
    (short, images), (long, _) = asked(bench)[0], asked(bench)[3]
    scorer = StockModel(stock(name), name, "generate").load()
    model, processor = reference(name)
    (together,) = scorer.answer([scorer.prepare([short, long], images)])
    for ask, score in zip([short, long], together, strict=True):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [
                {"type": "image", "image": images[0]}, {"type": "text", "text": render(ask.item, ask.rotation)}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        written = model.generate(**inputs, max_new_tokens=32, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert score.reply == processor.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert together[0].reply != together[1].reply


def test_a_model_whose_numbers_padding_changes_is_asked_one_at_a_time(bench, caplog):
    caplog.set_level("INFO")
    questions = asked(bench)
    expected = [by_hand("llava-next", ask, images) for ask, images in questions]
    scorer = StockModel(stock("llava-next"), "llava-next").load()

    def disturb(module, given, found):
        return found + 5 * torch.linspace(-1, 1, found.shape[-1]) if len(found) > 1 else found

    scorer.model.get_output_embeddings().register_forward_hook(disturb)
    assert off(scores(scorer, questions), expected) < 1e-5
    assert off(scores(scorer, questions), expected) < 1e-5
    assert "one prompt at a time" in caplog.text


def test_a_row_of_a_stock_model_is_recorded_resumed_and_never_mixed(bench, tmp_path):
    folder = stock("idefics3")
    assert is_stock(folder)
    run(folder, bench, tmp_path / "run", limit=4, batch_size=4)
    done = run(folder, bench, tmp_path / "run", batch_size=4)
    whole = run(folder, bench, tmp_path / "whole", batch_size=4)
    assert done.complete
    assert done.rows == whole.rows
    told = done.record.backend
    assert (told.name, told.sent["class"]) == ("transformers", "Idefics3ForConditionalGeneration")
    assert len(told.sent["chat_template_sha256"]) == len(told.sent["config_sha256"]) == 64
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    with pytest.raises(MismatchError, match=r"different backend \(.*, now "):
        run(other, bench, tmp_path / "run", batch_size=4)


def test_a_family_of_ours_is_not_stock(tiny_llava):
    assert not is_stock(tiny_llava)


def test_a_folder_with_code_of_its_own_is_refused_and_nothing_runs(bench, tmp_path):
    folder = shutil.copytree(stock("idefics3"), tmp_path / "model")
    mark = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: ...\n")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | {"auto_map": {"AutoConfig": "evil.Evil"}}))
        with pytest.raises(UnsupportedCheckpointError, match=rf"{name} names Python code .*never run"):
            run(folder, bench, tmp_path / "run")
        file.write_text(before)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_would_answer_with_random_weights_or_an_unknown_prompt_is_refused(bench, tmp_path):
    folder = shutil.copytree(stock("idefics3"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(MismatchError, match=r"missing tensors.*random weights"):
        run(folder, bench, tmp_path / "run")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedCheckpointError, match="no chat template"):
        run(folder, bench, tmp_path / "run")


@pytest.mark.parametrize(("setting", "value"), [("load_in_4bit", True), ("engine", "prefix")])
def test_what_is_only_for_families_is_refused(bench, tmp_path, setting, value):
    with pytest.raises(InvalidArgumentError, match=f"`{setting}"):
        run(stock("idefics3"), bench, tmp_path / "run", **{setting: value})
