"""Scoring modes: what is wanted of a model after a prompt, and how an option is chosen from it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval_mcq.items.schema import LETTERS
from eval_mcq.scoring.answer_parser import PARSER_VERSION
from eval_mcq.scoring.prompt import PROMPTS, Ask, Mode
from mgll_encoder.common.errors import UserError

if TYPE_CHECKING:
    import torch

    from eval_mcq.scoring.requests import Continuations, PromptTokenizer

    Found = list[list[torch.Tensor]]

SCORING_VERSION = "scoring-1"
"""Recorded in every run: a change of the numbers that a model, a picture and a prompt give needs a new one.

Prompts, the parser of replies and the reader of pictures have versions of their own. What the numbers of this version
are is kept in ``tests/eval_mcq/golden_scoring.json``.
"""


@dataclass(frozen=True)
class Score:
    """The answer to one question in one rotation; everything in the options' original order.

    Attributes:
        probabilities: Of the options.
        letter_mass: Probability of all offered letters together within the whole vocabulary; near zero means that the
            model does not answer with letters at all, and the choice among them says little.
        log_likelihoods: Of the option texts, summed over tokens.
        tokens: Number of these tokens.
        reply: What the model wrote.
    """

    probabilities: list[float]
    letter_mass: float | None = None
    log_likelihoods: list[float] | None = None
    tokens: list[int] | None = None
    reply: str | None = None

    @property
    def choice(self) -> int | None:
        """Index of the chosen option; of exactly equal ones the first; None where a reply could not be read."""
        best = max(self.probabilities)
        return self.probabilities.index(best) if best > 0 else None


@dataclass(frozen=True)
class Likelihood:
    """A mode that reads probabilities and writes nothing.

    Attributes:
        continuations: What is wanted after a prompt.
        score: The answer, from what was found.
    """

    continuations: "Continuations"
    score: "Callable[[Ask, Found], Score]"


def _want_letters(
    writer: "PromptTokenizer", ask: Ask, prompt: str
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """All tokens of all offered letters, letter by letter, right after the prompt."""
    with _naming(ask):
        ids = writer.letter_ids(prompt, len(ask.item.options))
    return [[]], [[[token for of_letter in ids[: len(ask.item.options)] for token in of_letter]]]


def _score_letters(ask: Ask, found: "Found") -> Score:
    """Softmax over letters; each letter is the sum of the tokens that write it."""
    ((log_probabilities,),) = found
    # Every letter is written in the same number of ways, see `Writer.letter_ids`.
    letters = log_probabilities.reshape(len(ask.item.options), -1).logsumexp(dim=1)
    shown = letters.softmax(dim=0).tolist()
    places = [LETTERS.index(letter) for letter in ask.letters]
    return Score([shown[place] for place in places], letter_mass=float(letters.logsumexp(dim=0).exp()))


def _want_texts(
    writer: "PromptTokenizer", ask: Ask, prompt: str
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Each token of each option's text."""
    with _naming(ask):
        tails = [writer.continuation(prompt, text) for text in ask.item.options]
    return tails, [[[token] for token in tail] for tail in tails]


def _score_texts(per_token: bool) -> "Callable[[Ask, Found], Score]":
    def score(ask: Ask, found: "Found") -> Score:  # noqa: ARG001 - texts come in their original order
        import torch

        sums = torch.stack([torch.cat(of_option).sum() for of_option in found])
        tokens = torch.tensor([len(of_option) for of_option in found])
        chosen_by = sums / tokens if per_token else sums
        return Score(chosen_by.softmax(dim=0).tolist(), log_likelihoods=sums.tolist(), tokens=tokens.tolist())

    return score


@contextmanager
def _naming(ask: Ask) -> Iterator[None]:
    """Say in an error which question it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"question '{ask.item.id}': {error}") from None


LIKELIHOODS: Mapping[Mode, Likelihood] = {
    "letters": Likelihood(_want_letters, _score_letters),
    "options": Likelihood(_want_texts, _score_texts(per_token=False)),
    "options-mean": Likelihood(_want_texts, _score_texts(per_token=True)),
}
"""Modes that read probabilities; ``generate`` writes instead."""


def prompt_version(mode: Mode) -> str:
    """Version of a mode's prompt, and of the parser where it has one."""
    version = PROMPTS[mode].version
    return version if mode in LIKELIHOODS else f"{version}, {PARSER_VERSION}"


def chosen_letter(score: Score) -> str | None:
    """The chosen option's letter in the bench."""
    return None if score.choice is None else LETTERS[score.choice]


def rounded(values: Sequence[float], digits: int = 6) -> list[float]:
    """Values as they are stored."""
    return [round(value, digits) for value in values]
