"""The text tower that an image tower was trained with, from whatever it was read."""

from pathlib import Path

from mgll_encoder.common.errors import MismatchError, UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mgll_encoder.paired.bert_text import bert_settings, bert_text_tower
from mgll_encoder.paired.clip_text import clip_text_tower, stored_temperature
from mgll_encoder.paired.siglip_text import siglip_text_tower
from mgll_encoder.text.text_tower import FOLDER as TEXT_FOLDER
from mgll_encoder.text.text_tower import TextTower, load_text_tower
from mgll_encoder.tower.architectures.clip import CLIP, HF_STATE
from mgll_encoder.tower.architectures.siglip import SIGLIP
from mgll_encoder.tower.folder_metadata import HF_FOLDER, OPEN_CLIP_FOLDER, OURS
from mgll_encoder.tower.model import Tower
from mgll_encoder.weights.weight_file import open_weights


def paired_text_tower(path: Path, vision: Tower, shared: int) -> TextTower | None:
    """Return the text tower that an image tower was trained with, if it was saved.

    Args:
        path: What the image tower was read from.
        vision: The image tower.
        shared: Width of the shared space.

    Raises:
        UserError: it is damaged.
    """
    layout = vision.header.layout
    if layout == OURS:
        return load_text_tower(path) if (path / TEXT_FOLDER).is_dir() else None
    if layout == HF_FOLDER:
        if read_json(path / "config.json").get("model_type") != "clip":
            return None
        text = TextTower.pretrained(str(path), shared)
        text.temperature = stored_temperature(open_weights(path))
        return text
    clip = vision.header.architecture is CLIP
    return (
        None
        if layout == HF_STATE or not clip
        else clip_text_tower(path, vision.spec.activation, shared, vision.header.weights)
    )


def text_tower_of(path: Path, tower: Tower, otherwise: str = "") -> TextTower:
    """Load the text tower of an image tower: from a folder of ``mgll-encoder pretrain``, or a full CLIP of any layout.

    Args:
        path: What the image tower was read from.
        tower: The image tower.
        otherwise: What to do if there is none; ends the message.

    Raises:
        UserError: there is none, it is damaged, or the image tower has no projection into the shared space.
    """
    shared = tower.into_shared
    if shared is None:
        raise UnsupportedCheckpointError(
            f"tower {path} has no projection into the image-text space: expected one written by "
            f"`pretrain()`, or a full CLIP{otherwise}"
        )
    siglip = tower.header.architecture is SIGLIP and tower.header.layout == HF_FOLDER
    if siglip and read_json(path / "config.json").get("model_type") == SIGLIP.around:
        return siglip_text_tower(path)
    if tower.header.layout == OPEN_CLIP_FOLDER and (config := bert_settings(path)):
        return bert_text_tower(path, config, shared.shape[0])
    text = paired_text_tower(path, tower, shared.shape[0])
    if text is None:
        raise UnsupportedCheckpointError(
            f"tower {path} has no text tower: expected a folder written by `pretrain()`, or a full CLIP; "
            f"an image tower alone cannot compare images with texts{otherwise}"
        )
    end = text.tokenizer.eos_token_id
    if end is not None and end >= text.rows:
        raise MismatchError(
            f"{path}: the text tower has {text.rows} pieces, its tokenizer {len(text.tokenizer)}: expected "
            "those of one CLIP; use both from the same folder"
        )
    return text.eval()
