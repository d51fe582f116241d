"""The BERT text tower of an open_clip model (BiomedCLIP): ``HFTextEncoder`` of open_clip, without its code.

open_clip reads the encoder's configuration from the hub. Here it follows from the shapes of the tensors and BERT's own
rules: heads of 64, exact GELU, epsilon 1e-12.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from mgll_encoder.common.errors import BadDataError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.paired.clip_text import fill, stored_temperature, text_settings
from mgll_encoder.text.clip_tokenizer import CONTEXT
from mgll_encoder.text.text_tower import AnyPooling, TextTower, pretrained_tokenizer
from mgll_encoder.weights.weight_file import open_weights

_ENCODER, _PROJECTION = "text.transformer.", "text.proj."
_WORDS, _POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
_TYPES, _MLP = "embeddings.token_type_embeddings.weight", "encoder.layer.0.intermediate.dense.weight"
_COUNTER = "embeddings.position_ids"

_POOLERS: Mapping[str, AnyPooling] = {"cls_last_hidden_state_pooler": "first", "mean_pooler": "mean"}
"""``hf_pooler_type`` -> pooling."""

_TYPE_ROWS = 2
"""Token types of a BERT; a RoBERTa, whose names are the same, has one."""


def bert_settings(folder: Path) -> dict[str, Any]:
    """Return ``text_cfg`` of an open_clip folder whose text tower is one of transformers; empty for others."""
    settings = text_settings(folder)
    return settings if settings.get("hf_model_name") else {}


def bert_text_tower(folder: Path, settings: Mapping[str, Any], shared: int) -> TextTower:
    """Load the BERT text tower of an open_clip folder.

    Args:
        folder: The folder, with its tokenizer.
        settings: Its ``text_cfg``.
        shared: Width of the shared space.

    Returns:
        The tower in eval mode, float32.

    Raises:
        UserError: it is not a BERT, has another pooling or projection, or lacks weights or its tokenizer.
    """
    file, named = folder / "open_clip_config.json", settings["hf_model_name"]
    pooler = str(settings.get("hf_pooler_type"))
    if pooler not in _POOLERS:
        raise UnsupportedCheckpointError(
            f"{file}: field 'hf_pooler_type' is '{pooler}': expected {' or '.join(map(repr, _POOLERS))}"
        )
    checkpoint = open_weights(folder)
    names = [name for name in checkpoint.headers if name.startswith((_ENCODER, _PROJECTION))]
    state = checkpoint.read(names)
    tensors = {
        name.removeprefix(_ENCODER): tensor
        for name, tensor in state.items()
        if name.startswith(_ENCODER) and not name.endswith(_COUNTER)
    }
    try:
        rows, width = tensors[_WORDS].shape
        positions, types, mlp = len(tensors[_POSITIONS]), len(tensors[_TYPES]), len(tensors[_MLP])
    except KeyError as error:
        raise BadDataError(
            f"{folder}: the text tower '{named}' lacks {error}: expected a whole BERT"
        ) from None
    if types != _TYPE_ROWS:
        raise UnsupportedCheckpointError(
            f"{folder}: the text tower '{named}' has {types} token types: expected {_TYPE_ROWS}, as a BERT has"
        )
    tokenizer = _tokenizer(folder, settings.get("hf_tokenizer_name") or named)
    config = BertConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=sum(name.endswith(".intermediate.dense.weight") for name in tensors),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config, add_pooling_layer=False)
    fill(model, tensors, folder, "a BERT")
    projection = _projection(state, folder, width, shared)
    context = min(int(settings.get("context_length", CONTEXT)), positions)
    return TextTower(
        model, tokenizer, projection, _POOLERS[pooler], context, stored_temperature(checkpoint)
    ).eval()


def _tokenizer(folder: Path, named: str) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer_config.json").is_file():
        raise NotFoundError(
            f"{folder} has no tokenizer_config.json: copy the tokenizer of '{named}' into it (with vocab.txt)"
        )
    return pretrained_tokenizer(str(folder))


def _projection(state: Mapping[str, Tensor], folder: Path, width: int, shared: int) -> nn.Module:
    """Return the projection of open_clip's ``hf_proj_type``: ``linear``, or ``mlp`` with one hidden layer."""
    weights = {name.removeprefix(_PROJECTION): t for name, t in state.items() if name.startswith(_PROJECTION)}
    layers: dict[tuple[str, ...], Any] = {
        ("weight",): lambda: nn.Linear(width, shared, bias=False),
        ("0.weight", "2.weight"): lambda: nn.Sequential(
            nn.Linear(width, (width + shared) // 2, bias=False),
            nn.GELU(),
            nn.Linear((width + shared) // 2, shared, bias=False),
        ),
    }
    make = layers.get(tuple(sorted(weights)))
    if make is None:
        raise UnsupportedCheckpointError(
            f"{folder}: the projection of the text tower has {', '.join(sorted(weights)) or 'no weights'}: expected a "
            "linear layer or an MLP with one hidden layer"
        )
    projection: nn.Module = make()
    fill(projection, weights, folder, f"projected from {width} to {shared}")
    return projection
