"""The text tower of a full CLIP: state dicts of open_clip and OpenAI, MGLL training checkpoints."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.clip_tokenizer import clip_tokenizer
from mgll_encoder.text.text_tower import TextTower, pretrained_tokenizer
from mgll_encoder.tower.architectures.clip import OPEN_CLIP_BLOCKS
from mgll_encoder.tower.spec import Activation
from mgll_encoder.weights.keytable import Rule
from mgll_encoder.weights.torch_file import WeightSet
from mgll_encoder.weights.weight_file import WeightFile, open_weights

_ANCHOR = "token_embedding.weight"
_BLOCK = "transformer.resblocks."
_PROJECTION = "text_projection"
_TEMPERATURE = 0.07
_RULES: dict[str, str] = {
    _ANCHOR: "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_TEXT: Mapping[str, Rule] = {**_RULES, **OPEN_CLIP_BLOCKS.rules}
"""Names of open_clip -> names in ``CLIPTextModel``, without the projection."""


def clip_text_tower(
    path: Path, activation: Activation, shared: int, weights: WeightSet | None = None
) -> TextTower | None:
    """Load the text tower of a full CLIP, with the tokenizer of its open_clip folder or CLIP's.

    Args:
        path: Weights that ``load_tower`` reads as open_clip, OpenAI or MGLL.
        activation: Activation of both towers; the weights do not specify it.
        shared: Width of the shared space, that of the image tower's projection.
        weights: The set of weights that the image tower was read from, as in ``load_tower``.

    Returns:
        The tower in eval mode, float32; None if the file has no text tower.

    Raises:
        UserError: the text tower is not CLIP's: a different vocabulary, missing keys, or a different shared space.
    """
    checkpoint = open_weights(path, weights)
    prefix = _prefix(checkpoint.headers)
    if prefix is None:
        return None
    outer = prefix.removesuffix("text.")
    wanted = {
        name.removeprefix(prefix): name
        for name in checkpoint.headers
        if name.startswith(prefix) and name.removeprefix(prefix).startswith((*_RULES, _BLOCK, _PROJECTION))
    }
    state = dict(zip(wanted, checkpoint.read(wanted.values()).values(), strict=True))
    tensors = _renamed(state, str(path))
    try:
        rows, width = tensors["embeddings.token_embedding.weight"].shape
        context = len(tensors["embeddings.position_embedding.weight"])
        mlp = len(tensors["encoder.layers.0.mlp.fc1.weight"])
        projection = state[_PROJECTION]
    except KeyError as error:
        raise BadDataError(f"{path}: the text tower lacks {error}: expected that of a full CLIP") from None
    tokenizer = _tokenizer(path)
    if rows != len(tokenizer) or projection.shape != (width, shared):
        raise BadDataError(
            f"{path}: the text tower has {rows} tokens and a projection of shape {list(projection.shape)}: expected "
            f"{len(tokenizer)} as its tokenizer, and [{width}, {shared}]; or train another one with `text_tower=new`"
        )
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=sum(name.endswith(".layer_norm1.weight") for name in tensors),
        num_attention_heads=_heads(path, width),
        max_position_embeddings=context,
        projection_dim=shared,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config).text_model
    fill(model, tensors, path, "that of a CLIP")
    linear = nn.Linear(width, shared, bias=False)
    linear.weight.data.copy_(projection.T)
    return TextTower(model, tokenizer, linear, "end", context, stored_temperature(checkpoint, outer)).eval()


def stored_temperature(checkpoint: WeightFile, prefix: str = "") -> float:
    """Return the temperature that a CLIP was trained with; the initial one of a CLIP if the file has none."""
    name = f"{prefix}logit_scale"
    return math.exp(-float(checkpoint.read([name])[name])) if name in checkpoint.headers else _TEMPERATURE


def _prefix(keys: Mapping[str, Tensor]) -> str | None:
    found = [key.removesuffix(_ANCHOR) for key in keys if key.endswith(_ANCHOR)]
    return next(
        (
            p
            for p in found
            if f"{p}positional_embedding" in keys and any(k.startswith(p + _BLOCK) for k in keys)
        ),
        None,
    )


def _renamed(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _RULES:
            tensors[_RULES[name]] = tensor
        elif name.startswith(_BLOCK):
            place = OPEN_CLIP_BLOCKS.find(name)
            if place is None:
                raise BadDataError(f"{where}: the text tower has '{name}', which is not in a CLIP text tower")
            tensors |= dict(zip(place.targets, place.cut(tensor), strict=True))
    return tensors


def text_settings(path: Path) -> dict[str, Any]:
    """Return ``text_cfg`` of an open_clip folder; empty if there is none."""
    file = path / "open_clip_config.json"
    stated = read_json(file).get("model_cfg", {}).get("text_cfg") if file.is_file() else None
    return stated if isinstance(stated, dict) else {}


def _heads(path: Path, width: int) -> int:
    stated = text_settings(path).get("heads")
    return int(stated) if stated else max(1, width // 64)  # OpenAI's rule


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an open_clip folder that has one, otherwise CLIP's."""
    return (
        pretrained_tokenizer(str(path)) if text_settings(path).get("hf_tokenizer_name") else clip_tokenizer()
    )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, expected: str) -> None:
    """Load tensors into a text encoder, as float32.

    Raises:
        UserError: they are not finite, or are not those of this encoder, which is ``expected``.
    """
    own = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    for name, tensor in own.items():
        if not torch.isfinite(tensor).all():
            raise BadDataError(f"{path}: tensor '{name}' of the text tower contains NaN or infinite values")
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UnsupportedCheckpointError(f"{path}: the text tower is not {expected}: {first}") from None
