"""Counting what a builder leaves out, and why."""

from collections import Counter

from mgll_encoder.common.errors import UserError


class Skipped:
    """Rows that are left out: counted by reason, with the first of each named; or refused at once.

    Args:
        strict: Stop at the first instead of counting.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, detail: str, trouble: bool = True) -> None:
        """Leave a row out.

        Args:
            reason: The kind of trouble, in a few words; the key of the count.
            detail: One line that names file, row and value.
            trouble: Whether strict mode stops here; false for what is left out as a matter of course.

        Raises:
            UserError: in strict mode, with the detail.
        """
        if self._strict and trouble:
            raise UserError(detail)
        self.counts[reason] += 1
        self.first.setdefault(reason, detail)

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """One line per reason."""
        return [
            f"skipped {n}: {reason}; first: {self.first[reason]}" for reason, n in self.counts.most_common()
        ]
