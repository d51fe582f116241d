"""The text tower: a transformers encoder, its tokenizer, a pooling rule, and a projection into the shared space.

Whatever it was built from, it is stored in the subfolder ``text/`` of a tower's folder: encoder and tokenizer as
transformers writes them, the projection, and ``text_tower.json``.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mgll_encoder.common.errors import BadDataError, MismatchError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.common.library_bars import no_library_bars
from mgll_encoder.text.clip_tokenizer import CONTEXT, trimmed_tokenizer
from mgll_encoder.text.pretrained import load_pretrained
from mgll_encoder.weights.weight_file import open_weights

FOLDER = "text"
"""Subfolder of a tower's folder."""
TEXT_TOWER_FILE = "text_tower.json"
TEXT_PROJECTION_FILE = "text_projection.safetensors"
TEXT_PROJECTION = "text_projection.weight"

Pooling = Literal["end", "mean"]
"""Poolings of text towers that are written to a folder."""
AnyPooling = Literal["end", "mean", "padded", "first"]
"""``padded``: the last position of a text that is padded to the full context (SigLIP); ``first``: the first token."""

_UNCUT = 10**6
"""More tokens than any text has; without a length, a tokenizer warns about texts longer than its own maximum."""
_AT_ONCE = 256
"""Texts per forward pass of :meth:`TextTower.features`."""

_CLIP_TYPES = ("clip", "clip_text_model")
"""``model_type`` of folders with a CLIP text tower."""


def _at_end_token(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - shared signature
    # attention is causal and the feature is read at the end token: later tokens have no effect
    features: Tensor = model(input_ids=ids).pooler_output
    return features


def _masked_mean(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask[..., None].to(states.dtype)
    return (states * real).sum(dim=1) / real.sum(dim=1)


def _at_last_position(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - shared signature
    # padding is part of the text: all positions see it
    states: Tensor = model(input_ids=ids).last_hidden_state
    return states[:, -1]


def _at_first_token(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states[:, 0]


_POOL: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Tensor]] = {
    "end": _at_end_token,
    "mean": _masked_mean,
    "padded": _at_last_position,
    "first": _at_first_token,
}


class TextSpec(BaseModel):
    """The contents of ``text_tower.json``.

    Attributes:
        version: Version of the format.
        pooling: ``end`` (the feature at the end token, as CLIP) or ``mean`` (over all tokens but padding).
        context: Maximum length in tokens; longer texts are truncated.
        temperature: The τ of training: similarities are cosines divided by it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    pooling: Pooling
    context: PositiveInt
    temperature: PositiveFloat


class TextTower(nn.Module):
    """Maps texts to features in the shared image-text space.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer. Pieces without a row in the encoder's embedding are omitted (:meth:`unknown` names
            them).
        projection: From the encoder's width to the shared space: a linear layer, or in BiomedCLIP an MLP.
        pooling: How tokens are pooled into one feature, see :class:`TextSpec` and `AnyPooling`.
        context: Maximum length in tokens.
        temperature: The τ to record.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        projection: nn.Module,
        pooling: AnyPooling,
        context: int = CONTEXT,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.model, self.projection = model, projection
        self.tokenizer, self.pooling, self.context = tokenizer, pooling, context
        self.temperature = temperature
        self._frozen = False

    @property
    def rows(self) -> int:
        """Number of token ids that the encoder knows."""
        return _rows(self.model)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64 [U, L], right-padded to the longest or the context."""
        pieces = self._pieces(texts, self.context)
        ids = [[piece for piece in row if piece < self.rows] for row in pieces]
        padding = "max_length" if self.pooling == "padded" else "longest"
        padded = self.tokenizer.pad(
            {"input_ids": ids}, padding, max_length=self.context, padding_side="right", return_tensors="pt"
        )
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, including special tokens, before truncation."""
        return [len(row) for row in self._pieces(texts)]

    def unknown(self, text: str) -> list[str]:
        """Return the pieces of a text without an embedding; empty for towers with a full vocabulary."""
        beyond = [piece for piece in self._pieces([text])[0] if piece >= self.rows]
        return list(self.tokenizer.convert_ids_to_tokens(beyond))

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute features [U, D] of tokens [U, L], not normalized; padding has no effect."""
        features: Tensor = self.projection(_POOL[self.pooling](self.model, input_ids, attention_mask))
        return features

    def features(self, texts: Sequence[str]) -> Tensor:
        """Compute features [U, D] in the shared space, not normalized; on the tower's device, with gradients if on."""
        *_, last = self.projection.parameters()  # weight [D, ...] or bias [D]
        device = last.device
        parts = []
        for start in range(0, len(texts), _AT_ONCE):
            tokens = self.tokenize(texts[start : start + _AT_ONCE])
            parts.append(self.encode(**{name: ids.to(device) for name, ids in tokens.items()}))
        return torch.cat(parts) if parts else last.new_zeros(0, len(last))

    def freeze(self) -> None:
        """Freeze the encoder, without dropout; the projection is still trained."""
        self._frozen = True
        self.model.requires_grad_(False)
        self.model.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self._frozen:
            self.model.eval()
        return self

    def save(self, folder: Path) -> None:
        """Write the tower's files into a folder, which is created if needed."""
        elsewhere = "text towers of SigLIP and BiomedCLIP are read from their own folders"
        assert self.pooling != "padded" and self.pooling != "first", elsewhere  # noqa: PT018
        assert isinstance(self.projection, nn.Linear), elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        with no_library_bars():
            self.model.save_pretrained(folder)
        self._pieces([""], self.context)  # tokenizer.json keeps the truncation of the last call
        self.tokenizer.save_pretrained(folder)
        weight = self.projection.weight.detach().cpu().contiguous()
        save_file({TEXT_PROJECTION: weight}, folder / TEXT_PROJECTION_FILE, metadata={"format": "pt"})
        spec = TextSpec(pooling=self.pooling, context=self.context, temperature=self.temperature)
        (folder / TEXT_TOWER_FILE).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TextTower":
        """Load what :meth:`save` wrote; in eval mode, float32.

        Raises:
            UserError: a file is missing or damaged, or the projection does not fit the encoder.
        """
        file = folder / TEXT_TOWER_FILE
        if not file.is_file():
            raise NotFoundError(f"folder {folder} has no text tower: expected {TEXT_TOWER_FILE} in it")
        try:
            spec = TextSpec.model_validate_json(file.read_text(encoding="utf-8"))
        except (ValidationError, ValueError, OSError) as error:
            raise BadDataError(f"{file} does not describe a text tower ({error}): copy it again") from None
        model, tokenizer = load_encoder(AutoModel, str(folder)), pretrained_tokenizer(str(folder))
        _check_padding(model, tokenizer, str(folder))
        weights = open_weights(folder / TEXT_PROJECTION_FILE)
        shape = weights.headers[TEXT_PROJECTION].shape if TEXT_PROJECTION in weights.headers else None
        if shape is None or len(shape) != 2 or shape[1] != model.config.hidden_size:
            raise MismatchError(
                f"{folder / TEXT_PROJECTION_FILE}: '{TEXT_PROJECTION}' has shape {list(shape or ())}: expected "
                f"[features, {model.config.hidden_size}], the width of the encoder next to it; copy the whole folder"
            )
        projection = nn.Linear(shape[1], shape[0], bias=False)
        projection.weight.data.copy_(weights.read([TEXT_PROJECTION])[TEXT_PROJECTION])
        tower = cls(model, tokenizer, projection, spec.pooling, spec.context, spec.temperature)
        return tower.eval()

    @classmethod
    def new(cls, texts: Iterable[str], width: int, depth: int, shared: int) -> "TextTower":
        """Create a small CLIP text tower with random weights, whose vocabulary is the pieces of the given texts.

        Args:
            texts: All texts that it will be trained on.
            width: Hidden size (heads of 32).
            depth: Blocks.
            shared: Width of the shared space.
        """
        tokenizer, rows = trimmed_tokenizer(texts)
        config = CLIPTextConfig(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 32,
            max_position_embeddings=CONTEXT,
            projection_dim=shared,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        both = CLIPTextModelWithProjection(config)
        return cls(both.text_model, tokenizer, both.text_projection, "end")

    @classmethod
    def pretrained(cls, source: str, shared: int) -> "TextTower":
        """Load a pretrained encoder: BERT-like (mean over tokens), or CLIP (at the end token).

        Args:
            source: A transformers folder or a hub id.
            shared: Width of the shared space. CLIP's own projection is kept if it has this width; otherwise a new one
                is initialized.

        Raises:
            UserError: it cannot be found or read, or is not a text encoder.
        """
        config = _load(AutoConfig, source)
        tokenizer, own = pretrained_tokenizer(source), None
        model: Any
        clip = config.model_type in _CLIP_TYPES
        if clip:
            shape = config.get_text_config()
            shape.projection_dim = config.projection_dim  # outside the text config in a full CLIP
            both: Any = load_encoder(CLIPTextModelWithProjection, source, config=shape)
            model, own = both.text_model, both.text_projection
        else:
            model = load_encoder(AutoModel, source)
        _check_padding(model, tokenizer, source)
        width, limit = model.config.hidden_size, model.config.max_position_embeddings
        if own is None or own.weight.shape[0] != shared:
            own = nn.Linear(width, shared, bias=False)
            nn.init.normal_(own.weight, std=width**-0.5)
        context = min(limit, tokenizer.model_max_length)
        return cls(model, tokenizer, own, "end" if clip else "mean", context)

    def _pieces(self, texts: Sequence[str], most: int = _UNCUT) -> list[list[int]]:
        pieces: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
        return pieces


def load_text_tower(tower_folder: Path) -> TextTower:
    """Load the text tower that was trained with an image tower.

    Args:
        tower_folder: A folder written by ``mgll-encoder pretrain``.

    Raises:
        UserError: the folder has none (one written by ``convert``), or it is damaged.
    """
    folder = tower_folder / FOLDER
    if not folder.is_dir():
        raise NotFoundError(
            f"tower {tower_folder} has no text tower (no subfolder '{FOLDER}'): expected a folder written by "
            "`pretrain()`; a converted image tower alone cannot compare images with texts"
        )
    return TextTower.load(folder)


def load_encoder(kind: Any, source: str, **settings: Any) -> PreTrainedModel:
    """Load a text encoder from a folder or hub id, without its pooling head, which is not used.

    Raises:
        UserError: it cannot be read, lacks weights, or is not a text encoder.
    """
    with no_library_bars():
        model, report = _load(kind, source, dtype=torch.float32, output_loading_info=True, **settings)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise BadDataError(
            f"text tower {source} lacks weights, such as '{(missing or report['mismatched_keys'])[0]}': "
            "expected a complete text encoder"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if model.get_input_embeddings() is None or not hasattr(model.config, "max_position_embeddings"):
        raise UnsupportedCheckpointError(
            f"text tower {source} is a '{model.config.model_type}': expected a text encoder"
        )
    encoder: PreTrainedModel = model
    return encoder


def pretrained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text tower from a transformers folder or a hub id.

    Raises:
        UserError: it cannot be read, or has no padding token.
    """
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        raise BadDataError(
            f"text tower {source}: its tokenizer has no padding token: expected one, as in BERT's"
        )
    return tokenizer


def _check_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if int(tokenizer.pad_token_id) >= _rows(model):
        raise MismatchError(
            f"text tower {source}: its padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, but "
            f"the encoder knows {_rows(model)}: take both from the same folder"
        )


def _rows(model: PreTrainedModel) -> int:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def _load(kind: Any, source: str, **settings: Any) -> Any:
    advice = "expected a transformers folder, or a hub repository and a connection to the hub"
    return load_pretrained(kind, source, f"text tower {source}", advice=advice, **settings)
