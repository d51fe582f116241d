"""Ridge regression from second moments: one pass over the data, memory quadratic in the widths, all strengths at once.

The problem: a linear layer y = W h + b reads the features h of one tower; find the closest layer y = V g + c
on the features g of another tower. The least-squares solution, the ridge path and the error on held-out
images need only the second moments of (1, g, h), which are summed in float64, batch by batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STRENGTHS = torch.logspace(-10, 2, 49, dtype=torch.float64)
"""Candidate ridge strengths, as multiples of the mean variance of the new features."""


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        weight: [out, in].
        bias: [out], or None if the layer has none.
    """

    weight: Tensor
    bias: Tensor | None = None

    def double(self, device: torch.device) -> "Linear":
        """Return the layer in float64."""
        bias = None if self.bias is None else self.bias.detach().to(device, torch.float64)
        return Linear(self.weight.detach().to(device, torch.float64), bias)


@dataclass
class Moments:
    """Second moments of (1, g, h) over tokens.

    Attributes:
        new: Width of g, the new tower's features.
        old: Width of h, the old tower's features.
        device: Device of the sums; it must support float64.
        total: Their sum [1 + new + old, 1 + new + old], float64.
    """

    new: int
    old: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        side = 1 + self.new + self.old
        self.total = torch.zeros(side, side, dtype=torch.float64, device=self.device)

    def add(self, new: Tensor, old: Tensor) -> None:
        """Add tokens: g [n, new] and the corresponding h [n, old]."""
        ones = new.new_ones(len(new), 1, dtype=torch.float64)
        joined = torch.cat([ones, new.double(), old.double()], dim=1).to(self.device)
        self.total.addmm_(joined.T, joined)

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(self.new, self.old, self.device)
        both.total = self.total + other.total
        return both

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return int(self.total[0, 0])

    @property
    def mean(self) -> Tensor:
        """Return the mean of (g, h)."""
        return self.total[0, 1:] / self.total[0, 0]

    def about(self, center: Tensor) -> Tensor:
        """Return the mean outer product of (g, h) - center with itself [new + old, new + old]."""
        cross = torch.outer(self.mean, center)
        return self.total[1:, 1:] / self.total[0, 0] - cross - cross.T + torch.outer(center, center)


@dataclass(frozen=True)
class Fit:
    """A fitted layer, and its quality on held-out data.

    Attributes:
        layer: The layer, fitted on all tokens, including held-out ones.
        r2: Share of the pre-activations' variance on held-out tokens that the fit on the others explains.
        error: Root mean square residual there, relative to the pre-activations' root mean square.
        strength: Ridge strength, as a multiple of the mean variance of the new features.
        shrunk_to_start: Whether the ridge shrinks towards ``start`` (otherwise towards zero).
        r2_start: R² of ``start``; None if there is none.
    """

    layer: Linear
    r2: float
    error: float
    strength: float
    shrunk_to_start: bool
    r2_start: float | None


def fit_connectors(
    fitted: Moments, held_out: Moments, targets: Sequence[Linear], starts: Sequence[Linear | None]
) -> list[Fit]:
    """Fit layers on new features to the outputs of old layers on old ones.

    The ridge shrinks the new weights towards zero or, if there is a start layer, towards that one, whichever
    has less error on the held-out tokens. The intercept is not penalized; layers without bias have none, and
    their moments are then about zero instead of the mean.

    Args:
        fitted: Moments of the tokens to fit on.
        held_out: Moments of the tokens that choose the strength.
        targets: The old layers, which read h.
        starts: For each, the layer that a plain swap would keep on g, or None.
    """
    paths: dict[bool, _Path] = {}
    found = []
    for target, start in zip(targets, starts, strict=True):
        centered = target.bias is not None
        if centered not in paths:
            paths[centered] = _Path(fitted, held_out, centered)
        found.append(_fit(paths[centered], target.double(fitted.device), start))
    return found


class _Path:
    """Shared data of the fits with the same input features: two eigendecompositions, and moments."""

    def __init__(self, fitted: Moments, held_out: Moments, centered: bool) -> None:
        self.new, self.centered = fitted.new, centered
        self.parts, self.held_out, self.whole = fitted, held_out, fitted + held_out
        self.center = fitted.mean if centered else torch.zeros_like(fitted.mean)
        self.fit, self.test = fitted.about(self.center), held_out.about(self.center)
        self.values, self.vectors = _eigen(self.fit[: self.new, : self.new])
        self.turned = self.vectors.T @ self.test[: self.new, : self.new] @ self.vectors
        self.all_center = self.whole.mean if centered else torch.zeros_like(fitted.mean)
        self.all = self.whole.about(self.all_center)
        self.all_values, self.all_vectors = _eigen(self.all[: self.new, : self.new])

    def errors(self, target: Tensor, start: Tensor) -> Tensor:
        """Return the mean squared error on the held-out tokens, summed over outputs, for each of `STRENGTHS`."""
        n = self.new
        given = self.vectors.T @ (self.fit[:n, n:] @ target.T - self.fit[:n, :n] @ start.T)
        wanted = self.vectors.T @ (self.test[:n, n:] @ target.T - self.test[:n, :n] @ start.T)
        left = self.residual(self.test, start, target)
        linear, square = (given * wanted).sum(1), self.turned * (given @ given.T)
        shrink = 1 / (self.values[:, None] + STRENGTHS.to(self.values) * self.scale)  # [new, strengths]
        return left - 2 * linear @ shrink + (shrink * (square @ shrink)).sum(0)

    def residual(self, moments: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared difference of ``weight`` on g and ``target`` on h, centered, summed over outputs."""
        joined = torch.cat([weight, -target], dim=1)
        return ((joined @ moments) * joined).sum()

    @property
    def scale(self) -> Tensor:
        """Return the mean variance of the new features."""
        return self.values.mean().clamp_min(torch.finfo(torch.float64).tiny)

    def solve(self, target: Tensor, start: Tensor, strength: float) -> Tensor:
        """Solve for the weights of this strength on all tokens."""
        n = self.new
        given = self.all_vectors.T @ (self.all[:n, n:] @ target.T - self.all[:n, :n] @ start.T)
        shrunk = given / (self.all_values + strength * self.scale)[:, None]
        return start + (self.all_vectors @ shrunk).T


def _eigen(moments: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moments)
    return values.clamp_min(0), vectors


def _fit(path: _Path, target: Linear, start: Linear | None) -> Fit:
    weight = target.weight
    zero = weight.new_zeros(len(weight), path.new)
    begin = [zero] if start is None else [zero, start.weight.to(zero)]
    errors = torch.stack([path.errors(weight, one) for one in begin])
    # Variance of the outputs on the held-out tokens, and their mean square.
    spread = path.residual(path.held_out.about(path.held_out.mean), zero, weight)
    best = int(errors.argmin())
    chosen, strength = begin[best // len(STRENGTHS)], float(STRENGTHS[best % len(STRENGTHS)])
    least = errors.flatten()[best].clamp_min(0)
    solved = path.solve(weight, chosen, strength)
    bias = None
    if target.bias is not None:
        bias = target.bias + weight @ path.all_center[path.new :] - solved @ path.all_center[: path.new]
    alone = None
    if start is not None:
        alone = 1 - float(_squared(path.held_out, start.double(weight.device), target) / spread)
    size = _squared(path.held_out, Linear(zero, None if bias is None else torch.zeros_like(bias)), target)
    return Fit(
        layer=Linear(solved, bias),
        r2=1 - float(least / spread),
        error=float((least / size).sqrt()),
        strength=strength,
        shrunk_to_start=len(begin) > 1 and best // len(STRENGTHS) == 1,
        r2_start=alone,
    )


def _squared(moments: Moments, layer: Linear, target: Linear) -> Tensor:
    """Return the mean squared difference of ``layer`` on g and ``target`` on h with biases, summed over outputs."""
    biases = [
        one.bias if one.bias is not None else one.weight.new_zeros(len(one.weight)) for one in (layer, target)
    ]
    joined = torch.cat([(biases[0] - biases[1])[:, None], layer.weight, -target.weight], dim=1)
    return ((joined @ moments.total) * joined).sum() / moments.total[0, 0]
