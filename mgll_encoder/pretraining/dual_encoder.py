"""An image tower and a text tower that are trained together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgll_encoder.pretraining.losses import Alphas, MGLLLoss
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.model import Tower, build_model, pooled
from mgll_encoder.tower.spec import TowerSpec


@dataclass(frozen=True)
class TowerSize:
    """Towers to train from scratch.

    Attributes:
        spec: Geometry and preprocessing of the image tower.
        text_width: Hidden size of the text tower (heads of 32).
        text_depth: Blocks of the text tower.
    """

    spec: TowerSpec
    text_width: int = 128
    text_depth: int = 2


def _vit(width: int, depth: int, size: int, patch: int) -> TowerSpec:
    return TowerSpec(
        width=width,
        depth=depth,
        heads=width // 32,
        mlp_width=4 * width,
        patch_size=patch,
        image_size=size,
        activation="gelu",
        projection_dim=width,
    )


TOWER_SIZES = {
    "nano": TowerSize(_vit(width=128, depth=4, size=64, patch=16)),
    "tiny": TowerSize(_vit(width=128, depth=4, size=64, patch=8)),
    "small": TowerSize(_vit(width=192, depth=6, size=64, patch=8)),
}
"""Towers that can be trained on two CPU cores in minutes."""


class TwoTowers(nn.Module):
    """Image tower, text tower and loss; ``forward`` returns what transformers' Trainer needs.

    Args:
        vision: The image tower.
        projection: From its width to the shared space, as from :func:`image_projection`.
        text: The text tower, into the same space.
        alphas: Weights of the loss terms.
    """

    def __init__(self, vision: Tower, projection: nn.Linear, text: TextTower, alphas: Alphas) -> None:
        super().__init__()
        self.spec = vision.spec
        self.vision = vision.model
        self.projection = projection
        self.text = text
        self.loss = MGLLLoss(alphas, text.temperature)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Compute features [N, D] in the shared space, not normalized, of pixels [N, 3, S, S]."""
        features: Tensor = self.projection(pooled(self.vision, self.spec, pixels))
        return features

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, truth: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss`` and its terms; arguments as in :class:`~mgll_encoder.pretraining.losses.MGLLLoss`."""
        images, texts = self.image_features(pixel_values), self.text.encode(input_ids, attention_mask)
        terms: dict[str, Tensor] = self.loss(images, texts, truth, keys)
        return terms

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Store only block inputs and recompute the rest in the backward pass; called by the Trainer."""
        self.vision.activation_checkpointing_enable(**settings)
        self.text.model.activation_checkpointing_enable(**settings)

    def tower(self) -> Tower:
        """Return the image tower with its projection, for saving."""
        return Tower.from_model(self.vision, self.spec, self.projection.weight.detach().to(torch.float32))

    def text_tower(self) -> TextTower:
        """Return the text tower with the learned temperature, for saving."""
        self.text.temperature = float(1 / self.loss.scale.detach())
        return self.text


def new_tower(size: TowerSize) -> Tower:
    """Create an image tower with random weights and without a projection."""
    return Tower.from_model(build_model(size.spec), size.spec)


def image_projection(vision: Tower) -> nn.Linear:
    """Return a tower's projection into the shared space for training; a new one of its width if it has none."""
    width, shared = vision.spec.width, vision.spec.projection_dim or vision.spec.width
    projection = nn.Linear(width, shared, bias=False)
    if vision.projection is None:
        nn.init.normal_(projection.weight, std=width**-0.5)
    else:
        projection.weight.data.copy_(vision.projection)
    return projection
