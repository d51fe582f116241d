"""The text tower of a SigLIP: a folder of transformers with both towers (SigLIP 2 of a fixed size, MedSigLIP)."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, SiglipTextModel

from mgll_encoder.paired.clip_text import stored_temperature
from mgll_encoder.text.pretrained import load_pretrained
from mgll_encoder.text.text_tower import TextTower, load_encoder, pretrained_tokenizer
from mgll_encoder.weights.weight_file import open_weights


def siglip_text_tower(folder: Path) -> TextTower:
    """Load the text tower of a SigLIP. Its head is the projection; image features are in the shared space as they are.

    Every text is padded to the full context, without a mask, and read at the last position, as in training.

    Args:
        folder: A folder whose config.json has ``model_type`` ``siglip``.

    Returns:
        The tower in eval mode, float32.

    Raises:
        UserError: it cannot be read, or lacks weights.
    """
    source = str(folder)
    config = load_pretrained(AutoConfig, source, f"text tower {source}").text_config
    model: Any = load_encoder(SiglipTextModel, source, config=config)
    head = model.head
    model.head = nn.Identity()  # applied as the projection
    context, temperature = config.max_position_embeddings, stored_temperature(open_weights(folder))
    return TextTower(model, pretrained_tokenizer(source), head, "padded", context, temperature).eval()
