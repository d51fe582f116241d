"""Figures of the experiment: arms over seeds, with 95 % intervals over patients and seeds.

One bootstrap for everything: a draw takes patients with replacement, the same ones for all arms, and seeds with
replacement, so that a gain is paired by question, patient and seed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval_mcq.api import load_benchmark
from eval_mcq.items.schema import MCQItem
from eval_mcq.records.run_record import load_run
from mgll_encoder.probing.linear import CONFIDENCE, REPLICATES, metrics, resampled

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Figure:
    """A value in % with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def gain(self) -> str:
        """With its sign."""
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True)
class Sample:
    """A quantity of one arm, in %.

    Attributes:
        values: Of each seed, [seeds].
        draws: The same under each resampling of the patients, [seeds, draws].
    """

    values: Floats
    draws: Floats

    @cached_property
    def figure(self) -> Figure:
        """The mean over seeds."""
        return _figure(float(self.values.mean()), self._resampled)

    def minus(self, other: "Sample") -> "Sample":
        """The gain over another arm, seed by seed; an arm without seeds of its own has one for all."""
        return Sample(self.values - other.values, self.draws - other.draws)

    def less(self, constant: float) -> "Sample":
        """What exceeds a constant, such as chance."""
        return Sample(self.values - constant, self.draws - constant)

    def share_of(self, other: "Sample") -> Figure:
        """The ratio of two means over seeds, in %; draws in which the other is 0 are left out."""
        below = np.where(other._resampled == 0, np.nan, other._resampled)
        value = float(self.values.mean() / other.values.mean()) if other.values.any() else np.nan
        return _figure(100 * value, 100 * self._resampled / below)

    @property
    def _resampled(self) -> Floats:
        seeds, draws = self.draws.shape
        taken = np.random.default_rng(0).integers(seeds, size=(seeds, draws))
        return np.asarray(np.take_along_axis(self.draws, taken, axis=0).mean(axis=0))


def _figure(value: float, draws: Floats) -> Figure:
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Figure(value, float(low), float(high))


def weights_of(patients: Sequence[str], draws: int = REPLICATES) -> Floats:
    """How often each row counts in each draw, [draws, n]: patients are drawn whole."""
    return np.concatenate(list(resampled(np.array(patients), draws, seed=0, chunk=draws)))


RARE = 3
"""Number of diseases that count as rare."""


class Answers:
    """The answers of several models to one bench.

    Args:
        bench: The bench.
        training: A training bench, which tells the rare diseases: those with the fewest questions.
    """

    def __init__(self, bench: Path, training: Path) -> None:
        self.items = sorted(load_benchmark(bench).items, key=lambda item: item.id)
        self.weights = weights_of([item.cluster for item in self.items])
        self.chance = np.array([1 / len(item.options) for item in self.items])
        self.several = _several_labels(self.items)
        self._diseases = np.array([item.category for item in self.items])
        learned = Counter(item.category for item in load_benchmark(training).items)
        self.rare = sorted(self.diseases, key=lambda disease: learned[disease])[:RARE]
        self._sources = np.array([item.source for item in self.items])

    @property
    def diseases(self) -> list[str]:
        """Diseases asked about, in order of appearance."""
        return list(dict.fromkeys(self._diseases.tolist()))

    def groups(self) -> dict[str, Bools]:
        """Name -> questions: all, of images with several labels, of rare diseases, of each source, of each disease.

        None is empty.
        """
        every = {
            "all": np.ones(len(self.items), dtype=bool),
            "several labels": self.several,
            "rare diseases": np.isin(self._diseases, self.rare),
        }
        sources = {source: self._sources == source for source in sorted(set(self._sources.tolist()))}
        found = every | sources | {disease: self._diseases == disease for disease in self.diseases}
        return {name: mask for name, mask in found.items() if mask.any()}

    def sample(self, runs: Sequence[Path], group: Bools) -> Sample:
        """Macro average of the accuracy within a group of questions, of one run per seed."""
        return _stacked([self._macro(self._right(run), group) for run in runs])

    def chance_of(self, group: Bools) -> float:
        """What guessing gets right on average, in %."""
        return float(self._macro(self.chance, group)[0])

    def _right(self, run: Path) -> Floats:
        answers = {answer.id: float(answer.right) for answer in load_run(run).answers}
        return np.array([answers[item.id] for item in self.items])

    def _macro(self, right: Floats, group: Bools) -> Floats:
        """Of the questions as they are, then under each draw, [1 + draws], in %."""
        weights = np.concatenate([np.ones((1, len(right))), self.weights])
        means = []
        for disease in self.diseases:
            mask = group & (self._diseases == disease)
            if mask.any():
                with np.errstate(invalid="ignore"):
                    means.append(weights[:, mask] @ right[mask] / weights[:, mask].sum(axis=1))
        return 100 * np.asarray(np.nanmean(means, axis=0))


def classified(scores: Sequence[Floats], truth: Bools, patients: Sequence[str]) -> dict[str, Sample]:
    """AUC and mAP, macro over labels, of one array of scores [test images, labels] per seed."""
    weights = np.concatenate([np.ones((1, len(truth))), weights_of(patients)])
    found = [np.nanmean(metrics(of_seed, truth, False, weights), axis=1) for of_seed in scores]
    return {name: _stacked([of_seed[:, i] for of_seed in found]) for i, name in enumerate(("AUC", "mAP"))}


def _stacked(rows: Sequence[Floats]) -> Sample:
    table = np.stack(rows)
    return Sample(table[:, 0], table[:, 1:])


def _several_labels(items: Sequence[MCQItem]) -> Bools:
    """Questions about an image that is also asked about another disease."""
    asked: dict[str, set[str]] = {}
    for item in items:
        asked.setdefault(item.images[0], set()).add(item.category)
    return np.array([len(asked[item.images[0]]) > 1 for item in items])


def markdown(headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """A table as lines of Markdown; keys of rows are their first cells."""
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()), ""]
