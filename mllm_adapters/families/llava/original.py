"""Reads LLaVA and LLaVA-Med in their original layout, for conversions and swaps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.tower.spec import Resize
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import text_config, tower_config
from mllm_adapters.core.contract import FAMILY_KEY
from mllm_adapters.core.fates import ProcessorFate
from mllm_adapters.core.host_tower import HostTower, NamedTower, external_tower
from mllm_adapters.core.planning import IMAGE_TOKEN, contract_of, copied, dtype_name, growth, image_row
from mllm_adapters.core.processing import has_tokenizer, load_tokenizer
from mllm_adapters.families.host import Host, PlanRequest
from mllm_adapters.families.llava.fields import (
    READS_ITS_SHARDS,
    OriginalFields,
    first_release,
    original_fields,
    text_model,
)
from mllm_adapters.families.llava.prompts import prompt_note
from mllm_adapters.families.llava.weights import (
    BASE_PART,
    CONNECTOR,
    PROJECTORS,
    VOCABULARY_TENSORS,
    Sorted,
    Weights,
    check_applied,
    find_weights,
    identity_layer,
    original_steps,
    sort_names,
)

TOWER_PREFIX = "vision_tower.vision_model."
"""Prefix of tower keys in every transformers release since 4.37."""

PATCH_TOKEN, START_TOKEN, END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"
"""Image tokens of the first releases: one per visual token, and start and end (llava/model/llava.py)."""

CLASS_TOKEN = {"patch": False, "cls_patch": True}
"""``mm_vision_select_feature`` -> class token among the features."""

ACTIVATIONS = {"linear": "linear", "mlp1x_gelu": "linear", "mlp2x_gelu": "gelu"}
"""``mm_projector_type`` -> activation between the projector's layers."""


@dataclass(frozen=True)
class Placeholder:
    """The image placeholder in the target.

    Attributes:
        token: Its text.
        id: Its id.
        rows: Rows of the vocabulary in the target.
        note: Note for the user about its origin.
    """

    token: str
    id: int
    rows: int
    note: str


def original_host(
    family: str, checkpoint: Checkpoint, request: PlanRequest, *, reads_trained_tower: bool
) -> Host:
    """Read an original checkpoint (whole, projector only, or LoRA), mapped to the transformers layout.

    ``reads_trained_tower``: whether the original code loads a trained tower from the shards.

    Raises:
        UserError: the checkpoint is an unsupported variant, or incomplete.
    """
    config = checkpoint.config
    where = f"{checkpoint.folder}/config.json"
    fields = original_fields(config, where)
    weights = find_weights(checkpoint)
    found = sort_names(weights, checkpoint.folder)
    _check_variant(checkpoint, fields, weights, found)
    tower = _host_tower(checkpoint, fields, weights, found, request, reads_trained_tower)
    before = contract_of(tower.spec, fields.feature_layer, CLASS_TOKEN[fields.mm_vision_select_feature])
    rows = [weights.sources[found.names[name]] for name in VOCABULARY_TENSORS if name in found.names]
    embeddings = [checkpoint.header(name) for name in rows]
    tokenizer = load_tokenizer(tokenizer_folder(checkpoint.folder, checkpoint.parts))
    image = _placeholder(checkpoint, fields, tokenizer, max(h.shape[0] for h in embeddings))
    steps = original_steps(checkpoint, weights, found.names, image.rows)
    connector = next((step for step in steps if step.name == f"{CONNECTOR}.weight"), None)
    dtype = getattr(torch, connector.dtype) if connector else embeddings[0].dtype
    if len(PROJECTORS[found.projector]) == 1 and connector is not None:
        steps += identity_layer(connector.dtype, connector.shape[0])
    own = {TOWER_PREFIX + key: weights.sources[name] for key, name in found.inside.items()}
    return Host(
        layout=weights.layout,
        before=before,
        steps=[*steps, *(copied(checkpoint.header(source), name) for name, source in own.items())],
        prefix=TOWER_PREFIX,
        dtype=dtype,
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            FAMILY_KEY: family,
            "dtype": dtype_name(embeddings[0].dtype),
            "vision_config": tower_config(tower.spec, before),
            "text_config": text_config(str(text_model(config)), config, image.rows, where),
            "vision_feature_layer": before.feature_layer,
            "vision_feature_select_strategy": before.select_strategy,
            "projector_hidden_act": ACTIVATIONS[found.projector],
            "multimodal_projector_bias": True,
            "image_token_index": image.id,
            "image_seq_length": before.tokens,
            "tie_word_embeddings": fields.tie_word_embeddings,
        },
        image_token_id=image.id,
        connector=(CONNECTOR,),
        outside=tower,
        dropped=[*weights.dropped, *found.dropped],
        processor=ProcessorFate(name="LlavaProcessor", tokenizer=type(tokenizer).__name__)
        if tokenizer
        else None,
        notes=(*weights.notes, *tower.notes),
        remarks=(image.note, *prompt_note(config, tokenizer)),
    )


def tokenizer_folder(source: Path, parts: Mapping[str, Path]) -> Path:
    """Return the folder with the tokenizer: the checkpoint's or, if it has none, that of its base model."""
    return parts[BASE_PART] if BASE_PART in parts and not has_tokenizer(source) else source


def placeholder_token(tokenizer: Any, image_token_id: int) -> str:
    """Return the text of a planned placeholder."""
    return PATCH_TOKEN if tokenizer.get_vocab().get(PATCH_TOKEN) == image_token_id else IMAGE_TOKEN


def image_markup(config: Mapping[str, Any], token: str) -> str:
    """Return the text that marks an image in a prompt, for this original configuration."""
    return f"{START_TOKEN}{token}{END_TOKEN}" if config.get("mm_use_im_start_end") else token


def _check_variant(checkpoint: Checkpoint, fields: OriginalFields, weights: Weights, found: Sorted) -> None:
    if found.projector != fields.mm_projector_type:
        raise MismatchError(
            f"{checkpoint.folder}: config.json says that the projector is {fields.mm_projector_type}, but the tensors "
            f"are those of {found.projector}: configuration and weights do not belong together"
        )
    if fields.mm_use_im_start_end and weights.base is not None:
        raise BadDataError(
            f"{checkpoint.folder}/config.json: mm_use_im_start_end is true, but the rows of {START_TOKEN} and "
            f"{END_TOKEN} are not in the base model's vocabulary: pass the whole (merged) checkpoint"
        )
    if first_release(checkpoint.config):
        check_applied(checkpoint, weights)


def _placeholder(
    checkpoint: Checkpoint, fields: OriginalFields, tokenizer: Any | None, vocabulary: int
) -> Placeholder:
    vocab: Mapping[str, int] = tokenizer.get_vocab() if tokenizer else {}
    known = [token for token in (START_TOKEN, END_TOKEN) if vocab.get(token, vocabulary) < vocabulary]
    if fields.mm_use_im_start_end and len(known) < 2:
        lacks = (
            f"its tokenizer does not have them within the {vocabulary} rows of the vocabulary"
            if tokenizer
            else ("it has no tokenizer with their ids")
        )
        raise BadDataError(
            f"{checkpoint.folder}: config.json has mm_use_im_start_end, so that prompts need {START_TOKEN} and "
            f"{END_TOKEN}, but {lacks}: add the tokenizer files that this checkpoint was published with"
        )
    if vocab.get(PATCH_TOKEN, vocabulary) < vocabulary:
        note = f"the image placeholder is the tokenizer's own {PATCH_TOKEN} = {vocab[PATCH_TOKEN]}"
        return Placeholder(PATCH_TOKEN, vocab[PATCH_TOKEN], vocabulary, note)
    token_id, rows = image_row(tokenizer, vocabulary)
    note = f"{growth(vocabulary, rows)}the image placeholder is {IMAGE_TOKEN} = {token_id}, not -200"
    return Placeholder(IMAGE_TOKEN, token_id, rows, note)


def _host_tower(
    checkpoint: Checkpoint,
    fields: OriginalFields,
    weights: Weights,
    found: Sorted,
    request: PlanRequest,
    reads_trained_tower: bool,
) -> HostTower:
    """Return the tower that the original code would use: the named one, or the one in the shards."""
    resize: Resize = "pad" if fields.image_aspect_ratio == "pad" else "crop"
    inside = {key: checkpoint.header(weights.sources[name]).shape for key, name in found.inside.items()}
    named = NamedTower(fields.mm_vision_tower, resize, inside, fields.mm_hidden_size)
    replaced = request.tower is not None
    host = external_tower(named, checkpoint, replaced=replaced, image_size=request.image_size)
    shards_first = fields.tower_was_trained or text_model(checkpoint.config) in READS_ITS_SHARDS
    if reads_trained_tower and inside and shards_first:
        why = "was trained and is" if fields.tower_was_trained else "is the one"
        geometry = () if host.header else host.notes
        return replace(host, header=None, notes=(*geometry, f"the host's own tower {why} in its shards"))
    if not replaced and host.header is None:
        note = f"the original code reads {host.name}, which is not on this machine: the tower in the shards is used"
        return replace(host, notes=(*host.notes, note))
    return host
