"""How a model chose: position bias, calibration, unparsed replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval_mcq.items.schema import LETTERS
from eval_mcq.records.run_record import Run
from eval_mcq.tables.calibration import Calibration, calibration


@dataclass(frozen=True)
class Position:
    """One position among the options, over all rotations.

    Attributes:
        true: How often the true option was there.
        chosen: How often the option there was chosen.
        right: How often both.
    """

    true: int
    chosen: int
    right: int

    @property
    def recall(self) -> float | None:
        """Share of right answers if the true option was there; None if it never was."""
        return self.right / self.true if self.true else None


@dataclass(frozen=True)
class Diagnosis:
    """How an arm chose.

    Attributes:
        positions: Letter -> its counts.
        unread: Replies that could not be parsed; they count as wrong.
        rows: Total number of replies: questions times rotations.
        calibration: Calibration of the probabilities averaged over rotations; None for written replies.
    """

    positions: dict[str, Position]
    unread: int
    rows: int
    calibration: Calibration | None


def diagnose(run: Run) -> Diagnosis:
    """Compute the bias report of a run."""
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
