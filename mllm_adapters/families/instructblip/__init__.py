"""InstructBLIP: the transformers layout (old and new), the original LAVIS files, and swapped checkpoints.

Key names and vision contract after transformers (models/instructblip, and utils/ of v4.37.2) and salesforce/LAVIS
506965b (lavis/models/blip2_models, lavis/models/eva_vit.py, lavis/models/clip_vit.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    UnsupportedCheckpointError,
)
from mgll_encoder.common.texts import read_text
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, PixelRule
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config, read_fields
from mllm_adapters.core.contract import (
    FAMILY_KEY,
    ConnectorLayer,
    Dropped,
    FamilySpec,
    Plan,
    VisionContract,
)
from mllm_adapters.core.fates import ProcessorFate
from mllm_adapters.core.host_tower import TOWER_PART
from mllm_adapters.core.planning import IMAGE_TOKEN, copied, extended, growth, image_row
from mllm_adapters.core.processing import has_tokenizer, host_pixels, load_tokenizer, with_placeholder
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Connected, Host, PlanRequest, Swap
from mllm_adapters.families.instructblip import original as lavis
from mllm_adapters.families.instructblip.connector import QFORMER_PART, TOWER, refitted
from mllm_adapters.families.instructblip.original import AsStock

STOCK, OWN = "instructblip", "mgll_instructblip"
"""model_type of transformers' class, and of ours with a CLIP tower."""

OWN_TOWER = "vision_model.tower."

NEW_LAYER = -2
"""Hidden layer at which a new tower is read: LAVIS' EVA and CLIP towers both end one block early."""

PROJECTION = "language_projection.weight"

VOCABULARY = tuple(
    f"language_model.{name}.weight"
    for name in ("model.embed_tokens", "lm_head", "shared", "encoder.embed_tokens", "decoder.embed_tokens")
)
"""Tensors with one row per token: LLaMA's and T5's."""

LANGUAGE_MODELS = ("llama", "t5")

BUFFERS = ("position_ids", "rotary_emb.inv_freq")
"""Tables in older files, which transformers recomputes."""

QFORMER_TOKENIZER_PART = "qformer-tokenizer"
QFORMER_TOKENIZER = "qformer_tokenizer"
"""Sub-folder of a checkpoint in the transformers layout."""

BERT = ("bert-base-uncased", "google-bert/bert-base-uncased")
"""Hub ids of the tokenizer of LAVIS' Q-Former."""


class Fields(BaseModel):
    """The used fields of config.json, with the defaults of ``InstructBlipConfig``."""

    vision_config: dict[str, Any]
    qformer_config: dict[str, Any]
    text_config: dict[str, Any]
    num_query_tokens: int = 32
    image_token_index: int | None = None
    image_token_id: int | None = None
    vision_feature_layer: int = NEW_LAYER

    @property
    def placeholder(self) -> int | None:
        """Return the id of the image placeholder, under either name; None in files older than transformers 4.46."""
        return self.image_token_index if self.image_token_index is not None else self.image_token_id


@dataclass(frozen=True)
class InstructBlip(PlannedFamily):
    """See `Family`."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``transformers`` (written here, with chat template), ``stock``, ``lavis`` or None."""
        if not config:
            return "lavis"
        stock = "transformers" if FAMILY_KEY in config else "stock"
        return {OWN: "transformers", STOCK: stock}.get(str(config.get("model_type")))

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """See `PlannedFamily.host`."""
        layout, where = str(self.layout(checkpoint.config)), f"{checkpoint.folder}/config.json"
        swapped = request.tower is not None
        found = (
            lavis.read(checkpoint, swapped=swapped, image_size=request.image_size)
            if layout == "lavis"
            else _as_stock(checkpoint)
        )
        fields = read_fields(Fields, found.config, where)
        _check_language_model(found, fields, where)
        tokenizer = checkpoint.parts.get(lavis.LANGUAGE_PART, checkpoint.folder)
        config, image_token_id, note = _with_placeholder(found, fields, checkpoint, layout)
        tokenizers = _tokenizers(tokenizer, checkpoint)
        before, notes = _contract(config, fields, checkpoint.folder, where)
        if not swapped and checkpoint.find(QFORMER_PART) is not None:
            raise InvalidArgumentError(
                f"`parts['{QFORMER_PART}']` goes with a new tower: give `encoder`, or leave it out"
            )
        steps = (
            extended(found.steps, VOCABULARY, config["text_config"]["vocab_size"]) if note else found.steps
        )
        return Host(
            layout=layout,
            before=before,
            steps=[s for s in steps if not (swapped and TOWER.match(s.name) and "/" in s.sources[0])],
            prefix=OWN_TOWER,
            dtype=next(checkpoint.header(s.sources[0]).dtype for s in steps if s.name == PROJECTION),
            config=config if swapped else {**config, FAMILY_KEY: self.spec.name},
            image_token_id=image_token_id,
            read_at=None if config["model_type"] == OWN else NEW_LAYER,
            queries=before.tokens,
            dropped=found.dropped,
            parts=tokenizers,
            processor=ProcessorFate(name="MgllInstructBlipProcessor", tokenizers=2, template=True)
            if tokenizers
            else None,
            notes=(*found.notes, *notes),
            remarks=note,
        )

    def connect(self, swap: Swap) -> Connected:
        """See `PlannedFamily.connect`: the norm after the tower, and keys and values of the Q-Former."""
        if swap.request.tower is None:
            return Connected(swap.steps)
        found = refitted(swap)
        config = {
            "architectures": ["MgllInstructBlipForConditionalGeneration"],
            "model_type": OWN,
            "qformer_config": {**swap.host.config["qformer_config"], "encoder_hidden_size": swap.after.width},
            "vision_feature_layer": swap.after.feature_layer,
            **found.config,
            FAMILY_KEY: self.spec.name,
        }
        return replace(found, config=config)

    def processor(self, plan: Plan) -> Any | None:
        """Return the processor of the planned checkpoint; None if the source has no tokenizer."""
        from mllm_adapters.families.instructblip.modeling import MgllInstructBlipProcessor

        tokenizer = _text_tokenizer(plan.parts.get(lavis.LANGUAGE_PART, plan.source), plan.layout)
        if tokenizer is None:
            return None
        with_placeholder(tokenizer, plan.image_token_id)
        qformer = load_tokenizer(plan.parts[QFORMER_TOKENIZER_PART])
        assert qformer is not None, "checked in planning"
        longest = build_config(plan.config, str(plan.source)).qformer_config.max_position_embeddings
        qformer.model_max_length = min(qformer.model_max_length, longest)
        own = plan.source / "chat_template.jinja"
        return MgllInstructBlipProcessor(
            image_processor=self.image_processor(plan),
            tokenizer=tokenizer,
            qformer_tokenizer=qformer,
            num_query_tokens=plan.after.tokens,
            chat_template=read_text(own, "chat template") if own.is_file() else _TEMPLATE,
        )

    def connector_layers(self, plan: Plan) -> tuple[ConnectorLayer, ...]:
        """Return keys and values of all layers, which all read the tower's features after the norm."""
        found = super().connector_layers(plan)
        return tuple(replace(reading, at=found[0].linear) for reading in found)

    def encode_images(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (none is needed)
        """See `Family.encode_images`: the Q-Former's image input does not depend on the instruction."""
        words = torch.zeros(len(pixels), 1, dtype=torch.long, device=pixels.device)
        model.get_image_features(pixels, words, torch.ones_like(words))


def _as_stock(checkpoint: Checkpoint) -> AsStock:
    """Describe a checkpoint in the transformers layout, whose tensors stay unchanged."""
    for part in (lavis.LANGUAGE_PART, lavis.CONFIG_PART, TOWER_PART):
        if checkpoint.find(part) is not None:
            raise InvalidArgumentError(
                f"`parts['{part}']` is for LAVIS' files: {checkpoint.folder} holds its own"
            )
    headers = checkpoint.tensors.values()
    reason = "a table that is recomputed"
    return AsStock(
        config={key: value for key, value in checkpoint.config.items() if key != "auto_map"},
        steps=[copied(header) for header in headers if not header.name.endswith(BUFFERS)],
        dropped=[Dropped(name=h.name, reason=reason) for h in headers if h.name.endswith(BUFFERS)],
    )


def _check_language_model(found: AsStock, fields: Fields, where: str) -> None:
    kind = fields.text_config.get("model_type")
    if kind not in LANGUAGE_MODELS:
        raise UnsupportedCheckpointError(
            f"{where}: its language model is {kind!r}: supported are {' and '.join(LANGUAGE_MODELS)} (Vicuna, Flan-T5)"
        )
    names = {step.name for step in found.steps}
    for needed in (PROJECTION, "query_tokens"):
        if needed not in names:
            raise NotFoundError(f"{where}: tensor {needed} is not in the weights next to it: is it complete?")
    if not names & set(VOCABULARY):
        raise BadDataError(f"{where}: the weights next to it have no token embeddings: are they complete?")


def _with_placeholder(
    found: AsStock, fields: Fields, checkpoint: Checkpoint, layout: str
) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    """Return the configuration with an image placeholder (missing before transformers 4.46), its id, and a note."""
    vocabulary = max(step.shape[0] for step in found.steps if step.name in VOCABULARY)
    if fields.placeholder is not None:
        if fields.placeholder >= vocabulary:
            raise MismatchError(
                f"{checkpoint.folder}: image_token_index is {fields.placeholder}, but the vocabulary has only "
                f"{vocabulary} rows: config.json and weights do not belong together"
            )
        return found.config, fields.placeholder, ()
    folder = checkpoint.parts.get(lavis.LANGUAGE_PART, checkpoint.folder)
    image_token_id, rows = image_row(_text_tokenizer(folder, layout), vocabulary)
    config = {
        **found.config,
        "image_token_index": image_token_id,
        "text_config": {**fields.text_config, "vocab_size": rows},
    }
    note = (
        f"{growth(vocabulary, rows)}visual tokens replace {IMAGE_TOKEN} = {image_token_id} instead of being "
        "put in front"
    )
    return config, image_token_id, (note,)


def _contract(
    config: Mapping[str, Any], fields: Fields, folder: Path, where: str
) -> tuple[VisionContract, tuple[str, ...]]:
    """Return the vision contract: the Q-Former reads all tokens of the tower."""
    vision = build_config(config, where).vision_config
    pixels, notes = _pixels(folder, vision.image_size)
    contract = VisionContract(
        width=vision.hidden_size,
        patch_size=vision.patch_size,
        tokens=fields.num_query_tokens,
        feature_layer=fields.vision_feature_layer if config["model_type"] == OWN else -1,
        class_token=True,
        activation=vision.hidden_act,
        **pixels.model_dump(),
    )
    return contract, notes


def _pixels(folder: Path, image_size: int) -> tuple[PixelRule, tuple[str, ...]]:
    if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return host_pixels(folder, image_size)
    rule = PixelRule(image_size=image_size, mean=CLIP_MEAN, std=CLIP_STD, resize="squash")
    return rule, (
        f"{folder} has no image processor: that of InstructBLIP is assumed (CLIP's mean, squashed)",
    )


def _tokenizers(tokenizer: Path, checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the folder of the Q-Former's tokenizer, if the language model's exists."""
    if not has_tokenizer(tokenizer):
        return {}
    inside = tokenizer / QFORMER_TOKENIZER
    names = (QFORMER_TOKENIZER, *BERT)
    found = [path for name in names if (path := checkpoint.find(QFORMER_TOKENIZER_PART, name))]
    folder = next((path for path in found if has_tokenizer(path)), None)
    if folder is None:
        looked = f" (nor in {found[0]})" if found else ""
        raise NotFoundError(
            f"{tokenizer} has a tokenizer, but there is none for the Q-Former{looked}: put that of "
            f"{BERT[0]} at {inside}, or pass `parts['{QFORMER_TOKENIZER_PART}']=PATH`"
        )
    return {QFORMER_TOKENIZER_PART: folder}


def _text_tokenizer(folder: Path, layout: str) -> Any | None:
    tokenizer = load_tokenizer(folder)
    return lavis.with_special_tokens(tokenizer) if tokenizer and layout == "lavis" else tokenizer


_TEMPLATE = read_template("instructblip.jinja")

INSTRUCTBLIP = InstructBlip(
    spec=FamilySpec(
        name="instructblip",
        title="InstructBLIP",
        hub_id="Salesforce/instructblip-vicuna-7b",
        reads=(
            "transformers layout (Vicuna, Flan-T5)",
            "LAVIS files (Vicuna) with their ViT and language model",
        ),
        tower=r"vision_model\.(?:tower|embeddings|encoder)\.",
        projector=r"vision_model\.(?:ln_vision|post_layernorm)\.|qformer\.|query_tokens|language_projection\.",
        language_model=r"language_model\.",
        not_llava="InstructBLIP cannot be written as a LLaVA: between tower and language model it has a Q-Former",
        bare_weights=lavis.LOOSE_WEIGHTS,
        parts={
            lavis.LANGUAGE_PART: "the language model's folder (LAVIS)",
            TOWER_PART: f"the EVA tower, {lavis.TOWER_FILE} (LAVIS)",
            lavis.CONFIG_PART: "a config.json in the transformers layout: numbers of heads (LAVIS of unpublished size)",
            QFORMER_TOKENIZER_PART: f"the tokenizer of {BERT[0]}, which the Q-Former has",
            QFORMER_PART: "a Q-Former trained on towers of the new width, whose connector layers are used",
        },
    )
)
