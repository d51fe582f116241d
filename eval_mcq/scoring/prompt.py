"""The exact text a model is asked. Frozen: a change of one character needs a new version of the prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eval_mcq.items.schema import LETTERS, MCQItem

Mode = Literal["letters", "options", "options-mean", "generate"]

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""The instruction of LLaVA-1.5's multiple-choice training data (haotian-liu/LLaVA, docs/Evaluation.md)."""

TEXT_INSTRUCTION = "Answer with the text of one of the given choices directly."
"""Its counterpart where the likelihood of option texts is compared."""


@dataclass(frozen=True)
class Prompt:
    """How a question is put.

    Attributes:
        version: Recorded in every run; runs with different prompts are never compared.
        option: How one option is written; formatted with ``letter`` and ``text``.
        instruction: What stands below the options.
    """

    version: str
    option: str
    instruction: str


LETTER_PROMPT = Prompt("letters-1", "{letter}. {text}", INSTRUCTION)
TEXT_PROMPT = Prompt("options-1", "- {text}", TEXT_INSTRUCTION)

PROMPTS: Mapping[Mode, Prompt] = {
    "letters": LETTER_PROMPT,
    "generate": LETTER_PROMPT,
    "options": TEXT_PROMPT,
    "options-mean": TEXT_PROMPT,
}
"""Scoring mode -> its prompt."""


def order(options: int, rotation: int) -> list[int]:
    """Number of the option that is shown at each place: everything moves up by ``rotation`` places."""
    return [(place + rotation) % options for place in range(options)]


def rotations_of(options: int, rotations: int) -> int:
    """In how many different rotations a question is put when ``rotations`` are asked for."""
    return min(rotations, options)


def shown_letters(options: int, rotation: int) -> str:
    """The letter under which each option is shown, options in their original order."""
    places = order(options, rotation)
    return "".join(LETTERS[places.index(option)] for option in range(options))


def render(item: MCQItem, rotation: int = 0, prompt: Prompt = LETTER_PROMPT) -> str:
    """The user's turn for a question, without image placeholders and without a chat template."""
    shown = [item.options[option] for option in order(len(item.options), rotation)]
    lines = [
        prompt.option.format(letter=letter, text=text) for letter, text in zip(LETTERS, shown, strict=False)
    ]
    return "\n".join([item.question, *lines, prompt.instruction])


@dataclass(frozen=True)
class Ask:
    """A question in one rotation of its options."""

    item: MCQItem
    rotation: int = 0

    @property
    def letters(self) -> str:
        """The letter under which each option is shown."""
        return shown_letters(len(self.item.options), self.rotation)
