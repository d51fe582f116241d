"""A small real LLaVA: a vision tower, an MLP projector and a small language model, trained to answer with letters.

The result is an ordinary transformers checkpoint. It is trained in three lessons with transformers' Trainer:
multiple choice about sentences, which needs no pixels, captions, and multiple choice about images. The tower
is frozen, and encodes every image once.
"""

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from mgll_encoder import load_tower
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, unknown_name
from mgll_encoder.common.files import check_free, new_folder
from mgll_encoder.common.library_bars import no_library_bars
from mgll_encoder.common.progress import counter
from mgll_encoder.common.trained_on import Training, trainings_of, write_trainings
from mllm_adapters.core.processing import llava_processor
from mllm_adapters.data.corpus import Corpus, read_corpus
from mllm_adapters.data.dataset import AnswerCollator, ConversationDataset, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.examples.assembly import assemble, tower_contract
from mllm_adapters.examples.curriculum import (
    Question,
    caption_lesson,
    question_lesson,
    read_question,
    word_lesson,
)
from mllm_adapters.examples.language_models import CHATML, LANGUAGE_MODELS, LanguageModelName, Speech
from mllm_adapters.feature_cache.cache import cache_features
from mllm_adapters.feature_cache.precompute import ComputeSettings
from mllm_adapters.training.trainer import FrozenTrainer

_logger = logging.getLogger(__name__)

RECORD = "teaching.json"


@dataclass(frozen=True)
class PracticeSettings:
    """Amount of training data and learning rates for a language model.

    Attributes:
        words: Questions about sentences.
        captions: Captions of images.
        questions: Questions about images.
        replay: Questions about sentences mixed into those about images, as a share of them, so that the
            language model does not forget words while it learns one tower's images.
        captions_replay: Captions mixed into them likewise, so that it does not forget what images show while it
            learns to choose (docs/experiment.md).
        batch: Conversations per step.
        words_rate: Peak learning rate of the lesson of words.
        rate: Peak learning rate of the language model in the other lessons.
        projector_rate: Peak learning rate of the projector.
        bf16: Compute in bfloat16.
    """

    words: int
    captions: int
    questions: int
    replay: float
    captions_replay: float
    batch: int
    words_rate: float
    rate: float
    projector_rate: float
    bf16: bool


RECIPES: Mapping[LanguageModelName, PracticeSettings] = {
    "tiny": PracticeSettings(
        words=8_000,
        captions=9_600,
        questions=9_600,
        replay=0.1,
        captions_replay=0.0,
        batch=16,
        words_rate=2e-3,
        rate=1e-3,
        projector_rate=2e-3,
        bf16=False,
    ),
    "smollm2": PracticeSettings(
        words=1_920,
        captions=2_560,
        questions=3_840,
        replay=0.1,
        captions_replay=0.0,
        batch=16,
        words_rate=2e-4,
        rate=1e-4,
        projector_rate=1e-3,
        bf16=True,
    ),
}


def build_smol_llava(
    tower: Path,
    data: Path | Sequence[Path],
    images: Path,
    out: Path,
    *,
    language_model: LanguageModelName = "smollm2",
    words: int | None = None,
    captions: int | None = None,
    questions: int | None = None,
    captions_replay: float | None = None,
    batch: int | None = None,
    words_rate: float | None = None,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Build a small LLaVA, train it, and write it as a transformers checkpoint with its processor.

    Args:
        tower: A tower, in any form that `load_tower` reads.
        data: Multiple-choice questions answered by a letter: benchmarks of eval-mcq, or LLaVA conversations;
            one file or several.
        images: Folder that image paths of conversations are relative to.
        out: Folder to write.
        language_model: A key of `LANGUAGE_MODELS`.
        words: Questions about sentences; None for the recipe's.
        captions: Captions; None for the recipe's.
        questions: Questions about images; None for the recipe's.
        captions_replay: Captions among the questions about images, as a share of them; None for the recipe's.
        batch: Conversations per step; None for the recipe's.
        words_rate: Peak learning rate of the questions about sentences; None for the recipe's.
        seed: Seed of new weights, the lessons and their order.
        force: Replace ``out``.

    Returns:
        ``out``.

    Raises:
        UserError: bad data, tower or language model (see `read_corpus`, `load_tower`, `smollm2`), no question among
            the conversations, or ``out`` exists.
    """
    check_free(out, force)
    if language_model not in LANGUAGE_MODELS:
        raise unknown_name("language model", language_model, LANGUAGE_MODELS)
    given = {
        "words": words, "captions": captions, "questions": questions, "captions_replay": captions_replay,
        "batch": batch, "words_rate": words_rate,
    }  # fmt: skip
    recipe = _recipe(language_model, {name: value for name, value in given.items() if value is not None})
    corpus = read_corpus(data, images)
    asked = _questions(corpus)
    loaded = load_tower(tower)
    speech = _speech(language_model, corpus.rows, asked, seed)
    model = assemble(loaded, speech, seed)
    processor = llava_processor(tower_contract(loaded.spec), speech.tokenizer, CHATML)
    began = time.monotonic()
    losses = {
        name: _teach(model, processor, replace(corpus, rows=rows), rates, recipe, seed)
        for name, (rows, rates) in _lessons(asked, recipe, seed).items()
    }
    _logger.info(f"trained in {time.monotonic() - began:.0f} s")
    record = {
        "language_model": language_model,
        "tower": tower.name,
        "data": [file.name for file in corpus.files],
        "data_sha256": corpus.digest(),
        "seed": seed,
        **asdict(recipe),
        "losses": losses,
        "seconds": round(time.monotonic() - began, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with new_folder(out, force) as folder:
        with no_library_bars():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        taught = Training.of(
            ("projector", "language_model"), "build_smol_llava.py", corpus.digests.values(), corpus.splits()
        )
        write_trainings(folder, [*trainings_of(loaded.header.source), taught])
    return out


def _recipe(language_model: LanguageModelName, given: dict[str, Any]) -> PracticeSettings:
    for name, value in given.items():
        least = 1 if name == "batch" else 0
        if value < least:
            raise InvalidArgumentError(f"`{name}` is {value}: it must be {least} or greater")
    return replace(RECIPES[language_model], **given)


def _questions(corpus: Corpus) -> list[Question]:
    found = [question for row in corpus.rows if (question := read_question(row))]
    readable = [question for question in found if corpus.damaged.keys().isdisjoint(question.images)]
    if not readable:
        raise BadDataError(
            f"{corpus.path}: none of {len(corpus.rows)} conversations is a multiple-choice question answered "
            "by a letter: make some with `build_benchmark()`"
        )
    return readable


def _speech(
    name: LanguageModelName, rows: Sequence[Conversation], questions: Sequence[Question], seed: int
) -> Speech:
    spoken = [turn.value for row in rows for turn in row.turns]
    lessons = (word_lesson(questions, 100, seed), caption_lesson(questions, 100, seed))
    written = [turn.value for lesson in lessons for row in lesson for turn in row.turns]
    roles = [f"\n{role}\n" for role in ("user", "assistant")]
    options = [option for question in questions for option in question.options]
    return LANGUAGE_MODELS[name]([*spoken, *written, *roles], options, seed)


def _lessons(
    questions: Sequence[Question], recipe: PracticeSettings, seed: int
) -> dict[str, tuple[list[Conversation], dict[str, float]]]:
    """Return name -> conversations, and learning rates: prefix of a parameter's name -> peak learning rate."""
    about_images = {"model.language_model": recipe.rate, "model.multi_modal_projector": recipe.projector_rate}
    replayed = [
        *word_lesson(questions, round(recipe.replay * recipe.questions), seed + 1),
        *caption_lesson(questions, round(recipe.captions_replay * recipe.questions), seed + 1),
    ]
    return {
        "words": (
            list(word_lesson(questions, recipe.words, seed)),
            {"model.language_model": recipe.words_rate},
        ),
        "captions": (list(caption_lesson(questions, recipe.captions, seed)), about_images),
        "questions": ([*question_lesson(questions, recipe.questions, seed), *replayed], about_images),
    }


def _teach(
    model: Any,
    processor: Any,
    corpus: Corpus,
    rates: Mapping[str, float],
    recipe: PracticeSettings,
    seed: int,
) -> tuple[float, ...]:
    """Train one lesson, and return its losses."""
    if not corpus.rows:
        return ()
    groups = []
    for name, parameter in model.named_parameters():
        rate = next((rate for part, rate in rates.items() if name.startswith(part)), None)
        parameter.requires_grad_(rate is not None)
        if rate is not None:
            groups.append({"params": [parameter], "lr": rate})
    examples, _ = prepare_examples(corpus, processor, model.config.text_config.max_position_embeddings, True)
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work,
            num_train_epochs=1,
            per_device_train_batch_size=recipe.batch,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            seed=seed,
            bf16=recipe.bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            disable_tqdm=counter() is None,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        place = ComputeSettings(arguments.device, "bfloat16" if recipe.bf16 else "float32")
        model.to(place.device)
        cached = cache_features(model, examples, corpus, processor, place)
        dataset: Any = cached.dataset if cached else ConversationDataset(examples, corpus.folder, processor)
        trainer = FrozenTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=cached.collator if cached else AnswerCollator(processor.tokenizer.pad_token_id),
            optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True), None),
        )
        trainer.train()
        if cached:
            cached.cast.restore()
    model.to("cpu").eval()
    return tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
