"""Scoring modes: the outputs that are needed after a prompt, and how an option is chosen from them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval_mcq.items.schema import LETTERS
from eval_mcq.scoring.answer_parser import PARSER_VERSION, parse_reply
from eval_mcq.scoring.prompt import PROMPTS, Ask, Mode, order
from mgll_encoder.common.errors import BadDataError, UserError

if TYPE_CHECKING:
    import torch

    from eval_mcq.scoring.requests import Continuations, PromptTokenizer

    Found = list[list[torch.Tensor]]

SCORING_VERSION = "scoring-1"
"""Recorded in every run; incremented whenever the scores of a given model, image and prompt change.

Prompts, answer parser and image reader have their own versions. The scores of this version are in
``tests/eval_mcq/golden_scoring.json``.
"""


@dataclass(frozen=True)
class Score:
    """The answer to one question in one rotation; everything in the options' original order.

    Attributes:
        probabilities: Probabilities of the options.
        letter_mass: Total probability of the offered letters within the whole vocabulary; near zero, the model does not
            answer with letters, and the choice among them means little.
        log_likelihoods: Log-likelihoods of the option texts, summed over tokens.
        tokens: Number of these tokens.
        reply: The model's reply.
    """

    probabilities: list[float]
    letter_mass: float | None = None
    log_likelihoods: list[float] | None = None
    tokens: list[int] | None = None
    reply: str | None = None

    @property
    def choice(self) -> int | None:
        """Index of the chosen option, the first on exact ties; None if a reply could not be parsed."""
        best = max(self.probabilities)
        return self.probabilities.index(best) if best > 0 else None


@dataclass(frozen=True)
class Likelihood:
    """A mode that computes probabilities and generates nothing.

    Attributes:
        continuations: Returns what is needed after a prompt.
        score: Computes the score from the results.
    """

    continuations: "Continuations"
    score: "Callable[[Ask, Found], Score]"


def _want_letters(
    writer: "PromptTokenizer", ask: Ask, prompt: str
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Request all tokens of all offered letters, letter by letter, directly after the prompt."""
    with _naming(ask):
        ids = writer.letter_ids(prompt, len(ask.item.options))
    return [[]], [[[token for of_letter in ids[: len(ask.item.options)] for token in of_letter]]]


def _score_letters(ask: Ask, found: "Found") -> Score:
    """Compute a softmax over letters; the probability of a letter is summed over its tokens."""
    ((log_probabilities,),) = found
    # Every letter has the same number of tokens, see `PromptTokenizer.letter_ids`.
    letters = log_probabilities.reshape(len(ask.item.options), -1).logsumexp(dim=1)
    shown = letters.softmax(dim=0).tolist()
    places = [LETTERS.index(letter) for letter in ask.letters]
    return Score([shown[place] for place in places], letter_mass=float(letters.logsumexp(dim=0).exp()))


def _want_texts(
    writer: "PromptTokenizer", ask: Ask, prompt: str
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Request each token of each option's text."""
    with _naming(ask):
        tails = [writer.continuation(prompt, text) for text in ask.item.options]
    return tails, [[[token] for token in tail] for tail in tails]


def _score_texts(per_token: bool) -> "Callable[[Ask, Found], Score]":
    def score(ask: Ask, found: "Found") -> Score:  # noqa: ARG001 - texts are in their original order
        import torch

        sums = torch.stack([torch.cat(of_option).sum() for of_option in found])
        tokens = torch.tensor([len(of_option) for of_option in found])
        chosen_by = sums / tokens if per_token else sums
        return Score(chosen_by.softmax(dim=0).tolist(), log_likelihoods=sums.tolist(), tokens=tokens.tolist())

    return score


@contextmanager
def _naming(ask: Ask) -> Iterator[None]:
    """Name the question in an error."""
    try:
        yield
    except UserError as error:
        raise BadDataError(f"question '{ask.item.id}': {error}") from None


LIKELIHOODS: Mapping[Mode, Likelihood] = {
    "letters": Likelihood(_want_letters, _score_letters),
    "options": Likelihood(_want_texts, _score_texts(per_token=False)),
    "options-mean": Likelihood(_want_texts, _score_texts(per_token=True)),
}
"""Modes that compute probabilities; ``generate`` writes a reply instead."""


def parsed(ask: Ask, reply: str) -> Score:
    """Read a written reply: probability 1 for the option that it names, 0 for all if it names none."""
    places = order(len(ask.item.options), ask.rotation)
    place = parse_reply(reply, [ask.item.options[option] for option in places])
    probabilities = [0.0] * len(places)
    if place is not None:
        probabilities[places[place]] = 1.0
    return Score(probabilities, reply=reply.strip())


def prompt_version(mode: Mode) -> str:
    """Return the version of a mode's prompt, and of its answer parser if it has one."""
    version = PROMPTS[mode].version
    return version if mode in LIKELIHOODS else f"{version}, {PARSER_VERSION}"


def chosen_letter(score: Score) -> str | None:
    """Return the chosen option's letter in the benchmark."""
    return None if score.choice is None else LETTERS[score.choice]


def rounded(values: Sequence[float], digits: int = 6) -> list[float]:
    """Round values for storage."""
    return [round(value, digits) for value in values]
