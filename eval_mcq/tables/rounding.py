"""How shares become printed percentages: half up, in decimal arithmetic, so that 7.25 prints as 7.3."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal


def half_up(value: Decimal, places: int) -> Decimal:
    """Round half away from zero, as one does on paper."""
    return value.quantize(Decimal(1).scaleb(-places), rounding=ROUND_HALF_UP)


def percent(share: float) -> Decimal:
    """A share as a percentage, without the noise of binary fractions."""
    return half_up(Decimal(share) * 100, 9)


@dataclass(frozen=True)
class Rounding:
    """Rounds every figure once, from its unrounded value, to one decimal."""

    def cell(self, share: float) -> Decimal:
        """Accuracy of a disease in percent."""
        return half_up(percent(share), 1)

    def average(self, shares: Sequence[float]) -> Decimal:
        """Unweighted mean over diseases in percent."""
        return half_up(percent(sum(shares) / len(shares)), 1)

    def gain(self, before: Decimal, after: Decimal, difference: float, places: int) -> Decimal:  # noqa: ARG002
        """Difference of two figures in percentage points; ``difference`` is that of the unrounded shares."""
        return half_up(percent(difference), 1)


@dataclass(frozen=True)
class PaperRounding(Rounding):
    """As in the published table: cells to two decimals, Averages and gains from rounded figures."""

    def cell(self, share: float) -> Decimal:
        """Accuracy of a disease in percent."""
        return half_up(percent(share), 2)

    def average(self, shares: Sequence[float]) -> Decimal:
        """Unweighted mean over the rounded cells in percent."""
        return mean_of_printed([self.cell(share) for share in shares])

    def gain(self, before: Decimal, after: Decimal, difference: float, places: int) -> Decimal:  # noqa: ARG002
        """Difference of two rounded figures in percentage points."""
        return half_up(after - before, places)


def mean_of_printed(cells: Sequence[Decimal]) -> Decimal:
    """Mean of printed percentages, to two decimals."""
    return half_up(sum(cells, Decimal(0)) / len(cells), 2)
