"""Tiny CLIP towers of open_clip and transformers, with all weights random, so that no mix-up cancels out."""

from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from tests.builders import tower_config

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Sample every weight from a normal distribution (untrained LayerNorms and biases are all equal)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(
                torch.randn(weight.shape, generator=generator) * 0.05 + ("ln" in name or "norm" in name)
            )
    return model.eval()


def open_clip_model(
    quick_gelu: bool = False, custom_text: bool = False, width: int = 64, depth: int = 3
) -> nn.Module:
    """A full open_clip CLIP, 42 px in 9 patches."""
    vision = CLIPVisionCfg(layers=depth, width=width, head_width=64, patch_size=14, image_size=42)
    text = CLIPTextCfg(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return scramble(kind(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu))


def open_clip_features(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Penultimate block with class token, and pooled projection, by open_clip's own code."""
    visual = model.visual
    with torch.no_grad():
        penultimate = visual.forward_intermediates(
            pixels, indices=[len(visual.transformer.resblocks) - 2], output_fmt="NLC",
            output_extra_tokens=True, intermediates_only=True,
        )  # fmt: skip
        pooled = visual(pixels)
    class_token = penultimate["image_intermediates_prefix"][0]
    return {
        "penultimate": torch.cat((class_token, penultimate["image_intermediates"][0]), 1),
        "pooled": pooled,
    }


def clip_model(**changes: object) -> CLIPModel:
    """A full transformers CLIP, 28 px in 4 patches."""
    config = CLIPConfig(vision_config=tower_config(**changes).to_dict(), text_config=TEXT, projection_dim=16)
    return scramble(CLIPModel(config))


def vision_model(
    projection: bool = False, **changes: object
) -> CLIPVisionModel | CLIPVisionModelWithProjection:
    """A transformers vision tower, 28 px in 4 patches."""
    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    return scramble(kind(tower_config(**changes)))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as contiguous copies, ready to be written."""
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def write(state: dict[str, Tensor], path: Path) -> Path:
    """Write a bare state dict file."""
    torch.save(state, path)
    return path
