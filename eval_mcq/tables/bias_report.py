"""How a model chose, beside how often it was right: position bias, calibration, unread replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval_mcq.items.schema import LETTERS
from eval_mcq.records.run_record import Run
from eval_mcq.tables.calibration import Calibration, calibration


@dataclass(frozen=True)
class Position:
    """One place among the options, over all rotations.

    Attributes:
        true: How often the true option stood there.
        chosen: How often the option there was chosen.
        right: How often both.
    """

    true: int
    chosen: int
    right: int

    @property
    def recall(self) -> float | None:
        """Share of right answers where the true option stood there; None if it never did."""
        return self.right / self.true if self.true else None


@dataclass(frozen=True)
class Diagnosis:
    """How an arm chose.

    Attributes:
        positions: Letter to what became of it.
        unread: Replies that could not be read; they count as wrong.
        rows: Replies in all: questions times rotations.
        calibration: Of the probabilities averaged over rotations; None where replies were read instead.
    """

    positions: dict[str, Position]
    unread: int
    rows: int
    calibration: Calibration | None

    @property
    def recalls(self) -> dict[str, float]:
        """Recall per letter under which a true option ever stood."""
        return {letter: p.recall for letter, p in self.positions.items() if p.recall is not None}


def diagnose(run: Run) -> Diagnosis:
    """How the model of a run chose."""
    answers = run.answers
    rows = [row for answer in answers for row in answer.rows]
    soft = run.record.mode != "generate"
    return Diagnosis(
        positions=_positions(
            [row.as_shown(row.gold) for row in rows],
            [None if row.chosen is None else row.as_shown(row.chosen) for row in rows],
            max(len(answer.probabilities) for answer in answers),
        ),
        unread=sum(answer.unparsed for answer in answers),
        rows=len(rows),
        calibration=calibration(
            [answer.probabilities for answer in answers], [LETTERS.index(answer.gold) for answer in answers]
        )
        if soft
        else None,
    )


def _positions(true: Sequence[str], chosen: Sequence[str | None], options: int) -> dict[str, Position]:
    pairs = np.array(
        [(LETTERS.index(t), LETTERS.index(c) if c else -1) for t, c in zip(true, chosen, strict=True)]
    )
    right = pairs[pairs[:, 0] == pairs[:, 1], 0]
    counts = [np.bincount(of, minlength=options) for of in (pairs[:, 0], pairs[pairs[:, 1] >= 0, 1], right)]
    return {
        letter: Position(*(int(count[i]) for count in counts)) for i, letter in enumerate(LETTERS[:options])
    }
