"""Questions on one image as trees of tokens, cut and packed so that a forward pass holds them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eval_mcq.scoring.asking import Prepared
from eval_mcq.scoring.tree import Tree, common_length

TOKENS = 8192
"""Tokens of one forward pass, cache included, beyond which questions on one image are put in several."""


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


def by_item(prepared: Prepared) -> list[list[int]]:
    """Rows of each question."""
    of_item: dict[str, list[int]] = {}
    for number, row in enumerate(prepared.rows):
        of_item.setdefault(row.ask.item.id, []).append(number)
    return list(of_item.values())


def pieces(prepared: Prepared, rows: Sequence[int]) -> list[list[int]]:
    """Rows of one image in as few trees as fit."""
    pieces: list[list[int]] = [[]]
    tokens = 0
    for number in rows:
        row = prepared.rows[number]
        size = len(row.tokens) - prepared.image_end + sum(map(len, row.continuations))
        if pieces[-1] and tokens + size > TOKENS // 4:
            pieces.append([])
            tokens = 0
        pieces[-1].append(number)
        tokens += size
    return pieces


def fitting(parts: Sequence[Part], before: int) -> Iterator[list[Part]]:
    """Parts in as few forward passes as fit, those of like size together."""
    chosen: list[Part] = []
    widest = 0
    for part in sorted(parts, key=lambda part: -len(part.tree)):
        widest = max(widest, len(part.tree) + before)
        if chosen and widest * (len(chosen) + 1) > TOKENS:
            yield chosen
            chosen, widest = [], len(part.tree) + before
        chosen.append(part)
    yield chosen
