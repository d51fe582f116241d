"""Explanation maps: attention, and attribution for a text or a class, overlaid on the images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradientXActivation
from numpy.typing import NDArray
from PIL import Image
from sklearn.pipeline import Pipeline
from torch import Tensor, nn
from torch.nn.functional import normalize

from mgll_encoder.tower.architectures import first_patch
from mgll_encoder.tower.model import Tower
from mgll_encoder.tower.preprocess import image_transform

ATTENTION, ROLLOUT = "attention of the last block", "attention rollout"

_SHOWN = 224
"""Minimum side of a picture on the sheet, in pixels."""
_COLORS = "inferno"
_FONT = 9
"""Size of captions, points."""
_DPI = 110


@dataclass(frozen=True)
class Target:
    """A score of an image that can be attributed to its patches.

    Attributes:
        name: Its name, for the caption.
        unit: Its unit.
        score: Maps pooled features [n, width] to scores [n], with gradients.
    """

    name: str
    unit: str
    score: Callable[[Tensor], Tensor]


def text_target(tower: Tower, text: str, feature: NDArray[np.floating]) -> Target:
    """Return the target for the similarity of an image and a text.

    Args:
        tower: A tower with a projection.
        text: The text.
        feature: Its feature in the shared space, [D].
    """
    if (shared := tower.into_shared) is None:
        raise ValueError("the tower has no projection")
    projection, direction = shared.float(), normalize(torch.as_tensor(feature).float(), dim=0)
    return Target(text, "cosine", lambda pooled: normalize(pooled @ projection.T, dim=1) @ direction)


def class_target(name: str, probe: Pipeline) -> Target:
    """Return the target for a class of a linear probe.

    Args:
        name: The class.
        probe: As from `mgll_encoder.probing.linear.fit_linear`: a scaler and a logistic regression.
    """
    scaler, regression = probe[0], probe[-1]
    weight = torch.from_numpy(regression.coef_[0] / scaler.scale_).float()
    bias = float(regression.intercept_[0]) - float(weight @ torch.from_numpy(scaler.mean_).float())
    return Target(name, "log-odds", lambda pooled: pooled @ weight + bias)


def attention_maps(tower: Tower, pixels: Tensor) -> dict[str, NDArray[np.float32]]:
    """Compute how much the class token attends to each patch.

    Args:
        tower: The tower.
        pixels: Preprocessed images, [n, 3, S, S].

    Returns:
        Two maps, [n, grid, grid]: the last block's attention, mean over heads; and attention rollout (Abnar and Zuidema
        2020), which multiplies it over all blocks, each averaged with the identity for the residual path.
    """
    with torch.inference_mode(), _eager_attention(tower):
        layers = tower.model(pixels, output_attentions=True).attentions
    grid, first = tower.spec.grid, first_patch(tower.spec)
    means = [layer.float().mean(dim=1).cpu() for layer in layers]  # [n, tokens, tokens]
    rolled = torch.eye(means[0].shape[-1]).expand_as(means[0])
    for mean in means:
        rolled = (0.5 * mean + 0.5 * torch.eye(mean.shape[-1])) @ rolled
    return {
        name: _from_image(found, tower)[:, first:].reshape(-1, grid, grid).numpy()
        for name, found in ((ATTENTION, means[-1]), (ROLLOUT, rolled))
    }


def _from_image(attention: Tensor, tower: Tower) -> Tensor:
    """Return the class token's row of attention [n, tokens, tokens]; without a class token, the mean over all rows."""
    return attention[:, 0] if tower.header.architecture.leading else attention.mean(dim=1)


def target_maps(
    tower: Tower, pixels: Tensor, target: Target
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute class activation maps: how much each patch contributes to a target.

    Gradient times activation of the patch tokens before the last block, summed over channels and clamped at 0: Grad-CAM
    without averaging the gradient over positions (HiResCAM, Draelos and Carin 2020), since only few patch tokens have a
    gradient in a vision transformer. Computed by captum.

    Args:
        tower: The tower.
        pixels: Preprocessed images, [n, 3, S, S].
        target: The target.

    Returns:
        Maps [n, grid, grid], and the scores [n].
    """
    scorer = _Attributable(tower, target)
    found = LayerGradientXActivation(scorer, scorer.patches).attribute(pixels.clone().requires_grad_())
    maps = found.detach().sum(dim=1).relu().cpu().numpy()
    with torch.inference_mode():
        return maps, scorer(pixels).cpu().numpy()


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: Mapping[str, NDArray[np.floating]],
    notes: Mapping[str, Sequence[str]],
    tower: Tower,
    out: Path,
) -> None:
    """Write a PNG with one row per image: the image after the tower's resize rule, then with each map overlaid.

    Args:
        images: The images, [n].
        captions: Caption of each image.
        columns: Heading -> maps, [n, grid, grid]; each map is scaled from its minimum to its maximum, as the bar of
            colors below them says.
        notes: Heading -> caption of each map.
        tower: The tower, for its resize rule.
        out: The PNG.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rule = tower.spec.model_copy(update={"image_size": max(_SHOWN, tower.spec.image_size)})
    show = image_transform(rule)
    mean, std = torch.tensor(rule.mean)[:, None, None], torch.tensor(rule.std)[:, None, None]
    across = 1 + len(columns)
    margins = ConstrainedLayoutEngine(h_pad=0.1)  # the default one cuts a pixel of the first heading
    figure = Figure(figsize=(2.3 * across, 2.6 * len(images) + 0.5), layout=margins)
    axes = figure.subplots(len(images), across, squeeze=False)
    shades = ScalarMappable(Normalize(0, 1), _COLORS)
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        picture = (show(image) * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        axes[row, 0].set_title(caption, fontsize=_FONT)
        for place, (heading, maps) in enumerate(columns.items(), start=1):
            overlay = stretched(maps[row], rule.image_size)
            axes[row, place].imshow(picture)
            axes[row, place].imshow(overlay, cmap=_COLORS, alpha=0.25 + 0.5 * overlay)
            lines = [heading] if row == 0 else []
            lines += [notes[heading][row]] if heading in notes else []
            axes[row, place].set_title("\n".join(lines), fontsize=_FONT)
        axes[row, 0].imshow(picture)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(shades, ax=axes[:, 1:], location="bottom", aspect=40, shrink=0.6, pad=0.02)
    bar.set_ticks([0, 1], labels=["least of the map", "most of the map"], fontsize=_FONT)
    bar.outline.set_visible(False)
    figure.savefig(out, dpi=_DPI, format="png")


def stretched(values: NDArray[np.floating], side: int) -> NDArray[np.float32]:
    """Scale a map [grid, grid] to 0 to 1 and resize it to a picture [side, side]; all 0 if the map is constant."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high - low > 1e-12 else np.zeros_like(values)
    grid = torch.from_numpy(scaled).float()[None, None]
    wide: torch.Tensor = LayerAttribution.interpolate(grid, (side, side), "bilinear")[0, 0]
    return wide.clamp(0, 1).numpy()


class _Attributable(nn.Module):
    """A tower that computes a target's score; the patch tokens before its last block are a layer for attribution."""

    def __init__(self, tower: Tower, target: Target) -> None:
        super().__init__()
        self.tower, self.model, self.target = tower, tower.model, target
        self.patches = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        last = self.model.get_submodule(
            f"{self.tower.header.architecture.blocks}.{self.tower.spec.depth - 1}"
        )
        with last.register_forward_pre_hook(self._through_patches):
            return self.target.score(self.tower.pooled(pixels).float().cpu())

    def _through_patches(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = given
        first, grid = first_patch(self.tower.spec), self.tower.spec.grid
        square = hidden[:, first:].transpose(1, 2).unflatten(2, (grid, grid))
        patches = self.patches(square).flatten(2).transpose(1, 2)
        return torch.cat([hidden[:, :first], patches], dim=1), *rest


@contextmanager
def _eager_attention(tower: Tower) -> Iterator[None]:
    """Use the attention implementation that returns its weights; the faster ones do not."""
    before = tower.model.config._attn_implementation
    tower.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.model.set_attn_implementation(before)
