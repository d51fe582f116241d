"""In what order a bench is asked: questions on one image together, in batches that do not depend on who asks them.

A sum's last digit depends on what else is in its batch. So batches are made of the whole bench, and a shard takes whole
ones: whether a run is new, resumed or one of several shards, the same machine gives the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.prompt import Ask, rotations_of
from mgll_encoder.common.errors import UserError

GROUP_ROWS = 256
"""Most rows on one image that are asked at a time, and written down together."""


@dataclass(frozen=True)
class Group:
    """Questions on the same images, as places in the bench, with their rotations."""

    asks: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        """Place of its first question."""
        return self.asks[0][0]


@dataclass(frozen=True)
class Shard:
    """One of several runs that answer a bench together: number ``index`` of ``count``, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read ``i/n``.

        Raises:
            UserError: it is not of that form, or i is not below n.
        """
        found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise UserError(f"shard '{text[:40]}' is not of the form i/n with i from 0 to n-1, such as 0/4")
        return cls(int(found[1]), int(found[2]))

    def of(self, all_batches: Sequence[list[Group]]) -> list[list[Group]]:
        """Its share of the batches of a bench."""
        return list(all_batches[self.index :: self.count])

    @property
    def name(self) -> str | None:
        """``i/n``; None where there is one shard only."""
        return f"{self.index}/{self.count}" if self.count > 1 else None


def groups(items: Sequence[MCQItem], rotations: int) -> list[Group]:
    """Questions by their images, in order of first appearance."""
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
    """Batches of at most ``rows`` rows, of whole groups; a larger group is a batch by itself.

    Args:
        all_groups: Of the whole bench.
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
    """The questions themselves."""
    return [Ask(items[place], rotation) for place, rotation in group.asks]
