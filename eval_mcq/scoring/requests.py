"""Conversion of questions to token ids: chat template, image placeholders, and tokens of the answers."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval_mcq.items.schema import LETTERS, MCQItem
from eval_mcq.scoring.prefix_tree import common_length
from eval_mcq.scoring.prompt import Ask, Prompt, render
from mgll_encoder.common.chat import PREFIX_TYPES, render_chat, template_of
from mgll_encoder.common.errors import NotFoundError, UnsupportedCheckpointError


@dataclass(frozen=True)
class TokenizedRequest:
    """A question in one rotation as token ids.

    Attributes:
        ask: The question.
        prompt: Text before the answer, with one placeholder per image.
        tokens: Ids of the prompt, including image tokens; empty if the prompts have no common prefix with the images.
        continuations: Ids of the texts whose likelihood after the prompt is needed; a single empty one for letters.
        wanted: For each continuation and each of its positions (one for an empty one): the ids whose probability is
            needed.
    """

    ask: Ask
    prompt: str
    tokens: list[int]
    continuations: list[list[int]]
    wanted: list[list[list[int]]]


@dataclass(frozen=True)
class Prepared:
    """All questions on one image (or on the same images), ready for the model.

    Attributes:
        rows: The questions.
        images: The decoded images.
        inputs: The processor's outputs for the images.
        per_token: The processor's outputs for the first prompt, including ids; each [1, length].
        image_end: Number of tokens up to the last image token.
        sharable: Whether all rows have a common prefix that contains the images and does not depend on what follows.
    """

    rows: list[TokenizedRequest]
    images: list[Image.Image]
    inputs: dict[str, Tensor]
    per_token: dict[str, Tensor]
    image_end: int
    sharable: bool


Continuations = Callable[["PromptTokenizer", Ask, str], tuple[list[list[int]], list[list[list[int]]]]]
"""Returns the continuations and wanted ids of a scoring mode; see `TokenizedRequest`."""


class PromptTokenizer:
    """Renders and tokenizes prompts with a model's processor. Thread-safe.

    Args:
        processor: Renders the chat template, tokenizes text and prepares images.
        prompt: The prompt format.

    Raises:
        UserError: the processor is missing, or has no chat template.
    """

    def __init__(self, processor: Any, prompt: Prompt) -> None:
        if processor is None:
            raise NotFoundError(
                "the model has no processor (no tokenizer in its folder): its prompts cannot be written"
            )
        if template_of(processor) is None:
            raise NotFoundError(
                "the model's processor has no chat template: add chat_template.jinja to the model folder"
            )
        self.processor = processor
        self._prompt = prompt
        self._lock = threading.RLock()  # fast tokenizers are not thread-safe
        self._letter_ids: list[list[int]] = []
        self._lead: str | None = None
        self._reads_text: bool | None = None  # whether the image inputs depend on the question

    def prompt(self, item: MCQItem, rotation: int = 0) -> str:
        """Return the text before the answer, including chat template and image placeholders."""
        return self._template([self._user(item, rotation)], add_generation_prompt=True)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        with self._lock:
            return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def batch(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], **kwargs: Any
    ) -> dict[str, Any]:
        """Process prompts and their images into a padded batch."""
        with self._lock:
            made = self.processor(
                text=list(prompts),
                images=self._arranged(images),
                padding=True,
                return_tensors="pt",
                add_special_tokens=not self._starts_with_bos(prompts[0]),
                **kwargs,
            )
        return dict(made)

    def _arranged(self, images: Sequence[Sequence[Image.Image]]) -> list[Any]:
        """Return the images of all prompts as the processor takes them: one list."""
        return [image for of_prompt in images for image in of_prompt]

    def prepare(
        self, asks: Sequence[Ask], images: list[Image.Image], continuations: Continuations
    ) -> Prepared:
        """Tokenize all questions on an image; the image itself is processed once."""
        prompts = [self.prompt(ask.item, ask.rotation) for ask in asks]
        batch = self.batch(prompts[:1], [images])
        first = batch.pop("input_ids")
        batch.pop("attention_mask", None)
        per_token = {name: value for name, value in batch.items() if _is_per_token(value, first)}
        expanded = first[0].tolist()
        plain = [self.unexpanded(prompt) for prompt in prompts]
        spread = _spread(plain, expanded, self._placeholder())
        inputs = {name: value for name, value in batch.items() if name not in per_token}
        if self._reads_text is None and prompts[0] != prompts[-1]:
            other = self.batch(prompts[-1:], [images])
            self._reads_text = not all(_same(value, other[name]) for name, value in inputs.items())
        wanted = [continuations(self, ask, prompt) for ask, prompt in zip(asks, prompts, strict=True)]
        return Prepared(
            rows=[
                TokenizedRequest(ask, prompt, tokens, *of_ask)
                for ask, prompt, tokens, of_ask in zip(asks, prompts, spread.rows, wanted, strict=True)
            ],
            images=images,
            inputs=inputs,
            per_token={"input_ids": first, **per_token},
            image_end=spread.image_end,
            sharable=spread.sharable
            and PREFIX_TYPES not in per_token
            and all(map(torch.is_tensor, inputs.values()))
            and (len(prompts) == 1 or not self._reads_text),
        )

    def letter_ids(self, prompt: str, count: int) -> list[list[int]]:
        """Return the token ids of each letter directly after a prompt: of "A", " A" or both.

        Raises:
            UserError: a letter is not a single token.
        """
        if len(self._letter_ids) < count:
            before = self.tokenize(prompt)
            per_variant = []
            for variant in dict.fromkeys(("{}", " {}", f"{self.lead}{{}}")):
                ids = [
                    self._single_token(prompt, before, variant.format(letter)) for letter in LETTERS[:count]
                ]
                per_variant.append(ids)
            usable = [[i for i in ids if i is not None] for ids in per_variant if None not in ids]
            if not usable:
                nearest = min(per_variant, key=lambda ids: ids.count(None))
                raise UnsupportedCheckpointError(
                    f"option letter '{LETTERS[nearest.index(None)]}' is not a single token after the prompt for "
                    "this model's tokenizer: build the bench with fewer `options`, or use `mode=options`"
                )
            self._letter_ids = [sorted(set(ids)) for ids in zip(*usable, strict=True)]
        return self._letter_ids

    @property
    def lead(self) -> str:
        """Text that the chat template writes between prompt and answer: a space, a line break, or nothing."""
        if self._lead is None:
            answer = "drusen"
            item = MCQItem(id="x", images=["x"], question="?", options=[answer, "x"], answer=0, category="x")
            prompt = self.prompt(item)
            reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            whole = self._template([self._user(item, 0), reply], add_generation_prompt=False)
            rest = whole[len(prompt) :] if whole.startswith(prompt) else ""
            lead, found, _ = rest.partition(answer)
            self._lead = lead if found and not lead.strip() else ("" if prompt[-1:].isspace() else " ")
        return self._lead

    def continuation(self, prompt: str, text: str) -> list[int]:
        """Return the ids of a text as an answer to a prompt.

        Raises:
            UserError: the tokenizer merges it with the end of the prompt.
        """
        before, after = self.tokenize(prompt), self.tokenize(prompt + self.lead + text)
        if after[: len(before)] != before or len(after) == len(before):
            raise UnsupportedCheckpointError(
                f"the tokenizer merges the answer '{text}' with the end of the prompt, so its likelihood cannot be "
                "computed: use `mode=letters` or `mode=generate`"
            )
        return after[len(before) :]

    def _user(self, item: MCQItem, rotation: int) -> dict[str, Any]:
        text = {"type": "text", "text": render(item, rotation, self._prompt)}
        return {"role": "user", "content": [*({"type": "image"} for _ in item.images), text]}

    def _template(self, turns: list[dict[str, Any]], **kwargs: Any) -> str:
        return render_chat(self.processor, turns, **kwargs)

    def _single_token(self, prompt: str, before: list[int], answer: str) -> int | None:
        after = self.tokenize(prompt + answer)
        return after[-1] if after[:-1] == before else None

    def unexpanded(self, prompt: str) -> list[int]:
        """Return the ids of a prompt with one placeholder per image."""
        with self._lock:
            special = not self._starts_with_bos(prompt)
            return list(self.processor.tokenizer(prompt, add_special_tokens=special)["input_ids"])

    def _placeholder(self) -> int | None:
        token = getattr(self.processor, "image_token", None)
        return None if token is None else int(self.processor.tokenizer.convert_tokens_to_ids(token))

    def _starts_with_bos(self, prompt: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return bos is not None and prompt.startswith(bos)


@dataclass(frozen=True)
class _Spread:
    rows: list[list[int]]
    image_end: int
    sharable: bool


def _spread(plain: list[list[int]], expanded: list[int], placeholder: int | None) -> _Spread:
    """Insert the image tokens of the first processed prompt into all prompts.

    Placeholders are separate tokens, so the tokenization of what follows does not depend on their expansion.
    """
    first = plain[0]
    if first == expanded:  # one token per image
        image_end = replaced = max(
            (i + 1 for i, token in enumerate(first) if token == placeholder), default=0
        )
    else:
        before = common_length([first, expanded])
        after = common_length([first[before:][::-1], expanded[before:][::-1]])
        replaced, image_end = len(first) - after, len(expanded) - after
    sharable = replaced > 0 and all(row[:replaced] == first[:replaced] for row in plain)
    rows = [expanded[:image_end] + row[replaced:] if sharable else [] for row in plain]
    return _Spread(rows, image_end, sharable)


def _same(one: Any, other: Any) -> bool:
    return torch.is_tensor(one) and torch.is_tensor(other) and torch.equal(one, other)


def _is_per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == ids.shape and not value.is_floating_point()
