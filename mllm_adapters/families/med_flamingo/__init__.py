"""Med-Flamingo, and its base OpenFlamingo-9B of 2023: ``model.pt`` with a LLaMA folder and a CLIP file.

Layout, vision contract and prompt after snap-stanford/med-flamingo b3c1e64 (scripts/demo.py, src/utils.py) and
mlfoundations/open_flamingo 655f693 and 0.0.2 (open_flamingo/src/factory.py, flamingo.py, train/train_utils.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.texts import read_json
from mgll_encoder.tower.preprocess import image_processor
from mgll_encoder.tower.spec import TowerSpec, checked
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config, read_fields, text_config, tower_config, tower_geometry
from mllm_adapters.core.contract import FAMILY_KEY, ConnectorLayer, FamilySpec, Plan
from mllm_adapters.core.fates import Added, Kept, ProcessorFate
from mllm_adapters.core.host_tower import TOWER_PART
from mllm_adapters.core.operations import EXTEND_ROWS, Step
from mllm_adapters.core.planning import IMAGE_TOKEN, contract_of, copied
from mllm_adapters.core.processing import (
    check_placeholder,
    has_tokenizer,
    host_pixels,
    load_tokenizer,
    processor_fate,
    text_side,
)
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Connected, Host, PlanRequest, Swap
from mllm_adapters.families.med_flamingo.original import (
    BRIDGE,
    HEAD,
    LANGUAGE_MODEL,
    PERCEIVER,
    Geometry,
    measure,
    rewidened,
    sort_names,
)
from mllm_adapters.families.med_flamingo.parts import (
    LANGUAGE_PART,
    TOWER_PREFIX,
    LlamaFields,
    check_language_model,
    frozen_steps,
    host_tower,
    inner_tower,
    language_model,
)

MODEL_TYPE = "mgll_flamingo"

END_OF_CHUNK, PADDING = "<|endofchunk|>", "<PAD>"
ADDED_TOKENS = (END_OF_CHUNK, IMAGE_TOKEN, PADDING)
"""Tokens that the original adds to LLaMA's tokenizer, in this order; the last one only if it has no padding token."""


class NativeFields(BaseModel):
    """The used fields of a config.json in our own layout."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    image_token_id: int
    perceiver_latents: int
    perceiver_width: int | None = None
    media_mask: Literal["preceding", "legacy"]


@dataclass(frozen=True)
class MedFlamingo(PlannedFamily):
    """Loose weight files in the original layout, and our own layout."""

    spec: FamilySpec
    chat_template: str

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``original`` for weight files without config.json, ``transformers`` for our layout, or None."""
        if not config:
            return "original"
        return "transformers" if config.get("model_type") == MODEL_TYPE else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """See `PlannedFamily.host`."""
        original = self.layout(checkpoint.config) == "original"
        return self._original(checkpoint, request) if original else self._own(checkpoint)

    def connect(self, swap: Swap) -> Connected:
        """See `PlannedFamily.connect`; the ratio of the perceiver's MLP width to the feature width is kept."""
        old, new = swap.host.before, swap.after
        made, connectors = rewidened(swap.steps, old, new, swap.checkpoint.folder)
        if any(step.name == f"{BRIDGE}.weight" for step in made):
            return Connected(made, connectors)
        inner = swap.host.config["perceiver_intermediate_size"] // old.width * new.width
        return Connected(made, connectors, {"perceiver_intermediate_size": inner})

    def processor(self, plan: Plan) -> Any | None:
        """Return the FlamingoProcessor of the planned checkpoint; None if the source has no tokenizer."""
        from mllm_adapters.families.med_flamingo.modeling import FlamingoProcessor

        if plan.layout == "transformers":
            text = text_side(plan.source)
            if text is None:
                return None
            tokenizer, template, _ = text
        else:
            tokenizer, template = load_tokenizer(plan.parts[LANGUAGE_PART]), self.chat_template
            if tokenizer is None:
                return None
            added = plan.config["text_config"]["vocab_size"] - plan.image_token_id + 1
            _add_tokens(tokenizer, ADDED_TOKENS[:added])
        check_placeholder(tokenizer, IMAGE_TOKEN, plan.image_token_id)
        return FlamingoProcessor(image_processor(plan.after), tokenizer, chat_template=template)

    def connector_layers(self, plan: Plan) -> tuple[ConnectorLayer, ...]:  # noqa: ARG002 (always the same)
        """Return the bridge; without it, the perceiver reads the features themselves."""
        return (ConnectorLayer(BRIDGE),)

    def for_alignment(self, plan: Plan, checkpoint: Checkpoint) -> Plan:
        """See `Family.for_alignment`: the perceiver's layers read both features and latents, so they are all kept.

        An additional linear layer, the bridge, maps the new features to the old ones.
        """
        if any(step.name == f"{BRIDGE}.weight" for step in plan.steps):
            return plan
        steps = [
            copied(checkpoint.header(step.replaces), step.name) if step.replaces else step
            for step in plan.steps
        ]
        old, new = plan.before.width, plan.after.width
        dtype = next(step.dtype for step in steps if step.name.startswith(PERCEIVER))
        shapes = {"weight": (old, new), "bias": (old,)}
        added = [
            Step(name=f"{BRIDGE}.{kind}", dtype=dtype, shape=shape, operation="reinit")
            for kind, shape in shapes.items()
        ]
        inner = plan.config["perceiver_intermediate_size"] // new * old
        return plan.model_copy(
            update={
                "steps": (*steps, *added),
                "config": {**plan.config, "perceiver_width": old, "perceiver_intermediate_size": inner},
                "connectors": {BRIDGE: Added(before=old, after=new), PERCEIVER[:-1]: Kept(width=old)},
            }
        )

    def _original(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        names = sort_names(checkpoint)
        language = language_model(checkpoint)
        config = read_json(language / "config.json")
        fields = read_fields(LlamaFields, config, f"{language}/config.json")
        vocabulary, where = fields.vocab_size, str(checkpoint.files[0])
        trained = {step.name: step for step in names.steps(checkpoint)}
        geometry = measure(trained, fields.num_hidden_layers, where)
        check_language_model(geometry, fields, language, where)
        text = _text_config(config, vocabulary, geometry.rows, language)
        tied = text["tie_word_embeddings"]
        steps = [*trained.values(), *frozen_steps(checkpoint, language, names, geometry, tied=tied)]
        tower = host_tower(checkpoint, names, geometry, request.tower, request.image_size)
        latents = geometry.config["perceiver_latents"]
        before = contract_of(tower.spec, -1, False).model_copy(update={"tokens": latents})
        own, left = inner_tower(checkpoint, names, swapped=bool(request.tower or tower.header))
        image_token_id = vocabulary + ADDED_TOKENS.index(IMAGE_TOKEN)
        has_text = has_tokenizer(language)
        return Host(
            layout="original",
            before=before,
            steps=[*steps, *own],
            prefix=TOWER_PREFIX,
            dtype=checkpoint.tensors[names.found["model.perceiver.latents"][0]].dtype,
            config={
                "architectures": ["FlamingoForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                FAMILY_KEY: self.spec.name,
                "dtype": _language_dtype(steps, language),
                "vision_config": tower_config(tower.spec, before),
                "text_config": text,
                "image_token_id": image_token_id,
                "media_mask": "preceding",
                **geometry.config,
                "tie_word_embeddings": tied,
            },
            image_token_id=image_token_id,
            queries=latents,
            outside=tower,
            dropped=[*names.dropped, *left],
            parts={LANGUAGE_PART: language},
            processor=ProcessorFate(name="FlamingoProcessor", origin="language_model") if has_text else None,
            notes=tower.notes,
            remarks=tuple(_notes(geometry, vocabulary, steps)),
        )

    def _own(self, checkpoint: Checkpoint) -> Host:
        fields = read_fields(NativeFields, checkpoint.config, f"{checkpoint.folder}/config.json")
        spec, depth, notes = _native_tower(checkpoint)
        steps = [copied(header) for header in checkpoint.tensors.values()]
        tower = next((step for step in steps if step.name.startswith(TOWER_PREFIX)), None)
        if tower is None:
            raise BadDataError(
                f"{checkpoint.folder} has no tensors under {TOWER_PREFIX}: complete the download"
            )
        geometry = measure({step.name: step for step in steps}, depth, str(checkpoint.folder))
        return Host(
            layout="transformers",
            before=contract_of(spec, -1, False).model_copy(update={"tokens": fields.perceiver_latents}),
            steps=steps,
            prefix=TOWER_PREFIX,
            dtype=getattr(torch, tower.dtype),
            config={
                **checkpoint.config,
                FAMILY_KEY: self.spec.name,
                **(geometry.config if fields.perceiver_width is None else {}),
            },
            image_token_id=fields.image_token_id,
            queries=fields.perceiver_latents,
            processor=processor_fate(checkpoint.folder),
            notes=notes,
        )


def _add_tokens(tokenizer: Any, added: tuple[str, ...]) -> None:
    """Add the original's tokens to LLaMA's tokenizer, and pad on the left."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(added)}, replace_extra_special_tokens=False
    )
    if PADDING in added:
        tokenizer.pad_token = PADDING
    tokenizer.padding_side = "left"


def _text_config(config: Mapping[str, Any], vocabulary: int, rows: int, folder: Path) -> dict[str, Any]:
    text = text_config("llama", config, rows, f"{folder}/config.json")
    end = text["eos_token_id"]
    added = {ADDED_TOKENS[i]: vocabulary + i for i in range(rows - vocabulary)}
    ends = [*(end if isinstance(end, list) else [end]), added[END_OF_CHUNK]]
    return {
        **text,
        "eos_token_id": [i for i in ends if i is not None],
        "pad_token_id": added.get(PADDING, text["pad_token_id"]),
    }


def _language_dtype(steps: list[Step], folder: Path) -> str:
    found = next((step.dtype for step in steps if step.name == f"{LANGUAGE_MODEL}norm.weight"), None)
    if found is None:
        raise BadDataError(f"{folder}: tensor model.norm.weight is missing: complete the download")
    return found


def _notes(geometry: Geometry, vocabulary: int, steps: list[Step]) -> Iterator[str]:
    latents, added = geometry.config["perceiver_latents"], geometry.rows - vocabulary
    yield (
        f"an image becomes {latents} latents, which the language model reads by cross-attention: the text "
        f"has one {IMAGE_TOKEN} = {vocabulary + 1} per image"
    )
    yield (
        "media_mask in config.json: 'preceding', text attends to the image before it, as in current "
        "open_flamingo; 'legacy' is the code that Med-Flamingo was trained with (open-flamingo 0.0.2: to "
        "the image after it)"
    )
    if any(step.name == HEAD and step.kind is EXTEND_ROWS for step in steps):
        yield (
            f"lm_head has no trained rows for {', '.join(ADDED_TOKENS[:added])}: the original leaves them random, here "
            f"each is the mean of the others; {IMAGE_TOKEN} and padding are never generated, and "
            "<|endofchunk|> is unlikely before lm_head is trained: set max_new_tokens"
        )


def _native_tower(checkpoint: Checkpoint) -> tuple[TowerSpec, int, tuple[str, ...]]:
    """Return geometry and preprocessing of the tower in our own layout, depth of the language model, and notes."""
    where = checkpoint.folder / "config.json"
    config = build_config(checkpoint.config, str(where))
    vision = config.vision_config
    pixels, notes = host_pixels(checkpoint.folder, vision.image_size)
    tower = checked(TowerSpec, {**tower_geometry(vision), **pixels.model_dump()}, where)
    return tower, config.text_config.num_hidden_layers, notes


MED_FLAMINGO = MedFlamingo(
    spec=FamilySpec(
        name="med-flamingo",
        title="Med-Flamingo",
        hub_id="med-flamingo/med-flamingo",
        reads=("model.pt next to a LLaMA-7B and a CLIP, also as saved by OpenFlamingo >= 2.0",),
        tower=r"vision_tower\.",
        # The original trains these two and the embedding; the gated blocks read latents of the features'
        # width.
        projector=r"perceiver\.|cross_attention\.|bridge\.",
        language_model=r"language_model\.|lm_head\.",
        vision_parameters=r"vision_tower\.|bridge\.",
        not_llava="Med-Flamingo cannot be written as a LLaVA: its language model reads images by cross-attention",
        bare_weights=(r"(?:module\.)?(?:perceiver|lang_encoder)\.", r"(?:module\.)?vision_encoder\."),
        parts={
            LANGUAGE_PART: "folder of the LLaMA-7B that it was trained on",
            TOWER_PART: "OpenAI's CLIP ViT-L/14, as state dict or transformers folder",
        },
    ),
    chat_template=read_template("flamingo.jinja"),
)
