"""A curriculum for a small language model: questions about sentences, captions, questions about images.

A language model with random weights (or a small one without experience of multiple choice) must first learn
to find the correct option and to answer with its letter. This needs no pixels: in the first lesson a
sentence replaces the image. In the second the same sentence is the caption of an image, so that projector
and language model learn the image content. In the third they answer questions about images. Without the
second lesson the answers stay at chance for thousands of questions (docs/experiment.md).
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from mgll_encoder.common.errors import BadDataError
from mllm_adapters.data.captions import CAPTION_PROMPTS
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.data.row_shapes import IMAGE_TAG

WRITTEN_PICTURE = "The image shows {}."
"""Replaces an image in the lesson of words."""

OPTION = re.compile(r"([A-Z])\. (.+)")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about images.

    Attributes:
        images: Image paths, as in the conversations file.
        stem: Text before the options, without image tags.
        options: Texts of the options, without letters.
        instruction: Text after the options.
        answer: Index of the correct option.
    """

    images: tuple[str, ...]
    stem: str
    options: tuple[str, ...]
    instruction: str
    answer: int

    def reordered(self, order: Sequence[int]) -> Conversation:
        """Return the question about its images, with reordered options."""
        tags = f"{IMAGE_TAG}\n" * len(self.images)
        return self._conversation(self.images, tags, order, self.answer)

    def written(self, order: Sequence[int], answer: int) -> Conversation:
        """Return the question about a sentence that names option ``answer``, with reordered options."""
        return self._conversation((), f"{WRITTEN_PICTURE.format(self.options[answer])}\n", order, answer)

    def captioned(self, prompt: str) -> Conversation:
        """Return ``prompt`` about its images, answered by the sentence of the lesson of words."""
        said = WRITTEN_PICTURE.format(self.options[self.answer])
        return _turns(self.images, f"{IMAGE_TAG}\n" * len(self.images) + prompt, said)

    def _conversation(
        self, images: tuple[str, ...], picture: str, order: Sequence[int], answer: int
    ) -> Conversation:
        lines = [f"{letter}. {self.options[i]}" for letter, i in zip(ascii_uppercase, order, strict=False)]
        asked = "\n".join(part for part in (self.stem, *lines, self.instruction) if part)
        return _turns(images, picture + asked, ascii_uppercase[order.index(answer)])


def _turns(images: tuple[str, ...], asked: str, answered: str) -> Conversation:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return Conversation.model_validate({"image": images, "conversations": turns})


def read_question(row: Conversation) -> Question | None:
    """Parse a conversation as a multiple-choice question; None for anything else (a caption, a dialogue).

    Raises:
        UserError: the row has options, but its answer is not one of their letters.
    """
    if len(row.turns) != 2:
        return None
    asked = row.turns[0].value.replace(IMAGE_TAG, "").strip()
    lines = asked.splitlines()
    matches = [OPTION.fullmatch(line) for line in lines]
    lettered = [i for i, match in enumerate(matches) if match]
    options = [match for match in matches if match]
    if len(options) < 2 or "".join(m[1] for m in options) != ascii_uppercase[: len(options)]:
        return None
    if lettered[-1] - lettered[0] != len(lettered) - 1:
        return None
    letter = row.turns[1].value.strip().rstrip(".")
    if letter not in [match[1] for match in options]:
        raise BadDataError(
            f"id {row.id!r}: the answer is '{row.turns[1].value}', expected a letter from A to {options[-1][1]}, "
            "one of its options"
        )
    return Question(
        images=row.images,
        stem="\n".join(lines[: lettered[0]]),
        options=tuple(match[2] for match in options),
        instruction="\n".join(lines[lettered[-1] + 1 :]),
        answer=ascii_uppercase.index(letter),
    )


def word_lesson(questions: Sequence[Question], count: int, seed: int) -> Iterator[Conversation]:
    """Yield ``count`` questions about sentences; every option is correct equally often."""
    draw = random.Random(seed)
    for _ in range(count):
        question = draw.choice(questions)
        order = draw.sample(range(len(question.options)), len(question.options))
        yield question.written(order, draw.choice(order))


def caption_lesson(questions: Sequence[Question], count: int, seed: int) -> Iterator[Conversation]:
    """Yield ``count`` captions: sentences of the lesson of words, as descriptions of images.

    Every answer is sampled equally often, so that a disease's frequency is not informative.
    """
    draw = random.Random(seed)
    for question in _balanced(questions, count, draw):
        yield question.captioned(draw.choice(CAPTION_PROMPTS))


def question_lesson(questions: Sequence[Question], count: int, seed: int) -> Iterator[Conversation]:
    """Yield ``count`` questions about images, their options in a new order each time.

    Every answer is sampled equally often: otherwise always choosing the most common disease is correct so
    often that a small language model never learns to use the image.
    """
    draw = random.Random(seed)
    for question in _balanced(questions, count, draw):
        yield question.reordered(draw.sample(range(len(question.options)), len(question.options)))


def _balanced(questions: Sequence[Question], count: int, draw: random.Random) -> Iterator[Question]:
    """Sample questions, with every answer text equally often."""
    by_answer: dict[str, list[Question]] = {}
    for question in questions:
        by_answer.setdefault(question.options[question.answer], []).append(question)
    groups = list(by_answer.values())
    for _ in range(count):
        yield draw.choice(draw.choice(groups))
