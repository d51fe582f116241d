"""Image and text tower as one CLIP, as far as the stock classes can express them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.text.clip_tokenizer import numbered_anew
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.model import Tower
from mgll_encoder.tower.spec import TowerSpec

ALONE = "`to=vision` writes the image tower alone"
"""What to take instead of a whole CLIP, for messages."""

_TOKENS = "embeddings.token_embedding.weight"


@dataclass(frozen=True)
class WholeClip:
    """A CLIP: both towers, their projections and the temperature.

    Attributes:
        spec: The image tower's specification.
        text_config: Of the text tower.
        image: Tensors of the image tower, by their names in ``CLIPVisionModel``.
        text: Tensors of the text tower, by their names in ``CLIPTextModel``.
        image_projection: [shared, image width].
        text_projection: [shared, text width].
        logit_scale: Logarithm of the inverse temperature, a scalar.
        tokenizer: The tokenizer; each of its ids has an embedding.
        unknown: How many of these embeddings are zero, because the piece occurred in no training text.
    """

    spec: TowerSpec
    text_config: CLIPTextConfig
    image: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    image_projection: Tensor
    text_projection: Tensor
    logit_scale: Tensor
    tokenizer: PreTrainedTokenizerBase
    unknown: int


def whole_clip(tower: Tower, text: TextTower, source: Path) -> WholeClip:
    """Join an image tower and its text tower.

    Args:
        tower: The image tower, with a projection.
        text: The text tower.
        source: Where they were read, for messages.

    Raises:
        IncompatibleTowerError: a part is not that of a CLIP.
    """
    linear = text.projection
    image = tower.header.architecture
    _expect(image is CLIP, source, f"its image tower is a {image.title}: expected a CLIP ViT")
    assert tower.projection is not None, "text_tower_of refuses a CLIP without one"
    kind = text.model.config.model_type
    _expect(
        isinstance(text.model, CLIPTextModel),
        source,
        f"its text tower is a '{kind}': expected that of a CLIP",
    )
    _expect(
        text.pooling == "end" and isinstance(linear, nn.Linear) and linear.bias is None,
        source,
        f"its text features are pooled by '{text.pooling}': expected the end token and a plain projection",
    )
    assert isinstance(linear, nn.Linear), "checked above"
    tokenizer, tensors, unknown = _vocabulary(text)
    settings = text.model.config.to_dict() | {
        "vocab_size": len(tensors[_TOKENS]),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": len(linear.weight),
    }
    return WholeClip(
        spec=tower.spec,
        text_config=CLIPTextConfig.from_dict(settings),
        image=tower.model.state_dict(),
        text=tensors,
        image_projection=tower.projection,
        text_projection=linear.weight.detach(),
        logit_scale=torch.tensor(-math.log(text.temperature)),
        tokenizer=tokenizer,
        unknown=unknown,
    )


def _expect(held: bool, source: Path, found: str) -> None:
    if not held:
        raise IncompatibleTowerError(f"{source} cannot be written as a CLIP: {found}; {ALONE}")


def _vocabulary(text: TextTower) -> tuple[PreTrainedTokenizerBase, dict[str, Tensor], int]:
    """Return the tokenizer, the text tower's tensors, and how many pieces have no embedding of their own.

    The stock classes look up every id, so that a reduced vocabulary is filled up with zeros.
    """
    tensors = {name: tensor.detach() for name, tensor in text.model.state_dict().items()}
    tokenizer, unknown = text.tokenizer, 0
    if text.rows < len(tokenizer):
        tokenizer, former = numbered_anew(tokenizer, text.rows)
        table = tensors[_TOKENS]
        tensors[_TOKENS] = table.new_zeros(len(former), table.shape[1])
        known = [new for new, old in enumerate(former) if old is not None]
        tensors[_TOKENS][known] = table[[old for old in former if old is not None]]
        unknown = len(former) - len(known)
    tokenizer.model_max_length = text.context
    return tokenizer, tensors, unknown
