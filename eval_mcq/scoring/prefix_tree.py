"""Token sequences with common prefixes as a tree, so that a model computes each prefix once."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Tree:
    """A tree of tokens, with parents numbered before their children.

    As one sequence, with a mask by which each node attends only to its ancestors and itself, and with its depth as
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
        """Add a path below a node (-1: the root) and return its last node; existing nodes are reused."""
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
        """Return whether the node of a row attends to the node of a column, bool [n, n]."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


def common_length(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix."""
    first, last = min(sequences), max(sequences)
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))
