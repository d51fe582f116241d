"""The results as a table for a page: parts of a few arms, with a disease's questions and chance below its name."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval_mcq.tables.entries import Entry, entries_of, order_entries
from eval_mcq.tables.results import Comparison
from eval_mcq.tables.rounding import Rounding

BESIDE = 4
"""Arms beside the first one in a table, with gain and p-value; so many fit in 1280 pixels. With a column of unread
replies, one fewer."""


@dataclass(frozen=True)
class Results:
    """A table for a page.

    Attributes:
        blocks: Rows: diseases, averages, and averages of single orders of the options.
        parts: Indices of the arms of each part; the first arm is in all of them.
        unread: Whether there is a column of replies that could not be parsed.
    """

    blocks: Sequence[Sequence[Entry]]
    parts: Sequence[Sequence[int]]
    unread: bool

    @property
    def average(self) -> Entry:
        """The macro average."""
        return self.blocks[1][0]


def results_of(comparison: Comparison) -> Results:
    """Lay out a comparison."""
    rounding, diseases = Rounding(), len(comparison.categories)
    entries, orders = entries_of(comparison, rounding), order_entries(comparison, rounding)
    unread = any(arm.diagnosis.unread for arm in comparison.arms)
    others, beside = range(1, len(comparison.arms)), BESIDE - unread
    parts = [[0, *others[start : start + beside]] for start in range(0, len(others), beside)]
    blocks = [block for block in (entries[:diseases], entries[diseases:], orders) if block]
    return Results(blocks, parts or [[0]], unread)
