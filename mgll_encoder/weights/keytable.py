"""Key tables: which names a checkpoint gives its tensors, and where each of them goes.

A table is a mapping of patterns to rules:

    "blocks.{}.norm{1,2}.*": "encoder.layers.{}.layer_norm{}.{}"

In a pattern, ``{}`` stands for a number (a layer), ``{weight,bias}`` for one of these words, and ``*`` for whatever is
there. In a target, each ``{}`` takes the next of what these have matched; ``{1}`` is the second of them. The first
pattern that matches counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

_FIELD = re.compile(r"\{([^}]*)\}|\*")


@dataclass(frozen=True)
class Split:
    """A fused tensor that is cut along its first dimension, one part for each word in braces of the target.

    The tensor is seen as [groups, units, rows, ...]; the parts take their units of every group one after another.

    Attributes:
        target: Such as ``layers.{}.self_attn.{q,k,v}_proj.{}``.
        groups: How many groups there are, such as attention heads.
        units: Units of each part; None for one each.
    """

    target: str
    groups: int = 1
    units: tuple[int, ...] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words in braces."""
        return next(tuple(found[1].split(",")) for found in _FIELD.finditer(self.target) if found[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units of each part."""
        return self.units or (1,) * len(self.words)


@dataclass(frozen=True)
class Reshape:
    """A tensor that loses its leading dimensions, which are 1, but for this many ``dimensions``."""

    target: str
    dimensions: int


@dataclass(frozen=True)
class Transpose:
    """A matrix whose dimensions change places."""

    target: str


@dataclass(frozen=True)
class Drop:
    """A tensor that is left out on purpose, and why; ``None`` in a table is one for the table's own reason."""

    reason: str


Rule = str | Split | Reshape | Transpose | Drop | None
"""Where a tensor goes; a mere name is a tensor that is taken as it is."""


@dataclass(frozen=True)
class Destination:
    """Where one tensor goes.

    Attributes:
        rule: The rule that holds for it.
        targets: Its new names: one, none where it is dropped, several where it is cut.
    """

    rule: Rule
    targets: tuple[str, ...]

    def cut(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The values of each target (on any device, ``meta`` too)."""
        match self.rule:
            case Split(groups=1, units=None):
                return tensor.chunk(len(self.targets))
            case Transpose():
                return (tensor.T,)
            case str():
                return (tensor,)
        raise NotImplementedError(f"{self.rule} is not computed here")


@dataclass(frozen=True)
class KeyTable:
    """Patterns over whole names, and their rules; ``prefix`` may stand before every name."""

    rules: Mapping[str, Rule]
    prefix: str = ""

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(re.compile(_expression(pattern)), rule) for pattern, rule in self.rules.items()]

    def find(self, name: str) -> Destination | None:
        """Where a tensor goes; None for a name that is in no rule."""
        bare = name.removeprefix(self.prefix)
        for pattern, rule in self._compiled:
            if match := pattern.fullmatch(bare):
                return Destination(rule, targets(rule, match.groups()))
        return None


def targets(rule: Rule, matched: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a rule gives a tensor whose pattern has matched these words."""
    if rule is None or isinstance(rule, Drop):
        return ()
    if isinstance(rule, str):
        return (rule.format(*matched),)
    if isinstance(rule, Split):
        before, after = rule.target.split("{" + ",".join(rule.words) + "}")
        return tuple((before + word + after).format(*matched) for word in rule.words)
    return (rule.target.format(*matched),)


def _expression(pattern: str) -> str:
    """The regular expression of a pattern, with a group for each field."""
    parts, end = [], 0
    for field in _FIELD.finditer(pattern):
        parts.append(re.escape(pattern[end : field.start()]))
        words = field[1]
        any_of = "|".join(map(re.escape, words.split(","))) if words else r"\d+"
        parts.append("(.*)" if words is None else f"({any_of})")
        end = field.end()
    return "".join((*parts, re.escape(pattern[end:])))
