"""Questions on one image as trees of tokens, cut and packed so that a forward pass holds them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from eval_mcq.scoring.prefix_tree import Tree, common_length
from eval_mcq.scoring.requests import Prepared

TOKENS = 8192
"""Tokens of one forward pass, cache included, beyond which a batch is put in several."""

CPU_TOKENS = 2048
"""The same on a CPU: what is computed of more does not stay in its caches, which costs a fifth of the time."""

LARGEST = 2048
"""Tokens of the largest tree, unless one row has more."""

SMALLEST = 32
"""Tokens below which no tree is cut further."""

PADDING = 1 / 4
"""Share of padding in a tree that is worth another forward pass."""


@dataclass(frozen=True)
class Part:
    """Some rows on one image as one tree below a common beginning.

    Attributes:
        source: Which image of the batch.
        tree: What is computed, without the beginning.
        rows: Which rows of the image.
        nodes: For each of these rows, continuation and position: the node whose output is read; see `Row.wanted`.
    """

    source: int
    tree: Tree
    rows: list[int]
    nodes: list[list[list[int]]]


def token_tree(prepared: Prepared) -> Tree:
    """All questions on an image as one tree: what must be computed at least."""
    return part_of(0, prepared, 0, range(len(prepared.rows))).tree


def common(prepared: Prepared) -> int:
    """Length of what all rows begin with, less what a row must keep for itself."""
    sequences = [row.tokens for row in prepared.rows]
    return min(common_length(sequences), *(len(tokens) - 1 for tokens in sequences))


def part_of(source: int, prepared: Prepared, start: int, rows: Sequence[int]) -> Part:
    """Some rows of an image as one tree, without their first ``start`` tokens."""
    tree, nodes = Tree(), []
    for number in rows:
        row = prepared.rows[number]
        end = tree.add(row.tokens[start:])
        of_row = []
        for tail in row.continuations:
            path = [end]
            for token in tail[:-1]:
                path.append(tree.add([token], path[-1]))
            of_row.append(path)
        nodes.append(of_row)
    return Part(source, tree, list(rows), nodes)


def branches(prepared: Prepared, start: int, bearable: float) -> list[list[int]]:
    """Rows of one image, those that begin alike together, in the cheapest number of trees below a common beginning.

    Rotations of a question share its words, and questions share options. But in a tree every token is held against
    every other one, so that large ones cost more than they save.

    Args:
        prepared: The image's questions.
        start: Length of the beginning.
        bearable: How many tokens another one can be held against at the price of computing one more.
    """
    order = sorted(range(len(prepared.rows)), key=lambda number: prepared.rows[number].tokens)
    known: list[int] = [start]  # how many of a row's tokens the one before it has, too
    own: list[int] = []  # how many are new with it
    for before, number in pairwise([order[0], *order]):
        row = prepared.rows[number]
        if own:
            known.append(common_length([prepared.rows[before].tokens, row.tokens]))
        own.append(len(row.tokens) - known[-1] + sum(map(len, row.continuations)))
    whole = sum(own)
    ends = list(accumulate(own))
    best: list[list[int]] = []
    least = (True, inf)
    for count in range(1, min(len(order), whole // SMALLEST + 1) + 1):
        cut: dict[int, list[int]] = {}
        for place, end in enumerate(ends):
            cut.setdefault(int((end - own[place] / 2) * count / whole), []).append(place)
        sizes = [known[places[0]] - start + sum(own[place] for place in places) for places in cut.values()]
        widest = max(sizes)
        price = (widest > LARGEST, len(sizes) * widest * (1 + (start + widest) / bearable))
        if price < least:
            best, least = [[order[place] for place in places] for places in cut.values()], price
    return best


def pieces(prepared: Prepared, rows: Sequence[int]) -> list[list[int]]:
    """Rows of one image in as few trees as fit."""
    pieces: list[list[int]] = [[]]
    tokens = 0
    for number in rows:
        row = prepared.rows[number]
        size = len(row.tokens) - prepared.image_end + sum(map(len, row.continuations))
        if pieces[-1] and tokens + size > LARGEST:
            pieces.append([])
            tokens = 0
        pieces[-1].append(number)
        tokens += size
    return pieces


def fitting(parts: Sequence[Part], before: int, tokens: int = TOKENS) -> Iterator[list[Part]]:
    """Parts in as few forward passes of so many tokens as fit, those of like size together, to pad little."""
    chosen: list[Part] = []
    widest = 0
    for part in sorted(parts, key=lambda part: -len(part.tree)):
        size = len(part.tree)
        full = (widest + before) * (len(chosen) + 1) > tokens
        if chosen and (full or widest - size > widest * PADDING):
            yield chosen
            chosen = []
        if not chosen:
            widest = size
        chosen.append(part)
    yield chosen


def passes(batch: Sequence[Prepared], tokens: int) -> Iterator[list[Prepared]]:
    """Images in as few passes of so many tokens as hold their common beginnings, in order."""
    chosen: list[Prepared] = []
    widest = 0
    for prepared in batch:
        size = max(widest, common(prepared))
        if chosen and size * (len(chosen) + 1) > tokens:
            yield chosen
            chosen, size = [], common(prepared)
        chosen.append(prepared)
        widest = size
    yield chosen
