"""Tables that others published, as data: the printed figures, and the numbers of questions inferred from them."""

from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eval_mcq.items.schema import Text, parse
from mgll_encoder.common.errors import UserError

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
    cells: dict[str, str]
    average: str
    gain: str = ""


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
    questions: dict[str, int] = Field(min_length=1)
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
    if not path.is_file():
        raise UserError(f"table {path} does not exist or is not a file")
    return parse(Published, path.read_text(encoding="utf-8"), f"table {path}")


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
