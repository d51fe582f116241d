"""Parts of a Flamingo: configuration, perceiver and gated cross-attention blocks.

Structure and constants after mlfoundations/open_flamingo 655f693 (open_flamingo/src/helpers.py, flamingo_lm.py); the
parameter names are theirs.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer

MediaMask = Literal["preceding", "legacy"]
"""Which image a token attends to.

- ``preceding``: the last one before it, none before the first (open_flamingo from 2.0 on).
- ``legacy``: a placeholder its own, any other token the *next* one, and none after the last placeholder
(open-flamingo
  0.0.2, which med-flamingo pins). New tokens therefore attend to none; images influence them only through
  self-attention.
"""


class FlamingoConfig(PreTrainedConfig):
    """Configuration of `FlamingoForConditionalGeneration`; the defaults are OpenFlamingo-9B's.

    Attributes:
        vision_config: The CLIP tower.
        text_config: The LLaMA, its vocabulary with the added tokens.
        image_token_id: Id of the placeholder, one per image.
        media_mask: See `MediaMask`.
        cross_attention_interval: A gated block precedes every n-th layer.
        cross_attention_heads: Heads of each gated block.
        cross_attention_intermediate_size: Width of each gated block's MLP.
        perceiver_latents: Latents per image.
        perceiver_width: Width of the latents, if a linear layer, the bridge, projects features to it; None
            if it equals the features' width and there is no bridge.
        perceiver_depth: Layers of the perceiver.
        perceiver_heads: Heads of each of them.
        perceiver_intermediate_size: Width of their MLPs.
        resampler_head_dim: Width of a head in the perceiver and in the gated blocks.
    """

    model_type = "mgll_flamingo"
    sub_configs_defaults = {  # noqa: RUF012 - the library's attribute
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig),
        "text_config": SubConfigSpec(config_class=LlamaConfig),
    }

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 32001
    media_mask: MediaMask = "preceding"
    cross_attention_interval: int = 4
    cross_attention_heads: int = 8
    cross_attention_intermediate_size: int = 16384
    perceiver_latents: int = 64
    perceiver_width: int | None = None
    perceiver_depth: int = 6
    perceiver_heads: int = 8
    perceiver_intermediate_size: int = 4096
    resampler_head_dim: int = 64
    tie_word_embeddings: bool = False

    @property
    def latent_width(self) -> int:
        """Return the width of the latents, which the gated blocks read."""
        return self.vision_config.hidden_size if self.perceiver_width is None else self.perceiver_width


class CrossAttention(nn.Module):
    """Attention without biases, with a LayerNorm on the queries.

    Args:
        width: Width of the queries' input, and of the result.
        read_width: Width of the keys' and values' input.
        heads: Attention heads.
        head_dim: Width of each.
    """

    def __init__(self, width: int, read_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(read_width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def attend(self, asks: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from ``asks`` [B, T, width] to ``read`` [B, S, read_width]; ``mask`` is [B, 1, T, S]."""
        query, key, value = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (self.to_q(asks), *self.to_kv(read).chunk(2, dim=-1))
        )
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended: Tensor = self.to_out(found.transpose(1, 2).flatten(2))
        return attended


class PerceiverAttention(CrossAttention):
    """Latents attend to the features of an image and to each other."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__(width, width, heads, head_dim)
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Map ``features`` [n, patches, width] and ``latents`` [n, L, width] to [n, L, width]."""
        latents = self.norm_latents(latents)
        return self.attend(latents, torch.cat([self.norm_media(features), latents], dim=1))


class MediaAttention(CrossAttention):
    """Text attends to the latents of images."""

    def __init__(self, width: int, read_width: int, heads: int, head_dim: int) -> None:
        super().__init__(width, read_width, heads, head_dim)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, media: Tensor, visible: Tensor) -> Tensor:
        """Map ``hidden`` [B, T, width], ``media`` [B, S, read_width] and ``visible`` [B, T, S] to [B, T, width].

        Zero for tokens that attend to nothing.
        """
        attends = visible.any(dim=-1, keepdim=True)
        # A row without any key has no softmax: let it attend to everything, and discard the result.
        found = self.attend(self.norm(hidden), media, (visible | ~attends)[:, None])
        return torch.where(attends, found, 0)


def feed_forward(width: int, inner: int) -> nn.Sequential:
    """Build the MLP of the perceiver and of the gated blocks."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    )  # fmt: skip


class PerceiverLayer(nn.ModuleList, GradientCheckpointingLayer):
    """Attention (0) and MLP (1), each added to the latents."""

    def __init__(self, config: FlamingoConfig) -> None:
        width = config.latent_width
        attention = PerceiverAttention(width, config.perceiver_heads, config.resampler_head_dim)
        super().__init__((attention, feed_forward(width, config.perceiver_intermediate_size)))

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """Map ``latents`` [n, L, width] and ``features`` [n, patches, width] to [n, L, width]."""
        attention, mlp = self
        latents = latents + attention(features, latents)
        read: Tensor = latents + mlp(latents)
        return read


class Perceiver(nn.Module):
    """Resamples the features of an image to a fixed number of latents of equal width."""

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        width = config.latent_width
        self.latents = nn.Parameter(torch.empty(config.perceiver_latents, width))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.perceiver_depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Map [n, patches, width] to [n, latents, width]."""
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        normed: Tensor = self.norm(latents)
        return normed


class GatedCrossAttention(GradientCheckpointingLayer):
    """The block before every n-th layer of the language model: gated attention to images and a gated MLP."""

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.attn = MediaAttention(
            width, config.latent_width, config.cross_attention_heads, config.resampler_head_dim
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width, config.cross_attention_intermediate_size)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, media: Tensor | None, visible: Tensor | None) -> Tensor:
        """Apply the block, with shapes as in `MediaAttention`; without ``media`` only the MLP."""
        if media is not None:
            hidden = hidden + self.attn(hidden, media, visible) * self.attn_gate.tanh()
        gated: Tensor = hidden + self.ff(hidden) * self.ff_gate.tanh()
        return gated


def attended_image(input_ids: Tensor, image_token_id: int, media_mask: MediaMask) -> Tensor:
    """Return which image of its row each token attends to: 1 for the first, 0 for none; [B, T] -> [B, T]."""
    placeholders = input_ids == image_token_id
    number = placeholders.cumsum(dim=-1)
    if media_mask == "preceding":
        return number
    following = torch.where(placeholders, number, number + 1)
    return following.masked_fill(following > number[:, -1:], 0)
