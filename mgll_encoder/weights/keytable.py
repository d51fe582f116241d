"""Key tables: how the tensor names of a checkpoint map to target names.

A table is a mapping of patterns to rules:

    "blocks.{}.norm{1,2}.*": "encoder.layers.{}.layer_norm{}.{}"

In a pattern, ``{}`` matches a number (a layer), ``{weight,bias}`` one of these words, and ``*`` anything. In a target,
each ``{}`` takes the next matched word; ``{1}`` is the second. The first matching pattern counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FIELD = re.compile(r"\{([^}]*)\}|\*")


@dataclass(frozen=True)
class Split:
    """A fused tensor that is split along its first dimension, one part for each word in the target's braces.

    The tensor is viewed as [groups, units, rows, ...]; the parts take their units of every group in order.

    Attributes:
        target: Target name, such as ``layers.{}.self_attn.{q,k,v}_proj.{}``.
        groups: Number of groups, such as attention heads.
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
    """A tensor whose leading dimensions of size 1 are removed until ``dimensions`` are left."""

    target: str
    dimensions: int


@dataclass(frozen=True)
class Transpose:
    """A matrix that is transposed."""

    target: str


@dataclass(frozen=True)
class Join:
    """A tensor that is one part of a target; the parts are joined along the first dimension, in order of ``part``."""

    target: str
    part: int


@dataclass(frozen=True)
class ZeroRow:
    """A table [..., rows, C] that gets a row of zeros before its first."""

    target: str


@dataclass(frozen=True)
class WithZeros:
    """A tensor [..., C], and zeros [1, C] for another one that the file lacks because only pretraining uses it."""

    target: str
    zeros: str


@dataclass(frozen=True)
class Drop:
    """A tensor that is dropped on purpose, and why; ``None`` in a table means the table's own reason."""

    reason: str


Rule = str | Split | Reshape | Transpose | Join | ZeroRow | WithZeros | Drop | None
"""Where a tensor goes; a plain name means that the tensor is unchanged."""


@dataclass(frozen=True)
class Destination:
    """Where one tensor goes.

    Attributes:
        rule: The rule that applies to it.
        targets: Its new names: one, none if it is dropped, several if it is split. Several tensors may share one, see
            `Join`.
    """

    rule: Rule
    targets: tuple[str, ...]

    @property
    def part(self) -> int:
        """Its place among the tensors that share its target."""
        return self.rule.part if isinstance(self.rule, Join) else 0

    def cut(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Compute the values of each target (on any device, including ``meta``)."""
        match self.rule:
            case Split(groups=1, units=None):
                return tensor.chunk(len(self.targets))
            case Transpose():
                return (tensor.T,)
            case Reshape(dimensions=dimensions):
                return (tensor.reshape(tensor.shape[tensor.ndim - dimensions :]),)
            case ZeroRow():
                zeros = tensor.new_zeros(*tensor.shape[:-2], 1, tensor.shape[-1])
                return (torch.cat((zeros, tensor), dim=-2),)
            case WithZeros():
                return tensor, tensor.new_zeros(1, tensor.shape[-1])
            case str() | Join():
                return (tensor,)
        raise NotImplementedError(f"{self.rule} cannot be computed here")


@dataclass(frozen=True)
class KeyTable:
    """Patterns over full names, and their rules; ``prefix`` may precede every name."""

    rules: Mapping[str, Rule]
    prefix: str = ""

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(re.compile(_expression(pattern)), rule) for pattern, rule in self.rules.items()]

    def find(self, name: str) -> Destination | None:
        """Return where a tensor goes; None for a name without a rule."""
        bare = name.removeprefix(self.prefix)
        for pattern, rule in self._compiled:
            if match := pattern.fullmatch(bare):
                return Destination(rule, targets(rule, match.groups()))
        return None


def renames(names: Mapping[str, str]) -> dict[str, Rule]:
    """Return rules that only rename: pattern -> new name, which takes the fields of the pattern in order.

    Both sides are patterns, so that a table can be inverted.
    """
    return {pattern: _FIELD.sub("{}", target) for pattern, target in names.items()}


def renamed_back(rules: Mapping[str, Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that a table reads: the inverse of `Destination.cut`.

    Args:
        rules: A table whose patterns have no field but ``{}``, with plain targets, `Split` in equal parts, `Transpose`.
        state: Tensors by target name; a rule without its targets is left out.
    """
    written: dict[str, Tensor] = {}
    for pattern, rule in rules.items():
        for number in map(str, range(len(state))):
            names = targets(rule, (number,))
            if not names or not all(name in state for name in names):
                break
            parts = [state[name] for name in names]
            written[pattern.replace("{}", number)] = (
                parts[0].T if isinstance(rule, Transpose) else torch.cat(parts)
            )
            if "{}" not in pattern:
                break
    return written


def spelt(pattern: str) -> list[str]:
    """Return a pattern once for each word in its braces; ``{}`` and ``*`` stay."""
    field = next((found for found in _FIELD.finditer(pattern) if found[1]), None)
    if field is None:
        return [pattern]
    before, after = pattern[: field.start()], pattern[field.end() :]
    return [name for word in field[1].split(",") for name in spelt(before + word + after)]


def targets(rule: Rule, matched: tuple[str, ...]) -> tuple[str, ...]:
    """Return the target names of a rule whose pattern matched these words."""
    if rule is None or isinstance(rule, Drop):
        return ()
    if isinstance(rule, str):
        return (rule.format(*matched),)
    if isinstance(rule, WithZeros):
        return rule.target.format(*matched), rule.zeros
    if isinstance(rule, Split):
        before, after = rule.target.split("{" + ",".join(rule.words) + "}")
        return tuple((before + word + after).format(*matched) for word in rule.words)
    return (rule.target.format(*matched),)


def _expression(pattern: str) -> str:
    """Return the regular expression of a pattern, with a group for each field."""
    parts, end = [], 0
    for field in _FIELD.finditer(pattern):
        parts.append(re.escape(pattern[end : field.start()]))
        words = field[1]
        any_of = "|".join(map(re.escape, words.split(","))) if words else r"\d+"
        parts.append("(.*)" if words is None else f"({any_of})")
        end = field.end()
    return "".join((*parts, re.escape(pattern[end:])))
