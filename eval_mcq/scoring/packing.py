"""Packing of the questions on an image into token trees that fit into a forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from eval_mcq.scoring.prefix_tree import Tree, common_length
from eval_mcq.scoring.requests import Prepared

TOKENS = 8192
"""Maximum tokens of one forward pass, including the cache; larger batches are split."""

CPU_TOKENS = 2048
"""The same for a CPU: more does not fit into its caches, which costs a fifth of the time."""

LARGEST = 2048
"""Maximum tokens of a tree, unless one row has more."""

SMALLEST = 32
"""Trees with fewer tokens are not split further."""

PADDING = 1 / 4
"""Share of padding in a tree above which another forward pass is cheaper."""


@dataclass(frozen=True)
class Part:
    """Some rows on one image as one tree below a common prefix.

    Attributes:
        source: Index of the image in the batch.
        tree: The tokens to compute, without the prefix.
        rows: Indices of the rows of the image.
        nodes: For each of these rows, continuation and position: the node whose output is read; see
            `TokenizedRequest.wanted`.
    """

    source: int
    tree: Tree
    rows: list[int]
    nodes: list[list[list[int]]]


def token_tree(prepared: Prepared) -> Tree:
    """Build one tree of all questions on an image: the minimum that must be computed."""
    return part_of(0, prepared, 0, range(len(prepared.rows))).tree


def common(prepared: Prepared) -> int:
    """Return the length of the common prefix of all rows, leaving at least one token per row."""
    sequences = [row.tokens for row in prepared.rows]
    return min(common_length(sequences), *(len(tokens) - 1 for tokens in sequences))


def part_of(source: int, prepared: Prepared, start: int, rows: Sequence[int]) -> Part:
    """Build one tree of some rows of an image, without their first ``start`` tokens."""
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


def branches(prepared: Prepared, start: int, attention_budget: float) -> list[list[int]]:
    """Split the rows of an image, sorted by tokens, into the cheapest number of trees below a common prefix.

    Rotations of a question share its words, and questions share options. But in a tree attention is computed between
    all pairs of tokens, so large trees cost more than they save.

    Args:
        prepared: The image's questions.
        start: Length of the prefix.
        attention_budget: Number of context tokens whose attention costs as much as computing one more token.
    """
    order = sorted(range(len(prepared.rows)), key=lambda number: prepared.rows[number].tokens)
    known: list[int] = [start]  # number of tokens that a row shares with the one before it
    own: list[int] = []  # number of new tokens
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
        price = (widest > LARGEST, len(sizes) * widest * (1 + (start + widest) / attention_budget))
        if price < least:
            best, least = [[order[place] for place in places] for places in cut.values()], price
    return best


def pieces(prepared: Prepared, rows: Sequence[int]) -> list[list[int]]:
    """Split the rows of an image into as few trees as possible."""
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
    """Group parts into as few forward passes as possible, with parts of similar size together to limit padding."""
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
    """Group images, in order, into as few passes as their common prefixes allow."""
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
