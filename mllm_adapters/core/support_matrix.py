"""The support matrix: each family's published checkpoint before and after a swap to an MGLL ViT-L/14.

The figures come from plans of full-size checkpoints (headers only); a test recomputes them and compares them
with the file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

from rich.console import Group

from mgll_encoder.common.terminal_table import TerminalTable
from mllm_adapters.checkpoints.data import Data
from mllm_adapters.core.fates import ConnectorFate
from mllm_adapters.core.wording import connector_words

FILE = "support.json"

LAYER = re.compile(r"\.\d+\.")


class Size(Data):
    """Input side in pixels, and the visual tokens per image (or tile) that it gives."""

    image_size: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.tokens} at {self.image_size} px"


class Support(Data):
    """A row of the matrix.

    Attributes:
        family: Registry name.
        title: Common name.
        checkpoint: The published checkpoint of the figures.
        reads: Supported layouts.
        before: The checkpoint's own image size and tokens.
        default: Those of the swapped model at the default image size.
        at_224: Likewise at 224 px, MGLL's own size; None if the family does not support it.
        at_336: Likewise at 336 px.
        connectors: Module that reads vision features -> its fate.
        loads: How the swapped checkpoint loads, by layout written.
    """

    family: str
    title: str
    checkpoint: str
    reads: tuple[str, ...]
    before: Size
    default: Size
    at_224: Size | None
    at_336: Size | None
    connectors: dict[str, ConnectorFate]
    loads: dict[str, str]

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row."""
        by_fate: dict[str, list[str]] = {}
        for connector, fate in self.connectors.items():
            name = LAYER.sub(".*.", connector)  # the same module of several layers
            names = by_fate.setdefault(connector_words(fate, advice=False), [])
            names += [name] if name not in names else []
        loads = [
            how if target == "own" else f"`layout={target}`: {how}" for target, how in self.loads.items()
        ]
        return (
            self.family,
            "; ".join(self.reads),
            self.checkpoint,
            str(self.before),
            str(self.default),
            *(str(size.tokens) if size else "–" for size in (self.at_224, self.at_336)),
            "; ".join(f"{', '.join(names)}: {fate}" for fate, names in by_fate.items()),
            "; ".join(loads),
        )


COLUMNS = (
    "family", "reads", "figures of", "tokens before", "after (default)", "at 224 px", "at 336 px", "connectors",
    "swapped, it loads with",
)  # fmt: skip


def support() -> list[Support]:
    """Return the rows, in the order of the registry."""
    rows = json.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    return [Support.model_validate(row) for row in rows]


def support_tables(spell: Callable[[str], str] = str) -> Group:
    """Return the matrix for the terminal, in two tables that fit 80 columns."""
    rows = [dict(zip(COLUMNS, map(spell, row.cells()), strict=True)) for row in support()]
    figures = ("family", "figures of", "tokens before", "after (default)", "at 224 px", "at 336 px")
    words = ("family", "reads", "connectors", "swapped, it loads with")
    return Group(_table("Tokens per image", figures, rows), "", _table("Layouts and connectors", words, rows))


def _table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> TerminalTable:
    table = TerminalTable(title).add_words(*columns)
    for row in rows:
        table.add_row(*(row[column] for column in columns), end_section=True)
    return table


def support_markdown(spell: Callable[[str], str] = str, columns: Sequence[str] = COLUMNS) -> str:
    """Return the matrix for the documentation, with all of its columns or some."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in support():
        cells = dict(zip(COLUMNS, map(spell, row.cells()), strict=True))
        lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines)
