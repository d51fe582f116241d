"""Statistical tests for counts of right answers."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Compute the two-sided exact McNemar p-value for two models on the same questions, shape ``(n,)`` each.

    Only questions that one model gets right and the other wrong count; without any, p is 1.
    """
    return exact_mcnemar(int((after & ~before).sum()), int((before & ~after).sum()))


def exact_mcnemar(gained: int, lost: int) -> float:
    """Compute the same p-value from the numbers of questions gained and lost."""
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def p_of_guessing(right: int, questions: Mapping[int, int]) -> float:
    """Compute the probability that guessing gets at least as many questions right.

    Exact: binomial if all questions have the same number of options, Poisson-binomial otherwise.

    Args:
        right: Number of right answers.
        questions: Number of options -> number of questions with that many.
    """
    *others, (options, n) = sorted(questions.items(), key=lambda entry: entry[1])
    chances = np.ones(1)  # probability of 0, 1, 2 ... right among the others
    for few_options, count in others:
        chances = np.convolve(chances, binom.pmf(np.arange(count + 1), count, 1 / few_options))
    beyond = binom.sf(right - 1 - np.arange(len(chances)), n, 1 / options)
    return min(1.0, float(chances @ beyond))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values with Holm's step-down procedure, in the given order (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
