"""An image tower and a text tower that learn together."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mgll_encoder.losses import Alphas, MGLLLoss
from mgll_encoder.spec import TowerSpec
from mgll_encoder.tower import Tower, build_model

CONTEXT = 77
"""Longest text in tokens, as in CLIP."""


@dataclass(frozen=True)
class Preset:
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


PRESETS = {
    "tiny": Preset(_vit(width=128, depth=4, size=64, patch=8)),
    "small": Preset(_vit(width=192, depth=6, size=64, patch=8)),
}
"""Towers that learn on two CPU cores, in minutes."""


class TwoTowers(nn.Module):
    """Image tower, text tower and loss; ``forward`` gives what transformers' Trainer needs.

    Args:
        vision: The image tower; its projection, where it has one, is trained on.
        text_width: Hidden size of the (new) text tower.
        text_depth: Blocks of the text tower.
        vocabulary: Number of token ids; the last one ends a text, 0 is padding.
        alphas: Weights of the loss terms.
    """

    def __init__(
        self, vision: Tower, text_width: int, text_depth: int, vocabulary: int, alphas: Alphas
    ) -> None:
        super().__init__()
        width, shared = vision.spec.width, vision.spec.projection_dim or vision.spec.width
        self.spec = vision.spec
        self.vision = vision.model
        self.projection = nn.Linear(width, shared, bias=False)
        if vision.projection is None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)
        else:
            self.projection.weight.data.copy_(vision.projection)
        text = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=text_depth,
            num_attention_heads=text_width // 32,
            max_position_embeddings=CONTEXT,
            projection_dim=shared,
            hidden_act="gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=0,
        )
        self.text = CLIPTextModelWithProjection(text)
        self.loss = MGLLLoss(alphas)

    @classmethod
    def from_preset(cls, preset: Preset, vocabulary: int, alphas: Alphas) -> "TwoTowers":
        """Towers with random weights."""
        vision = Tower.from_model(build_model(preset.spec), preset.spec)
        return cls(vision, preset.text_width, preset.text_depth, vocabulary, alphas)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features in the shared space, [N, D], not normalised, of pixels [N, 3, S, S]."""
        return self.projection(self.vision(pixels).pooler_output)

    def text_features(self, ids: Tensor) -> Tensor:
        """Features in the shared space, [U, D], not normalised, of token ids [U, L].

        Attention is causal and the feature is read at the end token, so padding after it has no effect.
        """
        return self.text(ids).text_embeds

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, truth: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """The loss under ``loss`` and its terms; see :class:`mgll_encoder.losses.MGLLLoss` for the arguments."""
        images, texts = self.image_features(pixel_values), self.text_features(input_ids)
        return self.loss(images, texts, truth, keys)

    def tower(self) -> Tower:
        """The image tower with its projection, to be saved."""
        return Tower.from_model(self.vision, self.spec, self.projection.weight.detach().to(torch.float32))
