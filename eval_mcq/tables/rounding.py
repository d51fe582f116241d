"""Rounding of shares to printed percentages: half up, in decimal arithmetic, so that 7.25 prints as 7.3."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal


def half_up(value: Decimal, places: int) -> Decimal:
    """Round half away from zero."""
    return value.quantize(Decimal(1).scaleb(-places), rounding=ROUND_HALF_UP)


def percent(share: float) -> Decimal:
    """Convert a share to a percentage, without the noise of binary fractions."""
    return half_up(Decimal(share) * 100, 9)


@dataclass(frozen=True)
class Rounding:
    """Rounds every value once, from its unrounded value, to one decimal."""

    def cell(self, share: float) -> Decimal:
        """Return the accuracy of a disease in percent."""
        return half_up(percent(share), 1)

    def average(self, shares: Sequence[float]) -> Decimal:
        """Return the unweighted mean over diseases in percent."""
        return half_up(percent(sum(shares) / len(shares)), 1)

    def gain(self, before: Decimal, after: Decimal, difference: float, places: int) -> Decimal:  # noqa: ARG002
        """Return the difference of two values in percentage points; ``difference`` is that of the unrounded shares."""
        return half_up(percent(difference), 1)


@dataclass(frozen=True)
class PaperRounding(Rounding):
    """Rounds like the published table: cells to two decimals, Averages and gains from rounded values."""

    def cell(self, share: float) -> Decimal:
        """Return the accuracy of a disease in percent."""
        return half_up(percent(share), 2)

    def average(self, shares: Sequence[float]) -> Decimal:
        """Return the unweighted mean over the rounded cells in percent."""
        return mean_of_printed([self.cell(share) for share in shares])

    def gain(self, before: Decimal, after: Decimal, difference: float, places: int) -> Decimal:  # noqa: ARG002
        """Return the difference of two rounded values in percentage points."""
        return half_up(after - before, places)


def mean_of_printed(cells: Sequence[Decimal]) -> Decimal:
    """Return the mean of printed percentages, to two decimals."""
    return half_up(sum(cells, Decimal(0)) / len(cells), 2)
