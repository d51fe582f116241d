"""Ridge regression from second moments, against scikit-learn's on the data themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from mllm_adapters.alignment.ridge import STRENGTHS, Linear, Moments, fit_connectors

NEW, OLD, OUT = 7, 5, 4


def moments(new: Tensor, old: Tensor, batch: int = 60) -> Moments:
    found = Moments(NEW, OLD)
    for start in range(0, len(new), batch):
        found.add(new[start : start + batch], old[start : start + batch])
    return found


@pytest.fixture
def data() -> SimpleNamespace:
    """New features that know the old ones but for noise; neither has mean zero."""
    torch.manual_seed(0)
    old = torch.randn(700, OLD, dtype=torch.float64) + 1
    new = old @ torch.randn(OLD, NEW, dtype=torch.float64) + 0.3 * torch.randn(700, NEW) + 2
    layer = Linear(torch.randn(OUT, OLD, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64))
    return SimpleNamespace(new=new, old=old, layer=layer, cut=500)


def sklearn_path(data: SimpleNamespace, layer: Linear) -> tuple[Ridge, float, float, float]:
    """The best ridge by held-out error, then fitted on everything; strength, R² and relative error of the former."""
    intercept = layer.bias is not None
    wanted = data.old @ layer.weight.T + (layer.bias if layer.bias is not None else 0)
    fit, test = slice(None, data.cut), slice(data.cut, None)

    def ridge(strength: float, x: Tensor, y: Tensor, like: Tensor) -> Ridge:
        variance = like.var(0, correction=0).mean() if intercept else like.square().mean()
        alpha = strength * float(variance) * len(x)
        return Ridge(alpha=alpha, fit_intercept=intercept, solver="svd").fit(x.numpy(), y.numpy())

    def error(strength: float) -> float:
        found = ridge(strength, data.new[fit], wanted[fit], data.new[fit]).predict(data.new[test].numpy())
        return float(((found - wanted[test].numpy()) ** 2).sum(1).mean())

    best = min(STRENGTHS.tolist(), key=error)
    spread = float((wanted[test] - wanted[test].mean(0)).square().sum(1).mean())
    size = float(wanted[test].square().sum(1).mean())
    whole = ridge(best, data.new, wanted, data.new[fit])
    return whole, best, 1 - error(best) / spread, (error(best) / size) ** 0.5


@pytest.mark.parametrize("bias", [True, False], ids=["with intercept", "through the origin"])
def test_it_is_scikit_learns_ridge(data: SimpleNamespace, bias: bool) -> None:
    layer = data.layer if bias else Linear(data.layer.weight)
    fitted = moments(data.new[: data.cut], data.old[: data.cut])
    (found,) = fit_connectors(fitted, moments(data.new[data.cut :], data.old[data.cut :]), [layer], [None])
    whole, strength, r2, relative = sklearn_path(data, layer)
    assert found.strength == pytest.approx(strength)
    np.testing.assert_allclose(found.layer.weight, whole.coef_, atol=1e-6)
    if bias:
        np.testing.assert_allclose(found.layer.bias, whole.intercept_, atol=1e-6)
    else:
        assert found.layer.bias is None
    assert found.r2 == pytest.approx(r2, abs=1e-9)
    assert found.error == pytest.approx(relative, abs=1e-9)


def test_a_rotation_is_undone(data: SimpleNamespace) -> None:
    turn = torch.linalg.qr(torch.randn(NEW, OLD, dtype=torch.float64)).Q
    new = data.old @ turn.T
    both = moments(new[: data.cut], data.old[: data.cut]), moments(new[data.cut :], data.old[data.cut :])
    (found,) = fit_connectors(*both, [data.layer], [None])
    assert found.r2 == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(found.layer.weight @ turn, data.layer.weight, atol=1e-6)


def test_features_of_other_images_explain_nothing(data: SimpleNamespace) -> None:
    new = data.new[torch.randperm(len(data.new))]
    both = moments(new[: data.cut], data.old[: data.cut]), moments(new[data.cut :], data.old[data.cut :])
    (found,) = fit_connectors(*both, [data.layer], [None])
    assert abs(found.r2) < 0.05


def test_with_few_tokens_the_ridge_keeps_to_the_layer_that_is_nearly_right() -> None:
    torch.manual_seed(0)
    old = torch.randn(220, OLD, dtype=torch.float64)
    new = torch.cat([old, 0.1 * torch.randn(220, NEW - OLD)], dim=1)
    layer = Linear(torch.randn(OUT, OLD, dtype=torch.float64), torch.zeros(OUT, dtype=torch.float64))
    nearly = Linear(torch.cat([layer.weight, 0.01 * torch.randn(OUT, NEW - OLD)], dim=1), layer.bias)
    noisy = new + 0.5 * torch.randn_like(new)
    few, others = moments(noisy[:20], old[:20]), moments(noisy[20:], old[20:])
    free, kept = fit_connectors(few, others, [layer, layer], [None, nearly])
    assert kept.shrunk_to_start
    assert kept.r2_start is not None
    assert kept.r2 >= max(free.r2, kept.r2_start)
