"""Scoring with any image-text-to-text model of transformers: padded batches as its own processor makes them.

Nothing is shared between questions, and nothing is assumed of the model but its processor's conventions: a chat
template with ``image`` and ``text`` parts, and pictures as one list per prompt.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval_mcq.scoring.engine import PLAIN_ROWS, TOLERANCE, Engine, Found, wanted_tokens
from eval_mcq.scoring.prompt import Ask
from eval_mcq.scoring.requests import Continuations, Prepared, PromptTokenizer, TokenizedRequest
from eval_mcq.scoring.score import Scorer
from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.library_errors import library_reason

_logger = logging.getLogger(__name__)

STOCK_VERSION = "plain-1"
"""Recorded in every run; incremented whenever these scores of a given model, image and prompt change."""

END = 4
"""Tokens at the end of a prompt that are compared with those of its text."""

Rows = Sequence[tuple[TokenizedRequest, Sequence[Image.Image]]]
"""Questions, each with its images."""


class StockTokenizer(PromptTokenizer):
    """Renders and tokenizes prompts with a stock processor."""

    def _arranged(self, images: Sequence[Sequence[Image.Image]]) -> list[Any]:
        """Return the images as a stock processor takes them: one list per prompt."""
        return [list(of_prompt) for of_prompt in images]

    def prepare(
        self, asks: Sequence[Ask], images: list[Image.Image], continuations: Continuations
    ) -> Prepared:
        """Render all questions on an image; the processor makes batches of them later."""
        prompts = [self.prompt(ask.item, ask.rotation) for ask in asks]
        rows = [
            TokenizedRequest(ask, prompt, [], *continuations(self, ask, prompt))
            for ask, prompt in zip(asks, prompts, strict=True)
        ]
        return Prepared(rows, images, {}, {}, 0, sharable=False)


class StockEngine(Engine):
    """Computes log-probabilities in padded batches, across images.

    The first batch of several prompts is compared with each of its prompts alone: a model for which padding changes the
    numbers is asked one question at a time, which is logged.
    """

    together: bool | None = None

    @torch.no_grad()
    def run(self, batch: Sequence[Prepared]) -> list[list[Found]]:
        """Compute log-probabilities for every row of every image of a batch."""
        rows = [(row, prepared.images) for prepared in batch for row in prepared.rows]
        pieces = [rows[start : start + PLAIN_ROWS] for start in range(0, len(rows), PLAIN_ROWS)]
        found = iter([of_row for piece in pieces for of_row in self._rows(piece)])
        return [[next(found) for _ in prepared.rows] for prepared in batch]

    def _rows(self, rows: Rows) -> list[Found]:
        if len(rows) == 1:
            return self._scored(rows)
        if self.together is None:
            return self._compared(rows)
        return self._scored(rows) if self.together else self._alone(rows)

    def _alone(self, rows: Rows) -> list[Found]:
        return [found for row in rows for found in self._scored([row])]

    def _compared(self, rows: Rows) -> list[Found]:
        """Score rows together and alone, and decide which is done from now on."""
        alone = self._alone(rows)
        try:
            together = self._scored(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a processor or model raises for a batch that it does not take
            _logger.info(
                f"This model does not take several prompts at once ({library_reason(error)}): one at a time."
            )
            self.together = False
            return alone
        off = max(
            float((a - b).abs().max())
            for one, other in zip(alone, together, strict=True)
            for of_one, of_other in zip(one, other, strict=True)
            for a, b in zip(of_one, of_other, strict=True)
        )
        self.together = off <= TOLERANCE[self.dtype]
        if not self.together:
            _logger.info(
                f"Padding changes this model's answers (log-probabilities by {off:.2g}): one prompt at a time."
            )
        return together if self.together else alone

    def _scored(self, rows: Rows) -> list[Found]:
        """Score rows in one batch, one sequence per continuation; the processor expands, masks and pads everything.

        Padding is on the right, where nothing that a decoder computes for the prompt can see it.
        """
        many = [(text, tail, images) for row, images in rows for text, tail in self._texts(row)]
        made = self.writer.batch(
            [text for text, *_ in many], [images for *_, images in many], padding_side="right"
        )
        batch = {name: self.moved(value) for name, value in made.items()}
        ends = (made["attention_mask"].sum(dim=1) - 1).tolist()
        for (text, *_), ids, end in zip(many, made["input_ids"].tolist(), ends, strict=True):
            self._check_end(text, ids[: end + 1])
        longest = max(max(len(tail), 1) for _, tail, _ in many)
        places = [
            [min(end - len(tail) + i, end) for i in range(longest)]
            for end, (_, tail, _) in zip(ends, many, strict=True)
        ]
        with self._reading(torch.tensor(places), wanted_tokens([row for row, _ in rows])):
            lines = iter(self.model(**batch).logits)
        # a line has as many places as the longest continuation, so shorter ones leave the last places unread
        return [
            [
                [of_place[ids].cpu() for of_place, ids in zip(_log_softmax(next(lines)), of, strict=False)]
                for of in row.wanted
            ]
            for row, _ in rows
        ]

    def _texts(self, row: TokenizedRequest) -> list[tuple[str, list[int]]]:
        """Return what the model reads for each continuation, and the ids of the continuation at its end."""
        if row.continuations == [[]]:
            return [(row.prompt, [])]
        options = zip(row.ask.item.options, row.continuations, strict=True)
        return [(f"{row.prompt}{self.writer.lead}{option}", tail) for option, tail in options]

    def _check_end(self, text: str, ids: list[int]) -> None:
        """Refuse a processor that adds something after the prompt, where the answer begins."""
        expected = self.writer.tokenize(text)[-END:]
        if ids[-END:] != expected:
            raise UnsupportedCheckpointError(
                f"the model's processor ends a prompt with the tokens {ids[-END:]}, but its text ends with "
                f"{expected}: what follows the prompt is not the answer; use `mode=generate`"
            )


def _log_softmax(line: Tensor) -> Tensor:
    return line.float().log_softmax(dim=-1)


class StockScorer(Scorer):
    """Scores questions with any stock image-text-to-text model."""

    tokenizer_class = StockTokenizer
    engine_class = StockEngine
