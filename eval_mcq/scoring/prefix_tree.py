"""Token sequences with common beginnings as one tree, so that a model computes each beginning once."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Tree:
    """A tree of tokens, nodes numbered so that a parent comes before its children.

    Laid out as one sequence, with a mask that lets each node see its ancestors and itself only and with its depth as
    position, it gives a causal language model's results for every path at once.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, tokens: Sequence[int], parent: int = -1) -> int:
        """Add a path below a node (-1: the root) and give its last node; what is there already is not added twice."""
        for token in tokens:
            node = self._children.get((parent, token))
            if node is None:
                node = self._children[parent, token] = len(self.tokens)
                self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
                self._parents.append(parent)
                self.tokens.append(token)
            parent = node
        return parent

    def visible(self) -> Tensor:
        """Whether the node of a row sees the node of a column, bool [n, n]."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def common_length(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common beginning."""
    first, last = min(sequences), max(sequences)
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))
