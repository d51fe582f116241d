"""What a comparison found: per disease, macro, micro, and gains."""

from dataclasses import dataclass

import numpy as np

from eval_mcq.tables.bias_report import Diagnosis
from eval_mcq.tables.intervals import Estimate, Interval


@dataclass(frozen=True)
class Cell:
    """Right answers of an arm on a disease, with the interval of their share.

    Attributes:
        right: Number of questions answered correctly.
        n: Number of questions.
        interval: Interval of the share, see `eval_mcq.tables.intervals`.
        p_guess: Probability that guessing gets at least as many right.
        patients: Number of patients (or images) of the questions.
        unread: Replies that could not be parsed.
    """

    right: int
    n: int
    interval: Interval
    p_guess: float
    patients: int
    unread: int = 0

    @property
    def share(self) -> float:
        """Accuracy, 0-1."""
        return self.right / self.n


@dataclass(frozen=True)
class Gain:
    """An arm compared with another one on the same questions.

    Attributes:
        estimate: Difference of the shares; None with too few patients.
        p: Exact McNemar p-value.
        p_holm: The same, Holm-adjusted over the diseases of this arm.
        patients: Number of patients (or images) of the questions.
    """

    estimate: Estimate | None
    p: float
    p_holm: float
    patients: int


@dataclass(frozen=True)
class Average:
    """An unweighted mean over diseases.

    Attributes:
        estimate: The mean.
        gain: Difference to the reference arm; None for the first arm, and with too few patients.
    """

    estimate: Estimate
    gain: Estimate | None


@dataclass(frozen=True)
class Contrast:
    """Two arms whose difference is not among the gains of the table.

    Attributes:
        name: The arm.
        against: The arm that it is compared with.
        macro: Difference of the macro averages; None with too few patients.
        micro: Difference of the micro averages, with McNemar over all questions.
    """

    name: str
    against: str
    macro: Estimate | None
    micro: Gain


@dataclass(frozen=True)
class Arm:
    """One model in the table.

    Attributes:
        name: Row or column heading.
        against: Reference arm of its gains: the control, for the control itself the first arm; empty for the first arm.
        cells: Results per disease.
        macro: Unweighted mean over diseases: the "Average" of the table.
        micro: Mean over all questions.
        gains: Gains per disease against the reference; empty for the first arm.
        macro_gain: Difference of the macro averages; None with too few patients.
        micro_gain: Difference of the micro averages, with McNemar over all questions.
        one_order: Average with every order of the options scored separately; None with a single order.
        every_order: Average of questions that are right in every order (CircularEval); None with a single order.
        letter_mass: Mean probability of the option letters; None if the scoring mode has none.
        letters: Per letter: how often true, how often chosen.
        p_guess: Probability that guessing gets at least as many questions right, over all diseases.
        diagnosis: Bias and calibration.
        leak: Test images that the model was trained on, in words; empty if unknown.
        answered_by: The program that answered; empty for this project's engine.
    """

    name: str
    against: str
    cells: dict[str, Cell]
    macro: Estimate
    micro: Estimate
    gains: dict[str, Gain]
    macro_gain: Estimate | None
    micro_gain: Gain | None
    one_order: Average | None
    every_order: Average | None
    letter_mass: float | None
    letters: dict[str, tuple[int, int]]
    p_guess: float
    diagnosis: Diagnosis
    leak: str = ""
    answered_by: str = ""


@dataclass(frozen=True)
class Comparison:
    """All values of a table.

    Attributes:
        bench: Name of the benchmark.
        mode: Scoring mode.
        prompt: Prompt version.
        categories: Diseases with answers, in table order.
        unanswered: Diseases of the benchmark without an answer.
        answered: Number of questions answered.
        questions: Number of questions in the benchmark.
        clusters: Number of patients (or images).
        orders: Maximum number of orders of each question's options.
        chance: Accuracy of guessing, per disease.
        chance_every_order: Share that guessing gets right in every order, averaged over diseases.
        arms: The arms in the given order.
        contrasts: All pairs of arms without a gain.
        left_out: What was skipped when the benchmark was built, by reason.
    """

    bench: str
    mode: str
    prompt: str
    categories: list[str]
    unanswered: list[str]
    answered: int
    questions: int
    clusters: int
    orders: int
    chance: dict[str, float]
    chance_every_order: float
    arms: list[Arm]
    contrasts: list[Contrast]
    left_out: dict[str, int]

    @property
    def macro_chance(self) -> float:
        """Accuracy of guessing, averaged over diseases."""
        return float(np.mean(list(self.chance.values())))

    @property
    def micro_chance(self) -> float:
        """Accuracy of guessing, averaged over questions."""
        cells = self.arms[0].cells
        return sum(self.chance[c] * cells[c].n for c in self.categories) / self.answered
