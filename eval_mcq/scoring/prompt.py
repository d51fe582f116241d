"""The exact prompt text. Frozen: a change of one character needs a new prompt version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eval_mcq.items.schema import LETTERS, MCQItem

Mode = Literal["letters", "options", "options-mean", "generate"]

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""The instruction of LLaVA-1.5's multiple-choice training data (haotian-liu/LLaVA, docs/Evaluation.md)."""

TEXT_INSTRUCTION = "Answer with the text of one of the given choices directly."
"""Its counterpart for comparing the likelihoods of option texts."""


@dataclass(frozen=True)
class Prompt:
    """A prompt format.

    Attributes:
        version: Recorded in every run; runs with different prompts are never compared.
        option: Template of one option; formatted with ``letter`` and ``text``.
        instruction: The line below the options.
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
    """Return the index of the option shown at each position: options are shifted by ``rotation`` positions."""
    return [(place + rotation) % options for place in range(options)]


def rotations_of(options: int, rotations: int) -> int:
    """Return the number of distinct rotations of a question if ``rotations`` are requested."""
    return min(rotations, options)


def shown_letters(options: int, rotation: int) -> str:
    """Return the letter shown for each option, with options in their original order."""
    places = order(options, rotation)
    return "".join(LETTERS[places.index(option)] for option in range(options))


def render(item: MCQItem, rotation: int = 0, prompt: Prompt = LETTER_PROMPT) -> str:
    """Render the user's turn for a question, without image placeholders and chat template."""
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
        """The letter shown for each option."""
        return shown_letters(len(self.item.options), self.rotation)
