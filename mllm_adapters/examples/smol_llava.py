"""A small real LLaVA: a CLIP tower, an MLP projector and a small language model, taught to answer in letters.

The result is an ordinary transformers checkpoint. It is taught in two lessons with transformers' Trainer: multiple
choice from written pictures, which needs no pixels, then the conversations themselves with their images.
"""

import json
import logging
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, TrainingArguments

from mgll_encoder import Tower, load_tower, vision_config
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import check_free, new_folder, sha256
from mgll_encoder.common.trained_on import Training, trainings_of, write_trainings
from mllm_adapters.core.planning import contract_of
from mllm_adapters.core.processing import llava_processor
from mllm_adapters.data.corpus import Conversation, Corpus, read_corpus
from mllm_adapters.data.dataset import AnswerCollator, ConversationDataset, prepare_examples
from mllm_adapters.examples.curriculum import Question, picture_lesson, read_question, word_lesson
from mllm_adapters.examples.language_models import CHATML, LANGUAGE_MODELS, LanguageModelName, Speech
from mllm_adapters.training.trainer import FrozenTrainer

_logger = logging.getLogger(__name__)

FEATURE_LAYER = -2
"""The tower's last layer but one, as in LLaVA."""

RECORD = "teaching.json"


@dataclass(frozen=True)
class PracticeSettings:
    """How much a language model practises, and what of it learns.

    Attributes:
        words: Questions about written pictures.
        words_batch: Questions per step of the lesson of words.
        words_rate: Peak learning rate of the lesson of words.
        rounds: Passes over the conversations with their images, options reordered each time.
        replay: Questions about written pictures among the conversations, as a share of them, so that the language
            model does not unlearn to read words while it learns to read one tower's images.
        batch: Conversations per step.
        rate: Peak learning rate.
        learns: Regular expression for the names of the language model's parameters that learn; the projector
            learns in the lesson of pictures, the tower never.
        bf16: Multiply in bfloat16.
    """

    words: int
    words_batch: int
    words_rate: float
    rounds: int
    replay: float
    batch: int
    rate: float
    learns: str
    bf16: bool


RECIPES: Mapping[LanguageModelName, PracticeSettings] = {
    "tiny": PracticeSettings(
        words=8_000,
        words_batch=16,
        words_rate=2e-3,
        rounds=4,
        replay=0.5,
        batch=16,
        rate=1e-3,
        learns=".",
        bf16=False,
    ),
    "smollm2": PracticeSettings(
        words=2_500,
        words_batch=16,
        words_rate=5e-4,
        rounds=2,
        replay=0.1,
        batch=8,
        rate=3e-4,
        learns=".",
        bf16=True,
    ),
}


def build_smol_llava(
    tower: Path,
    conversations: Path,
    images: Path,
    out: Path,
    *,
    language_model: LanguageModelName = "smollm2",
    words: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Build a small LLaVA, teach it, and write it as a transformers checkpoint with its processor.

    Args:
        tower: A CLIP tower, in any form that `load_tower` reads.
        conversations: LLaVA-format conversations with multiple-choice questions answered by a letter.
        images: What the image paths in them are relative to.
        out: Folder to write.
        language_model: A key of `LANGUAGE_MODELS`.
        words: Questions about written pictures; None for the recipe's.
        rounds: Passes over the conversations; None for the recipe's.
        seed: Draws new weights, the lessons and their order.
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
    usual = RECIPES[language_model]
    recipe = replace(
        usual,
        words=usual.words if words is None else words,
        rounds=usual.rounds if rounds is None else rounds,
    )
    for name, value in (("words", recipe.words), ("rounds", recipe.rounds)):
        if value < 0:
            raise UserError(f"--{name} is {value}: it must be 0 or greater")
    corpus = read_corpus(conversations, images)
    questions = [question for row in corpus.rows if (question := read_question(row))]
    if not questions:
        raise UserError(
            f"{conversations}: none of {len(corpus.rows)} conversations is a multiple-choice question answered "
            "by a letter: make some with `eval-mcq build` and `eval-mcq export --format llava`"
        )
    eyes = load_tower(tower)
    speech = _speech(language_model, corpus.rows, questions, seed)
    model = assemble(eyes, speech, seed)
    processor = llava_processor(contract_of(eyes.spec, FEATURE_LAYER, False), speech.tokenizer, CHATML)
    began = time.monotonic()
    lesson = replace(corpus, rows=list(word_lesson(questions, recipe.words, seed)), sizes={})
    words_losses = _teach(
        model,
        processor,
        lesson,
        f"language_model.*{recipe.learns}",
        recipe.words_batch,
        recipe.words_rate,
        seed,
        recipe.bf16,
    )
    pictures = list(picture_lesson(corpus.rows, recipe.rounds, seed))
    replayed = word_lesson(questions, round(recipe.replay * len(pictures)), seed + 1)
    lesson = replace(corpus, rows=[*pictures, *replayed])
    losses = _teach(
        model,
        processor,
        lesson,
        f"multi_modal_projector|language_model.*{recipe.learns}",
        recipe.batch,
        recipe.rate,
        seed,
        recipe.bf16,
    )
    _logger.info(f"taught in {time.monotonic() - began:.0f} s")
    record = {
        "language_model": language_model,
        "tower": tower.name,
        "data": conversations.name,
        "data_sha256": sha256(conversations),
        "seed": seed,
        **asdict(recipe),
        "losses": {"words": words_losses, "pictures": losses},
        "seconds": round(time.monotonic() - began, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with new_folder(out, force) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        taught = Training.of(("projector", "language_model"), "build_smol_llava.py", corpus.digests.values())
        write_trainings(folder, [*trainings_of(eyes.header.source), taught])
    return out


def assemble(eyes: Tower, speech: Speech, seed: int) -> LlavaForConditionalGeneration:
    """Join a tower and a language model by a new projector."""
    text = speech.model.config
    config = LlavaConfig(
        vision_config=vision_config(eyes.spec),
        text_config=text,
        image_token_index=speech.image_token_id,
        image_seq_length=eyes.spec.patches,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(eyes.model.state_dict())
    model.model.language_model.load_state_dict(speech.model.model.state_dict())
    model.lm_head.load_state_dict(speech.model.lm_head.state_dict())
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model


def _speech(
    name: LanguageModelName, rows: Sequence[Conversation], questions: Sequence[Question], seed: int
) -> Speech:
    spoken = [turn.value for row in rows for turn in row.turns]
    written = [turn.value for row in word_lesson(questions, 100, seed) for turn in row.turns]
    roles = [f"\n{role}\n" for role in ("user", "assistant")]
    options = [option for question in questions for option in question.options]
    return LANGUAGE_MODELS[name]([*spoken, *written, *roles], options, seed)


def _teach(
    model: Any, processor: Any, corpus: Corpus, learns: str, batch: int, rate: float, seed: int, bf16: bool
) -> tuple[float, ...]:
    if not corpus.rows:
        return ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(learns, name) is not None)
    examples, _ = prepare_examples(corpus, processor, model.config.text_config.max_position_embeddings, True)
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            adam_beta2=0.98,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            seed=seed,
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = FrozenTrainer(
            model=model,
            args=arguments,
            train_dataset=ConversationDataset(examples, corpus.folder, processor),
            data_collator=AnswerCollator(processor.tokenizer.pad_token_id),
        )
        trainer.train()
    model.eval()
    return tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
