"""Scoring by letter logits: one forward pass per batch, softmax over the letters at the answer position."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from eval_mcq.prompt import render
from eval_mcq.schema import LETTERS, MCQItem
from mgll_encoder.common.errors import UserError

MODE = "letters"
"""Scoring mode, recorded in every run."""


@dataclass(frozen=True)
class Score:
    """The answer to one question.

    Attributes:
        probabilities: Softmax over the offered letters.
        letter_mass: Probability of all offered letters together within the whole vocabulary; near zero means
            that the model does not answer with letters at all, and the choice among them says little.
    """

    probabilities: list[float]
    letter_mass: float

    @property
    def choice(self) -> int:
        """Index of the chosen option; of exactly equal ones the first."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


class LetterScorer:
    """Scores questions with a transformers image-text model.

    Args:
        model: Called as ``model(**batch)``; gives ``logits`` of shape ``(batch, positions, vocabulary)``.
        processor: Renders the chat template and makes the batch; pads on either side.
        device: Where to compute.
        dtype: Number format of the model, None for the one it has; probabilities are computed in float32 whatever it
            is.

    Raises:
        UserError: the processor is missing, or has no chat template; or the language model has an encoder.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        if processor is None:
            raise UserError(
                "the model has no processor (no tokenizer in its folder): eval-mcq cannot put questions to it"
            )
        if getattr(processor, "chat_template", None) is None:
            raise UserError(
                "the model's processor has no chat template: add chat_template.jinja to the model folder"
            )
        if _has_encoder(model):
            raise UserError(
                "the model's language model reads the prompt with an encoder, and letters are scored by a model that "
                "writes the answer after the prompt: take one on a decoder, such as Vicuna"
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.model = model.to(device=self.device, dtype=dtype).eval()
        self.processor = processor
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._letter_ids: list[list[int]] = []

    def prompt(self, item: MCQItem) -> str:
        """The text before the answer, chat template and image placeholders included."""
        content = [*({"type": "image"} for _ in item.images), {"type": "text", "text": render(item)}]
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return str(rendered)

    def check_letters(self, items: Sequence[MCQItem]) -> None:
        """See to it, before any question is put, that every option letter can be scored.

        Raises:
            UserError: an option letter is not a single token for this tokenizer.
        """
        widest = max(items, key=lambda item: len(item.options))
        self._ids_of_letters(self.prompt(widest), len(widest.options))

    @torch.no_grad()
    def score(self, items: Sequence[MCQItem], images: Sequence[Sequence[Image.Image]]) -> list[Score]:
        """Answer a batch of questions.

        Args:
            items: The questions.
            images: The images of each question.

        Raises:
            UserError: an option letter is not a single token for this tokenizer.
        """
        prompts = [self.prompt(item) for item in items]
        batch = self.processor(
            text=prompts,
            images=[image for of_item in images for image in of_item],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not self._starts_with_bos(prompts[0]),
        )
        batch = {name: self._move(value) for name, value in batch.items()}
        logits = self._answer_logits(batch)
        letter_ids = self._ids_of_letters(prompts[0], max(len(item.options) for item in items))
        return [_score(row, letter_ids[: len(item.options)]) for row, item in zip(logits, items, strict=True)]

    def _answer_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits at the last real token of each row, ``(batch, vocabulary)`` in float32."""
        mask = batch["attention_mask"]
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask.bool(), positions, -1).amax(dim=1)
        if self._keeps_logits:  # the vocabulary times all positions is what fills the memory
            kept, row_of = last.unique(return_inverse=True)
            logits = self.model(**batch, logits_to_keep=kept).logits
        else:
            row_of = last
            logits = self.model(**batch).logits
        return logits[torch.arange(len(last), device=logits.device), row_of].float()

    def _ids_of_letters(self, prompt: str, count: int) -> list[list[int]]:
        """Token ids of each letter as the tokenizer writes it right after the prompt: "A", " A" or both."""
        if len(self._letter_ids) < count:
            before = self._tokenize(prompt)
            per_variant = []
            for variant in ("{}", " {}"):
                ids = [
                    self._single_token(prompt, before, variant.format(letter)) for letter in LETTERS[:count]
                ]
                per_variant.append(ids)
            usable = [[i for i in ids if i is not None] for ids in per_variant if None not in ids]
            if not usable:
                nearest = min(per_variant, key=lambda ids: ids.count(None))
                raise UserError(
                    f"option letter '{LETTERS[nearest.index(None)]}' is not a single token after the prompt for "
                    "this model's tokenizer: build the bench with fewer --options, or use another model"
                )
            self._letter_ids = [sorted(set(ids)) for ids in zip(*usable, strict=True)]
        return self._letter_ids

    def _single_token(self, prompt: str, before: list[int], answer: str) -> int | None:
        after = self._tokenize(prompt + answer)
        return after[-1] if after[:-1] == before else None

    def _tokenize(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _starts_with_bos(self, prompt: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return bos is not None and prompt.startswith(bos)

    def _move(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


def _has_encoder(model: Any) -> bool:
    config = getattr(model, "config", None)
    return config is not None and config.get_text_config().is_encoder_decoder


def _score(logits: torch.Tensor, letter_ids: list[list[int]]) -> Score:
    log_probabilities = logits.log_softmax(dim=-1)
    letters = torch.stack([log_probabilities[ids].logsumexp(dim=0) for ids in letter_ids])
    return Score(letters.softmax(dim=0).tolist(), float(letters.logsumexp(dim=0).exp()))
