"""Where a tower looks: maps of attention, and of what speaks for a text or a class, laid over the images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradientXActivation
from numpy.typing import NDArray
from PIL import Image
from sklearn.pipeline import Pipeline
from torch import Tensor, nn
from torch.nn.functional import normalize

from mgll_encoder.tower.load import Tower
from mgll_encoder.tower.preprocess import image_transform

ATTENTION, ROLLOUT = "attention of the last block", "attention rollout"

_SHOWN = 224
"""Side of a picture on the sheet in pixels, at least."""
_COLORS = "inferno"


@dataclass(frozen=True)
class Target:
    """Something a tower can be asked about an image.

    Attributes:
        name: What, for the caption.
        unit: What the score is.
        score: From pooled features [n, width] to scores [n], with gradients.
    """

    name: str
    unit: str
    score: Callable[[Tensor], Tensor]


def text_target(tower: Tower, text: str, feature: NDArray[np.floating]) -> Target:
    """How alike an image and a text are.

    Args:
        tower: A tower with a projection.
        text: The text.
        feature: Its feature in the shared space, [D].
    """
    if tower.projection is None:
        raise ValueError("the tower has no projection")
    projection, direction = tower.projection.float(), normalize(torch.as_tensor(feature).float(), dim=0)
    return Target(text, "cosine", lambda pooled: normalize(pooled @ projection.T, dim=1) @ direction)


def class_target(name: str, probe: Pipeline) -> Target:
    """What a linear probe says of a class.

    Args:
        name: The class.
        probe: As `mgll_encoder.probing.linear.fit_linear` gives it: a scaler and a logistic regression.
    """
    scaler, regression = probe[0], probe[-1]
    weight = torch.from_numpy(regression.coef_[0] / scaler.scale_).float()
    bias = float(regression.intercept_[0]) - float(weight @ torch.from_numpy(scaler.mean_).float())
    return Target(name, "log-odds", lambda pooled: pooled @ weight + bias)


def attention_maps(tower: Tower, pixels: Tensor) -> dict[str, NDArray[np.float32]]:
    """How much the class token attends to each patch.

    Args:
        tower: The tower.
        pixels: As its preprocessing gives them, [n, 3, S, S].

    Returns:
        Two maps, [n, grid, grid]: the last block's attention, mean over heads; and attention rollout (Abnar and Zuidema
        2020), which follows it through all blocks with half of each block passing by on the residual path.
    """
    with torch.inference_mode(), _attention_at_hand(tower):
        layers = tower.model(pixels, output_attentions=True).attentions
    grid = tower.spec.grid
    means = [layer.float().mean(dim=1) for layer in layers]  # [n, tokens, tokens]
    rolled = torch.eye(means[0].shape[-1]).expand_as(means[0])
    for mean in means:
        rolled = (0.5 * mean + 0.5 * torch.eye(mean.shape[-1])) @ rolled
    return {
        name: found[:, 0, 1:].reshape(-1, grid, grid).numpy()
        for name, found in ((ATTENTION, means[-1]), (ROLLOUT, rolled))
    }


def target_maps(
    tower: Tower, pixels: Tensor, target: Target
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A class activation map: how much each patch speaks for a target.

    Gradient times activation of the patch tokens before the last block, summed over channels, negative parts cut off:
    Grad-CAM with the gradient of every place kept (HiResCAM, Draelos and Carin 2020), since only few patch tokens have
    one in a vision transformer. By captum.

    Args:
        tower: The tower.
        pixels: As its preprocessing gives them, [n, 3, S, S].
        target: What to ask.

    Returns:
        Maps [n, grid, grid], and the scores [n].
    """
    asked = _Asked(tower, target)
    found = LayerGradientXActivation(asked, asked.patches).attribute(pixels.clone().requires_grad_())
    maps = found.detach().sum(dim=1).relu().numpy()
    with torch.inference_mode():
        return maps, asked(pixels).numpy()


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: Mapping[str, NDArray[np.floating]],
    notes: Mapping[str, Sequence[str]],
    tower: Tower,
    out: Path,
) -> None:
    """Write a PNG: one image a row, as the tower's resize rule shows it, and beside it each map laid over.

    Args:
        images: The images, [n].
        captions: What stands above each.
        columns: Heading -> maps, [n, grid, grid]; each map is stretched from its least to its greatest value.
        notes: Heading -> what stands above each map.
        tower: The tower, for its resize rule.
        out: The PNG.
    """
    from matplotlib.figure import Figure

    rule = tower.spec.model_copy(update={"image_size": max(_SHOWN, tower.spec.image_size)})
    show = image_transform(rule)
    mean, std = torch.tensor(rule.mean)[:, None, None], torch.tensor(rule.std)[:, None, None]
    across = 1 + len(columns)
    figure = Figure(figsize=(2.3 * across, 2.55 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), across, squeeze=False)
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        picture = (show(image) * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        axes[row, 0].set_title(caption, fontsize=7)
        for place, (heading, maps) in enumerate(columns.items(), start=1):
            overlay = stretched(maps[row], rule.image_size)
            axes[row, place].imshow(picture)
            axes[row, place].imshow(overlay, cmap=_COLORS, alpha=0.25 + 0.5 * overlay)
            lines = [heading] if row == 0 else []
            lines += [notes[heading][row]] if heading in notes else []
            axes[row, place].set_title("\n".join(lines), fontsize=7)
        axes[row, 0].imshow(picture)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(out, dpi=100, format="png")


def stretched(values: NDArray[np.floating], side: int) -> NDArray[np.float32]:
    """A map [grid, grid] on a scale of 0 to 1, at the size of a picture [side, side]; 0 throughout if it is flat."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high - low > 1e-12 else np.zeros_like(values)
    grid = torch.from_numpy(scaled).float()[None, None]
    wide: torch.Tensor = LayerAttribution.interpolate(grid, (side, side), "bilinear")[0, 0]
    return wide.clamp(0, 1).numpy()


class _Asked(nn.Module):
    """A tower that answers a target, with its patch tokens before the last block as a layer to attribute to."""

    def __init__(self, tower: Tower, target: Target) -> None:
        super().__init__()
        self.model, self.grid, self.target = tower.model, tower.spec.grid, target
        self.patches = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.model.pre_layrnorm(self.model.embeddings(pixels))
        *before, last = self.model.encoder.layers
        for layer in before:
            hidden = layer(hidden, None)
        square = hidden[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        patches = self.patches(square).flatten(2).transpose(1, 2)
        hidden = last(torch.cat([hidden[:, :1], patches], dim=1), None)
        return self.target.score(self.model.post_layernorm(hidden[:, 0]).float())


@contextmanager
def _attention_at_hand(tower: Tower) -> Iterator[None]:
    """The attention that keeps its weights; the faster ones do not."""
    before = tower.model.config._attn_implementation
    tower.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.model.set_attn_implementation(before)
