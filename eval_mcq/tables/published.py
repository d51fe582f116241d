"""Published tables as data: the printed values, and the numbers of questions inferred from them."""

import re
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from eval_mcq.items.schema import Text, parse
from mgll_encoder.common.texts import read_text

_PERCENT = re.compile(r"(100(\.0{1,4})?|[0-9]{1,2}(\.[0-9]{1,4})?)")
_POINTS = re.compile(r"-?[0-9]{1,3}(\.[0-9]{1,4})?")


def _percent(printed: str) -> str:
    if not _PERCENT.fullmatch(printed):
        raise ValueError(f"'{printed[:40]}' is not a printed percentage, such as 80.17")
    return printed


def _points(printed: str) -> str:
    if printed and not _POINTS.fullmatch(printed):
        raise ValueError(f"'{printed[:40]}' is not a printed difference, such as 10.9 or -0.4")
    return printed


Percent = Annotated[str, AfterValidator(_percent)]
"""A percentage as printed."""

Points = Annotated[str, AfterValidator(_points)]
"""A difference of percentages as printed, or empty."""

MOST = 10_000
"""Maximum number of questions per disease, because all possible counts are checked."""

PAPER = Path(__file__).parents[1] / "data" / "mgll_table2.json"
"""The multiple-choice table of the MGLL paper."""


class PublishedRow(BaseModel):
    """One printed row.

    Attributes:
        model: The model.
        arm: ``base``, or the method.
        cells: Disease -> percentage as printed.
        average: Printed macro average.
        gain: Printed difference to the model's base row; empty in the base row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Text
    arm: Text
    cells: dict[str, Percent]
    average: Percent
    gain: Points = ""


class Published(BaseModel):
    """A printed table.

    Attributes:
        source: Its publication.
        about: What is printed and what is inferred.
        options: Number of options per question.
        questions: Disease -> number of questions, in the order of the columns.
        rows: Rows grouped by model, the base first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Text
    about: str = ""
    options: int = Field(ge=2, le=26)
    questions: dict[Text, Annotated[int, Field(ge=1, le=MOST)]] = Field(min_length=1)
    rows: list[PublishedRow] = Field(min_length=2)

    @model_validator(mode="after")
    def _complete(self) -> "Published":
        for row in self.rows:
            if list(row.cells) != list(self.questions):
                raise ValueError(f"row '{row.model} {row.arm}' has different diseases than 'questions'")
        return self

    @property
    def diseases(self) -> list[str]:
        """Columns in order."""
        return list(self.questions)

    @cached_property
    def models(self) -> dict[str, list[PublishedRow]]:
        """Rows per model, in order; the first is the base."""
        models: dict[str, list[PublishedRow]] = {}
        for row in self.rows:
            models.setdefault(row.model, []).append(row)
        return models

    def count(self, row: PublishedRow, disease: str) -> int:
        """Return the number of right answers behind a cell; the nearest one if none matches."""
        n = self.questions[disease]
        fitting = counts_behind(row.cells[disease], n)
        return fitting[0] if fitting else round(float(row.cells[disease]) * n / 100)

    def fits(self, row: PublishedRow, disease: str) -> bool:
        """Return whether some number of right answers prints as the cell."""
        return bool(counts_behind(row.cells[disease], self.questions[disease]))


def load_published(path: Path = PAPER) -> Published:
    """Read a printed table.

    Raises:
        UserError: there is no such file, or it is invalid.
    """
    return parse(Published, read_text(path, "table"), f"table {path}")


def counts_behind(printed: str, n: int) -> list[int]:
    """Return all numbers of right answers of ``n`` whose percentage prints as given, with any rounding of halves.

    Args:
        printed: Percentage as printed, such as ``"80.17"``.
        n: Number of questions.
    """
    value = Decimal(printed)
    places = -int(value.as_tuple().exponent)
    half = Fraction(1, 2 * 10**places)
    around = int(Fraction(value) * n / 100)
    return [
        k for k in range(max(0, around - 1), min(n, around + 2) + 1)
        if abs(Fraction(100 * k, n) - Fraction(value)) <= half
    ]  # fmt: skip
