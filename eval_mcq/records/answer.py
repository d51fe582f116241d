"""An answer of a run: to one question in one rotation of its options, and to a question in all its rotations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from eval_mcq.items.schema import LETTERS, MCQItem, Text
from eval_mcq.scoring.prompt import shown_letters

OPTIONAL = ("letter_mass", "log_likelihoods", "tokens", "reply")
"""Fields of an answer that only some scoring modes set; omitted from the file if empty."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A probability."""

Finite = Annotated[float, Field(allow_inf_nan=False)]

Texts = Annotated[list[Text], Field(min_length=1)]


class Answer(BaseModel):
    """One line of ``answers.jsonl``: a question in one rotation of its options.

    Letters and probabilities refer to the options in their *original* order, as in the benchmark, in any rotation.

    Attributes:
        id: The question.
        rotation: The option shown at position p is number ``(p + rotation) % options``.
        category: Its disease.
        cluster: Patient (or image) by which answers are clustered.
        images_sha256: Hashes of its images.
        gold: True letter.
        chosen: Chosen letter; None if a reply could not be parsed.
        probabilities: Probabilities of the options; for a parsed reply 1 for its option, for an unparsed one all 0.
        shown: The letter shown for each option, as one string.
        letter_mass: Probability of the offered letters within the whole vocabulary.
        log_likelihoods: Log-likelihoods of the option texts, summed over their tokens.
        tokens: Number of those tokens.
        reply: The model's reply.
        run: Fingerprint of the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    rotation: int = Field(default=0, ge=0, lt=len(LETTERS))
    category: Text
    cluster: Text
    images_sha256: Texts
    gold: str
    chosen: str | None
    probabilities: list[Share] = Field(min_length=2, max_length=len(LETTERS))
    shown: str = ""
    letter_mass: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    log_likelihoods: list[Finite] | None = None
    tokens: list[Annotated[int, Field(ge=0)]] | None = None
    reply: str | None = None
    run: str = ""

    @model_validator(mode="before")
    @classmethod
    def _shown(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "shown" in data:
            return data
        probabilities, rotation = data.get("probabilities"), data.get("rotation", 0)
        if isinstance(probabilities, list) and isinstance(rotation, int) and len(probabilities) > 1:
            return {**data, "shown": shown_letters(min(len(probabilities), len(LETTERS)), rotation)}
        return data

    @model_validator(mode="after")
    def _letters_fit(self) -> "Answer":
        options = len(self.probabilities)
        if self.rotation >= options:
            raise ValueError(f"field 'rotation' is {self.rotation}, but there are {options} options")
        shown = shown_letters(options, self.rotation)
        if self.shown != shown:
            raise ValueError(f"field 'shown' is not '{shown}', as expected for rotation {self.rotation}")
        for field, letter in (("gold", self.gold), ("chosen", self.chosen)):
            if letter is not None and not (len(letter) == 1 and letter in shown):
                raise ValueError(
                    f"field '{field}' is not one of the letters {LETTERS[0]}-{LETTERS[options - 1]}"
                )
        for field, of_options in (("log_likelihoods", self.log_likelihoods), ("tokens", self.tokens)):
            if of_options is not None and len(of_options) != options:
                raise ValueError(f"field '{field}' has {len(of_options)} entries for {options} options")
        return self

    @property
    def key(self) -> tuple[str, int]:
        """Question and rotation, which are unique in a run."""
        return self.id, self.rotation

    @property
    def about(self) -> int:
        """Hash of the fields that are equal in all rotations of a question."""
        return hash((self.category, self.cluster, self.gold, len(self.probabilities), *self.images_sha256))

    @property
    def right(self) -> bool:
        """Whether the true option was chosen."""
        return self.chosen == self.gold

    @property
    def chance(self) -> float:
        """Accuracy of random guessing."""
        return 1 / len(self.probabilities)

    def answers_item(self, item: MCQItem) -> bool:
        """Return whether it matches a question of the benchmark."""
        return (self.category, self.gold, len(self.probabilities)) == (
            item.category, item.letter, len(item.options)
        )  # fmt: skip

    def as_shown(self, letter: str) -> str:
        """Return the letter shown for an option, given its letter in the benchmark."""
        return self.shown[LETTERS.index(letter)]

    def line(self) -> str:
        """Return the line of the answers file."""
        empty = {name for name in OPTIONAL if getattr(self, name) is None}
        return self.model_dump_json(exclude=empty) + "\n"


@dataclass(frozen=True)
class ItemAnswer:
    """A question with the answers of all its rotations; has the fields of an `Answer`.

    Attributes:
        chosen: The option with the highest mean probability over rotations, or the most parsed replies; on ties that of
            the earliest rotation; None if no reply could be parsed.
        probabilities: Means over rotations.
        letter_mass: Mean over rotations; None if the scoring mode has none.
        rows: The answers, by rotation.
    """

    id: str
    category: str
    cluster: str
    images_sha256: list[str]
    gold: str
    chosen: str | None
    probabilities: list[float]
    letter_mass: float | None
    rows: tuple[Answer, ...]

    @classmethod
    def of(cls, rows: Sequence[Answer]) -> "ItemAnswer":
        """Combine the rotations of one question."""
        first = rows[0]
        mean = np.mean([row.probabilities for row in rows], axis=0)
        masses = [row.letter_mass for row in rows if row.letter_mass is not None]
        return cls(
            id=first.id,
            category=first.category,
            cluster=first.cluster,
            images_sha256=first.images_sha256,
            gold=first.gold,
            chosen=_chosen(mean.tolist(), rows),
            probabilities=mean.tolist(),
            letter_mass=float(np.mean(masses)) if masses else None,
            rows=tuple(rows),
        )

    @property
    def right(self) -> bool:
        """Whether the true option was chosen."""
        return self.chosen == self.gold

    @property
    def all_right(self) -> bool:
        """Whether the true option was chosen in every rotation (CircularEval, after open-compass/MMBench)."""
        return all(row.right for row in self.rows)

    @property
    def share_right(self) -> float:
        """Share of rotations in which the true option was chosen."""
        return sum(row.right for row in self.rows) / len(self.rows)

    @property
    def unparsed(self) -> int:
        """Number of rotations whose reply could not be parsed."""
        return sum(row.chosen is None for row in self.rows)

    @property
    def chance(self) -> float:
        """Accuracy of random guessing."""
        return 1 / len(self.probabilities)


def _chosen(mean: Sequence[float], rows: Sequence[Answer]) -> str | None:
    best = max(mean)
    if best <= 0:
        return None
    tied = [LETTERS[i] for i, p in enumerate(mean) if p >= best - 1e-9]
    return next((row.chosen for row in rows if row.chosen in tied), tied[0])


def letter_counts(answers: Iterable[ItemAnswer]) -> dict[str, tuple[int, int]]:
    """Return, for each letter *as shown*, the number of rows in which it was true and in which it was chosen."""
    rows = [row for answer in answers for row in answer.rows]
    used = max(len(row.probabilities) for row in rows)
    true = [row.as_shown(row.gold) for row in rows]
    chosen = [row.as_shown(row.chosen) for row in rows if row.chosen is not None]
    return {letter: (true.count(letter), chosen.count(letter)) for letter in LETTERS[:used]}
