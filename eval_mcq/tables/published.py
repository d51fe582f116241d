"""Tables that others published, as data: the printed figures, and the numbers of questions inferred from them."""

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
        raise ValueError(f"'{printed[:40]}' is no printed percentage, such as 80.17")
    return printed


def _points(printed: str) -> str:
    if printed and not _POINTS.fullmatch(printed):
        raise ValueError(f"'{printed[:40]}' is no printed difference, such as 10.9 or -0.4")
    return printed


Percent = Annotated[str, AfterValidator(_percent)]
"""A printed percentage with its digits."""

Points = Annotated[str, AfterValidator(_points)]
"""A printed difference of percentages, or nothing."""

MOST = 10_000
"""Most questions of a disease: every number of right answers among them is looked at."""

PAPER = Path(__file__).parents[1] / "data" / "mgll_table2.json"
"""The multiple-choice table of the MGLL paper."""


class PublishedRow(BaseModel):
    """One printed row.

    Attributes:
        model: The model.
        arm: ``base``, or what was done to it.
        cells: Disease to printed percentage, digits as printed.
        average: Printed macro average.
        gain: Printed difference to the model's base row; empty in that row itself.
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
        source: Where it was printed.
        about: What is printed and what is inferred.
        options: Number of options per question.
        questions: Disease to number of questions, in the order of the columns.
        rows: Rows of a model stand together, its base first.
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
                raise ValueError(f"row '{row.model} {row.arm}' has other diseases than 'questions'")
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
        """Number of right answers behind a cell; the nearest one where none fits."""
        n = self.questions[disease]
        fitting = counts_behind(row.cells[disease], n)
        return fitting[0] if fitting else round(float(row.cells[disease]) * n / 100)

    def fits(self, row: PublishedRow, disease: str) -> bool:
        """Whether some number of right answers prints as the cell."""
        return bool(counts_behind(row.cells[disease], self.questions[disease]))


def load_published(path: Path = PAPER) -> Published:
    """Read a printed table.

    Raises:
        UserError: no such file, or not of the form.
    """
    return parse(Published, read_text(path, "table"), f"table {path}")


def counts_behind(printed: str, n: int) -> list[int]:
    """All numbers of right answers of ``n`` whose percentage prints as this, however halves were rounded.

    Args:
        printed: Percentage with its digits, such as ``"80.17"``.
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
