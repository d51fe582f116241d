"""Batches of a benchmark: questions on one image together, the same batches in every run.

The last digit of a sum depends on the rest of its batch. So batches are formed over the whole benchmark, and a shard
gets whole batches: a new, resumed or sharded run gives the same bytes on the same machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.prompt import Ask, rotations_of
from mgll_encoder.common.errors import InvalidArgumentError

GROUP_ROWS = 256
"""Maximum rows on one image that are scored and written together."""


@dataclass(frozen=True)
class Group:
    """Questions on the same images, as positions in the benchmark, with their rotations."""

    asks: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        """Position of its first question."""
        return self.asks[0][0]


@dataclass(frozen=True)
class Shard:
    """One of several runs that answer a benchmark together: number ``index`` of ``count``, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse ``i/n``.

        Raises:
            UserError: it does not have that form, or i is not below n.
        """
        found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise InvalidArgumentError(
                f"shard '{text[:40]}' does not have the form i/n with i from 0 to n-1, such as 0/4"
            )
        return cls(int(found[1]), int(found[2]))

    def of(self, all_batches: Sequence[list[Group]]) -> list[list[Group]]:
        """Return this shard's batches."""
        return list(all_batches[self.index :: self.count])

    @property
    def name(self) -> str | None:
        """``i/n``; None if there is only one shard."""
        return f"{self.index}/{self.count}" if self.count > 1 else None


def groups(items: Sequence[MCQItem], rotations: int) -> list[Group]:
    """Group questions by their images, in order of first appearance."""
    by_images: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for place, item in enumerate(items):
        asks = by_images.setdefault(tuple(item.images), [])
        asks.extend((place, rotation) for rotation in range(rotations_of(len(item.options), rotations)))
    return [
        Group(tuple(asks[start : start + GROUP_ROWS]))
        for asks in by_images.values()
        for start in range(0, len(asks), GROUP_ROWS)
    ]


def batches(all_groups: Sequence[Group], rows: int) -> list[list[Group]]:
    """Form batches of whole groups with at most ``rows`` rows; a larger group is a batch of its own.

    Args:
        all_groups: Groups of the whole benchmark.
        rows: Rows of a full batch.
    """
    made: list[list[Group]] = []
    room = 0
    for group in all_groups:
        if len(group.asks) > room:
            made.append([])
            room = rows
        made[-1].append(group)
        room -= len(group.asks)
    return made


def asks_of(group: Group, items: Sequence[MCQItem]) -> list[Ask]:
    """Return the questions of a group."""
    return [Ask(items[place], rotation) for place, rotation in group.asks]
