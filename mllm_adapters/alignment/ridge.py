"""Ridge regression from second moments: one pass over the data, memory of the widths squared, every strength at once.

The problem: a linear layer y = W h + b read the features h of one tower; find the layer y = V g + c that comes nearest
on the features g of another tower. All that the least-squares solution, the ridge path and the error on held-out
images need of the data are the second moments of (1, g, h), which are summed in float64, batch by batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STRENGTHS = torch.logspace(-10, 2, 49, dtype=torch.float64)
"""Ridge strengths that are tried, as multiples of the mean variance of the new features."""


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        weight: [out, in].
        bias: [out], or None where the layer has none.
    """

    weight: Tensor
    bias: Tensor | None = None

    def double(self, device: torch.device) -> "Linear":
        """The same layer in float64."""
        bias = None if self.bias is None else self.bias.detach().to(device, torch.float64)
        return Linear(self.weight.detach().to(device, torch.float64), bias)


@dataclass
class Moments:
    """Second moments of (1, g, h) over tokens.

    Attributes:
        new: Width of g, the new tower's features.
        old: Width of h, the old tower's features.
        device: Where they are summed; it must know float64.
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
        """Count tokens: g [n, new] with the h [n, old] that belong to them."""
        ones = new.new_ones(len(new), 1, dtype=torch.float64)
        joined = torch.cat([ones, new.double(), old.double()], dim=1).to(self.device)
        self.total.addmm_(joined.T, joined)

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(self.new, self.old, self.device)
        both.total = self.total + other.total
        return both

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.total[0, 0])

    @property
    def mean(self) -> Tensor:
        """Mean of (g, h)."""
        return self.total[0, 1:] / self.total[0, 0]

    def about(self, center: Tensor) -> Tensor:
        """Mean product of (g, h) - centre with itself [new + old, new + old]."""
        cross = torch.outer(self.mean, center)
        return self.total[1:, 1:] / self.total[0, 0] - cross - cross.T + torch.outer(center, center)


@dataclass(frozen=True)
class Fit:
    """A fitted layer, and how well it does on what it was not fitted on.

    Attributes:
        layer: The layer, fitted on everything, held-out tokens included.
        r2: Share of the pre-activations' variance on held-out tokens that the fit on the others explains.
        error: Root mean square of what is left there, relative to the pre-activations' root mean square.
        strength: Ridge strength, as a multiple of the mean variance of the new features.
        shrunk_to_start: Whether the ridge pulls towards ``start`` (otherwise towards zero).
        r2_start: What ``start`` explains by itself; None where there is none.
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
    """Fit layers on new features to what old layers gave on old ones.

    The ridge pulls the new weights towards zero or, where there is a layer to start from, towards that one, whichever
    leaves less error on the held-out tokens. The intercept is not penalised; layers without bias have none, and their
    moments are then taken about zero instead of about the mean.

    Args:
        fitted: Moments of the tokens to fit on.
        held_out: Moments of the tokens that choose the strength.
        targets: The old layers, which read h.
        starts: For each, the layer that would stay in place on g, or None.
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
    """What the fits of layers that read the same features share: two eigen-decompositions, and moments."""

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
        """Mean squared error on the held-out tokens, summed over outputs, for each of `STRENGTHS`."""
        n = self.new
        given = self.vectors.T @ (self.fit[:n, n:] @ target.T - self.fit[:n, :n] @ start.T)
        wanted = self.vectors.T @ (self.test[:n, n:] @ target.T - self.test[:n, :n] @ start.T)
        left = self.residual(self.test, start, target)
        linear, square = (given * wanted).sum(1), self.turned * (given @ given.T)
        shrink = 1 / (self.values[:, None] + STRENGTHS.to(self.values) * self.scale)  # [new, strengths]
        return left - 2 * linear @ shrink + (shrink * (square @ shrink)).sum(0)

    def residual(self, moments: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference of ``weight`` on g and ``target`` on h under centred moments, summed over outputs."""
        joined = torch.cat([weight, -target], dim=1)
        return ((joined @ moments) * joined).sum()

    @property
    def scale(self) -> Tensor:
        """Mean variance of the new features."""
        return self.values.mean().clamp_min(torch.finfo(torch.float64).tiny)

    def solve(self, target: Tensor, start: Tensor, strength: float) -> Tensor:
        """Weights of this strength on all tokens."""
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
    # What the outputs vary by on the held-out tokens, and their mean square.
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
    """Mean squared difference of ``layer`` on g and ``target`` on h, biases included, summed over outputs."""
    biases = [
        one.bias if one.bias is not None else one.weight.new_zeros(len(one.weight)) for one in (layer, target)
    ]
    joined = torch.cat([(biases[0] - biases[1])[:, None], layer.weight, -target.weight], dim=1)
    return ((joined @ moments.total) * joined).sum() / moments.total[0, 0]
