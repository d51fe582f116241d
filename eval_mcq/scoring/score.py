"""Scoring of questions with a model, in any mode."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.answerer import Answerer
from eval_mcq.scoring.engine import Engine, Way
from eval_mcq.scoring.modes import LIKELIHOODS, Score, parsed
from eval_mcq.scoring.prompt import PROMPTS, Ask, Mode
from eval_mcq.scoring.requests import Prepared, PromptTokenizer, TokenizedRequest
from mgll_encoder.common.errors import UnsupportedCheckpointError

_logger = logging.getLogger(__name__)

NEW_TOKENS = 32
"""Maximum tokens of a reply in mode ``generate``; a letter or a name is far shorter."""


class Scorer(Answerer[Prepared]):
    """Scores questions with a transformers image-text model.

    Args:
        model: The model; moved to the device unless it is quantized, which fixes its device.
        processor: Renders the chat template and builds the batches.
        device: Device for the computation.
        dtype: Number format of the model, None to keep it; probabilities are always computed in float32.
        mode: Scoring mode.
        way: Computation strategy to use, see `eval_mcq.scoring.engine`.

    Raises:
        UserError: the processor is missing, or has no chat template; or the language model has an encoder.
    """

    tokenizer_class: ClassVar[type[PromptTokenizer]] = PromptTokenizer
    engine_class: ClassVar[type[Engine]] = Engine

    def __init__(
        self,
        model: Any,
        processor: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        mode: Mode = "letters",
        way: Way | Literal["auto"] = "auto",
    ) -> None:
        self.writer = self.tokenizer_class(processor, PROMPTS[mode])
        if _has_encoder(model):
            raise UnsupportedCheckpointError(
                "the model's language model encodes the prompt with an encoder, but scoring needs a decoder-only model "
                "that continues the prompt: use one such as Vicuna"
            )
        quantized = getattr(model, "is_quantized", False)
        self.model = (model if quantized else model.to(device=device, dtype=dtype)).eval()
        self.processor = processor
        self.mode: Mode = mode
        self.engine = self.engine_class(self.model, self.writer, dtype or torch.float32, way)
        self._most_rows: int | None = None

    def prompt(self, item: MCQItem, rotation: int = 0) -> str:
        """Return the text before the answer, including chat template and image placeholders."""
        return self.writer.prompt(item, rotation)

    def check_options(self, items: Sequence[MCQItem]) -> None:
        """Check, before any scoring, that the options of the question with the most options can be scored.

        Raises:
            UserError: an option letter is not a single token for this tokenizer, or the tokenizer merges an option's
                text with the prompt; names the question.
        """
        if self.mode in LIKELIHOODS:
            widest = Ask(max(items, key=lambda item: len(item.options)))
            LIKELIHOODS[self.mode].continuations(self.writer, widest, self.prompt(widest.item))

    def prepare(self, asks: Sequence[Ask], images: list[Image.Image]) -> Prepared:
        """Do everything before the forward pass, for questions on the same images; may run in another thread."""
        if self.mode in LIKELIHOODS:
            return self.writer.prepare(asks, images, LIKELIHOODS[self.mode].continuations)
        rows = [TokenizedRequest(ask, self.prompt(ask.item, ask.rotation), [], [[]], [[[]]]) for ask in asks]
        return Prepared(rows, images, {}, {}, 0, sharable=False)

    def answer(self, batch: Sequence[Prepared]) -> list[list[Score]]:
        """Scores of all rows of all images; in halves where the memory does not suffice."""
        rows = sum(len(prepared.rows) for prepared in batch)
        if rows > max(self._most_rows or rows, 1):
            return self._halves(batch)
        try:
            return self._answer(batch)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            self._most_rows = rows // 2
        _logger.info(f"Out of memory with {rows} questions at a time: continuing with at most {rows // 2}.")
        torch.cuda.empty_cache()
        return self._halves(batch)

    def _halves(self, batch: Sequence[Prepared]) -> list[list[Score]]:
        if len(batch) > 1:
            half = len(batch) // 2
            return [*self.answer(batch[:half]), *self.answer(batch[half:])]
        (whole,) = batch
        half = len(whole.rows) // 2
        parts = [
            Prepared(rows, whole.images, whole.inputs, whole.per_token, whole.image_end, whole.sharable)
            for rows in (whole.rows[:half], whole.rows[half:])
        ]
        return [[score for part in parts for score in self.answer([part])[0]]]

    def _answer(self, batch: Sequence[Prepared]) -> list[list[Score]]:
        if self.mode not in LIKELIHOODS:
            return [self._write(prepared) for prepared in batch]
        score = LIKELIHOODS[self.mode].score
        return [
            [score(row.ask, of_row) for row, of_row in zip(prepared.rows, found, strict=True)]
            for prepared, found in zip(batch, self.engine.run(batch), strict=True)
        ]

    @torch.no_grad()
    def _write(self, prepared: Prepared) -> list[Score]:
        """Generate replies greedily and parse them."""
        images = [prepared.images] * len(prepared.rows)
        made = self.writer.batch([row.prompt for row in prepared.rows], images, padding_side="left")
        batch = {name: self.engine.moved(value) for name, value in made.items()}
        written = self.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        ids = batch["input_ids"]
        if written.shape[1] >= ids.shape[1] and torch.equal(written[:, : ids.shape[1]], ids):
            written = written[:, ids.shape[1] :]  # some models return the prompt, too
        replies = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [parsed(row.ask, reply) for row, reply in zip(prepared.rows, replies, strict=True)]


def _has_encoder(model: Any) -> bool:
    config = getattr(model, "config", None)
    return config is not None and config.get_text_config().is_encoder_decoder
