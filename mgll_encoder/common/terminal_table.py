"""Tables for the terminal: no figure and no name is ever cut, however narrow the terminal is."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

READABLE = 16
"""Columns of words are made no narrower than this if a wider one is what they need."""

LONGEST_WORD = 24
"""Longer words, such as paths, fold."""


@dataclass(frozen=True)
class _Widths:
    """What the columns of a table need, in characters."""

    natural: Sequence[int]
    least: Sequence[int]

    def within(self, room: int) -> list[int] | None:
        """Return widths that add up to at most ``room``, made from the natural ones; None if there are none."""
        if sum(self.least) > room:
            return None
        widths = list(self.natural)
        for _ in range(sum(widths) - room):
            widest = max(
                (i for i, least in enumerate(self.least) if widths[i] > least), key=widths.__getitem__
            )
            widths[widest] -= 1
        return widths


class TerminalTable(Table):
    """A table that fits the width at which it is printed, with all that is in it.

    Columns that are justified to the right hold figures, which are never broken; the others hold words, which wrap. If
    that is not enough, the lines between the columns are left out, and intervals are put below their values. If that is
    not enough, either, the table is split into several that repeat its first columns.

    Args:
        title: The title, printed as it is: brackets are no markup.
        fixed: Number of leading columns that every part repeats.
        group: Number of following columns that are kept together.
        show_header: Whether the headings are printed.

    Example:
        >>> table = TerminalTable("Answers of two models")
        >>> table.add_words("disease").add_figures("questions", "accuracy")
        >>> table.add_row("glaucoma", "12", "66.7 [39.1, 86.2]")
        >>> Console(width=80).print(table)
    """

    def __init__(
        self, title: str | None = None, *, fixed: int = 1, group: int = 1, show_header: bool = True
    ) -> None:
        super().__init__(title=None if title is None else Text(title), show_header=show_header)
        self.fixed, self.group = fixed, group

    def add_words(self, *headings: str) -> "TerminalTable":
        """Add columns of words, which wrap."""
        for heading in headings:
            self.add_column(Text(heading))
        return self

    def add_figures(self, *headings: str) -> "TerminalTable":
        """Add columns of figures, which are never broken."""
        for heading in headings:
            self.add_column(Text(heading), justify="right")
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print the title and the parts of the table."""
        if self.title:
            yield Text(str(self.title), style="table.title", overflow="fold")
        yield from self.parts(console, options.max_width)

    def parts(self, console: Console, width: int) -> list[Table]:
        """Return the tables that are printed at a width; one if it is wide enough."""
        every = range(len(self.columns))
        for narrow in (False, True):
            if whole := self._fitted(console, every, narrow, width):
                return [whole]
        chosen: list[list[int]] = []
        for start in range(self.fixed, len(every), self.group):
            group = list(every[start : start + self.group])
            if chosen and self._fitted(console, [*chosen[-1], *group], True, width):
                chosen[-1] += group
            else:
                chosen.append([*range(self.fixed), *group])
        return [
            self._fitted(console, columns, True, width) or self._folded(console, columns, width)
            for columns in chosen or [list(every)]
        ]

    def _fitted(self, console: Console, columns: Sequence[int], narrow: bool, width: int) -> Table | None:
        needs = self._needs(columns, narrow)
        widths = needs.within(width - self._lines(console, columns, narrow))
        return None if widths is None else self._plain(columns, narrow, widths)

    def _folded(self, console: Console, columns: Sequence[int], width: int) -> Table:
        """Return a table for a width at which a single group of columns does not fit: everything folds."""
        needs = self._needs(columns, True)
        room = max(width - self._lines(console, columns, True), len(columns))
        widths = _Widths(needs.natural, [1] * len(columns)).within(room)
        return self._plain(columns, True, widths or needs.least)

    def _needs(self, columns: Sequence[int], narrow: bool) -> _Widths:
        natural, least = [], []
        for i in columns:
            figures = self.columns[i].justify == "right"
            headings = [str(self.columns[i].header)] if self.show_header else []
            cells = [_cell(cell, narrow and figures) for cell in self.columns[i].cells]
            natural.append(_widest(_lines_of([*headings, *cells])))
            word = min(_widest(_words_of([*headings, *cells])), LONGEST_WORD)
            words = max(word, min(natural[-1], READABLE))
            least.append(max(_widest(_lines_of(cells)), _widest(_words_of(headings))) if figures else words)
        return _Widths(natural, least)

    def _lines(self, console: Console, columns: Sequence[int], narrow: bool) -> int:
        """Return the width of the lines and gaps between the columns."""
        table = self._plain(columns, narrow, [1] * len(columns))
        return Measurement.get(console, console.options.update(width=10_000), table).maximum - len(columns)

    def _plain(self, columns: Sequence[int], narrow: bool, widths: Sequence[int]) -> Table:
        table = Table(show_header=self.show_header, box=box.HEAVY_HEAD if self.show_header else box.SQUARE)
        if narrow:
            table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True
        for i, width in zip(columns, widths, strict=True):
            column = self.columns[i]
            table.add_column(column.header, justify=column.justify, width=width, overflow="fold")
        cells = [list(self.columns[i].cells) for i in columns]
        for number, row in enumerate(self.rows):
            table.add_row(
                *(
                    _cell(cell[number], narrow and self.columns[i].justify == "right")
                    for i, cell in zip(columns, cells, strict=True)
                ),
                end_section=row.end_section,
            )
        return table


def _cell(cell: object, narrow: bool) -> Text:
    """Return a cell as text, if narrow with the interval below its value."""
    text = cell if isinstance(cell, Text) else Text(str(cell))
    if not narrow or " [" not in text.plain:
        return text
    return Text(text.plain.replace(" [", "\n[").replace(", ", ","), text.style)


def _lines_of(cells: Iterable[str | Text]) -> Iterator[str]:
    return (line for cell in cells for line in str(cell).split("\n"))


def _words_of(cells: Iterable[str | Text]) -> Iterator[str]:
    return (word for cell in cells for word in str(cell).split())


def _widest(pieces: Iterable[str]) -> int:
    return max(map(cell_len, pieces), default=0)
