"""Training examples: conversations in the model's own words, with labels on the answers and nowhere else.

All text is rendered and counted before training begins; images are opened only when their row is trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.images import open_image
from mllm_adapters.conversations import Conversation, Corpus

IGNORED = -100
"""Label of positions that carry no loss (PyTorch's default ``ignore_index``)."""

TOKEN_TYPES = "mm_token_type_ids"
"""What some processors say of each position beside its id: text (0), image, video; Qwen's models place tokens by it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered conversation.

    Attributes:
        images: Paths below the image folder, in the order of their placeholders.
        text: The rendered text; one placeholder per image.
        answers: Where the assistant's answers stand in ``text``, each with its end-of-turn token.
    """

    images: tuple[str, ...]
    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows of a file: ``rows`` = ``kept`` + ``text_only`` + ``too_long``."""

    rows: int
    images: int
    kept: int
    text_only: int
    too_long: int


def prepare_examples(
    corpus: Corpus, processor: Any, max_length: int, text_only: bool
) -> tuple[list[Example], DataCounts]:
    """Render and count the rows of a corpus.

    Args:
        corpus: Checked conversations.
        processor: The model's processor, or None where the model has none.
        max_length: Longest example in tokens, image tokens included; longer ones are left out, never cut.
        text_only: Whether rows without an image are kept.

    Raises:
        UserError: see `check_processor` and `render`; or no row is left.
    """
    check_processor(processor)
    rows = [row for row in corpus.rows if row.images or text_only]
    tokens_per_image: dict[tuple[int, int], int] = {}
    kept: list[Example] = []
    for row in track(rows, "rendering conversations"):
        example = render(row, processor)
        special = _adds_special_tokens(example.text, processor)
        length = len(processor.tokenizer(example.text, add_special_tokens=special)["input_ids"])
        for size in (corpus.sizes[name] for name in example.images):
            if size not in tokens_per_image:
                tokens_per_image[size] = _image_tokens(size, processor)
            length += tokens_per_image[size] - 1  # the placeholder itself is counted already
        if length <= max_length:
            kept.append(example)
    counts = DataCounts(
        rows=len(corpus.rows),
        images=len(corpus.sizes),
        kept=len(kept),
        text_only=len(corpus.rows) - len(rows),
        too_long=len(rows) - len(kept),
    )
    if not kept:
        raise UserError(
            f"{corpus.path}: none of {counts.rows} rows can be trained on: {counts.text_only} have no image, "
            f"{counts.too_long} are longer than {max_length} tokens (--max-length)"
        )
    return kept, counts


def check_processor(processor: Any) -> None:
    """See to it that training examples can be made with this processor.

    Raises:
        UserError: there is none, it has no chat template, it writes text that its chat template does not, or its
            tokenizer gives no character offsets.
    """
    if processor is None:
        raise UserError(
            "the model folder holds no tokenizer, so text cannot be read: add its processor files"
        )
    if not processor.chat_template:
        raise UserError("the model's processor has no chat template: add chat_template.jinja to its folder")
    if getattr(processor, "use_default_system_prompt", False):  # of Janus: it would shift the labels
        raise UserError(
            "the model's processor puts a system prompt before what its chat template writes: set "
            "use_default_system_prompt to false in processor_config.json, and write the prompt into the template"
        )
    if not processor.tokenizer.is_fast:
        raise UserError("the model's tokenizer gives no character offsets: add its tokenizer.json")


def render(conversation: Conversation, processor: Any) -> Example:
    """Render a conversation and find its answers, by rendering every prompt that precedes one.

    An answer begins where the generation prompt ends, and ends with what the template puts after it, trailing
    white space excepted.

    Raises:
        UserError: a prompt is no prefix of the whole (a template that rewrites history), or the template does
            not place the images.
    """
    messages = conversation.messages()
    text = processor.apply_chat_template(messages)
    answers = []
    for index in range(1, len(messages), 2):
        prompt = processor.apply_chat_template(messages[:index], add_generation_prompt=True)
        answered = processor.apply_chat_template(messages[: index + 1])
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise UserError(
                "the model's chat template cannot be used for training: the prompt of answer "
                f"{index // 2 + 1} (id {conversation.id!r}) is not what the whole conversation begins with"
            )
        answers.append((len(prompt), len(answered.rstrip())))
    placeholders = text.count(processor.image_token)
    if placeholders != len(conversation.images):
        raise UserError(
            f"id {conversation.id!r} has {len(conversation.images)} images, its rendered text {placeholders} "
            f"{processor.image_token}: the chat template must write one per image, and the data none"
        )
    return Example(conversation.images, text, tuple(answers))


def encode(example: Example, folder: Path, processor: Any) -> dict[str, Tensor]:
    """Tokens, labels and pixels of one example.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of shape (T,), likewise `TOKEN_TYPES` where the processor
        gives them, and what it makes of the images. ``labels`` are the ids of the answers' tokens, and `IGNORED`
        elsewhere, at images above all.

    Raises:
        UserError: an image is missing or damaged.
    """
    images = [open_image(folder / name) for name in example.images]
    features = processor(
        text=[example.text],
        images=images or None,
        **_instruction(example, processor),
        add_special_tokens=_adds_special_tokens(example.text, processor),
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    offsets = features.pop("offset_mapping")[0]
    placeholders = features.pop("text_replacement_offsets")[0]
    input_ids, mask = features.pop("input_ids")[0], features.pop("attention_mask")[0]
    labels = torch.full_like(input_ids, IGNORED)
    for span in example.answers:
        start, end = (_after_expansion(position, placeholders) for position in span)
        inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero().flatten()
        # Everything from first to last: some tokenizers give white space inside an answer an empty offset.
        answer = slice(int(inside[0]), int(inside[-1]) + 1)
        labels[answer] = input_ids[answer]
    text = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    if TOKEN_TYPES in features:
        text[TOKEN_TYPES] = features.pop(TOKEN_TYPES)[0]
    return {**text, **features}


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Examples, encoded when asked for: images are opened in the data loader's workers and not kept."""

    def __init__(self, examples: Sequence[Example], folder: Path, processor: Any) -> None:
        self.examples, self.folder, self.processor = examples, folder, processor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return encode(self.examples[index], self.folder, self.processor)


@dataclass(frozen=True)
class Collator:
    """Batches encoded examples: text padded on the right, images one after another.

    Attributes:
        pad_token_id: Fills ``input_ids``; masked from attention and loss.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of shape (B, T) for the text, (images of the batch, ...) for what belongs to images."""
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        if TOKEN_TYPES in batch[0]:
            fill[TOKEN_TYPES] = 0
        text = {
            name: pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        of_images = sorted({name for row in batch for name in row} - fill.keys())
        return text | {name: _joined([row[name] for row in batch if name in row]) for name in of_images}


class AnswerCollator(Collator):
    """Batches examples so that logits are computed at answers only: a vocabulary is wide, answers are short."""

    def __call__(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """As `Collator`, with ``logits_to_keep`` (positions whose next token is learnt) and ``shift_labels``."""
        tensors = super().__call__(batch)
        following = tensors["labels"][:, 1:]
        positions = (following != IGNORED).any(dim=0).nonzero().flatten()
        return tensors | {"logits_to_keep": positions, "shift_labels": following[:, positions].contiguous()}


def _instruction(example: Example, processor: Any) -> dict[str, Any]:
    """For a processor that wants it apart (a Q-Former reads it): what comes before the first answer."""
    if not getattr(processor, "takes_instructions", False):
        return {}
    return {"instructions": [example.text[: example.answers[0][0]]]}


def _joined(values: Sequence[Tensor]) -> Tensor:
    """One after another; instructions (n, Q) of different lengths are filled with zeros, which their mask hides."""
    if values[0].ndim == 2 and not values[0].is_floating_point():
        longest = max(value.shape[1] for value in values)
        values = [torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values]
    return torch.cat(list(values))


def _adds_special_tokens(text: str, processor: Any) -> bool:
    """Whether the tokenizer must add its own: not where the template has written the first one already."""
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


def _image_tokens(size: tuple[int, int], processor: Any) -> int:
    """How many tokens an image of this size becomes, by asking the processor."""
    blank = Image.new("RGB", size)
    features = processor(text=[processor.image_token], images=[blank], add_special_tokens=False)
    return len(features["input_ids"][0])


def _after_expansion(position: int, placeholders: Sequence[Mapping[str, Any]]) -> int:
    """Where a character stands after the placeholders before it have been expanded."""
    for placeholder in reversed(placeholders):
        if placeholder["span"][1] <= position:
            return int(position + placeholder["new_span"][1] - placeholder["span"][1])
    return position
