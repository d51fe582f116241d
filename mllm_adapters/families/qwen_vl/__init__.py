"""Qwen-VL and Qwen-VL-Chat (2023): the original layout (see `original`), and ours.

The prompt is that of qwen_generation_utils.py of Qwen/Qwen-VL-Chat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, PositiveInt

from mgll_encoder.common.errors import BadDataError, MismatchError
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config, read_fields
from mllm_adapters.core.contract import FAMILY_KEY, FamilySpec, Plan, VisionContract
from mllm_adapters.core.fates import Added, Unneeded
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, dtype_name
from mllm_adapters.core.processing import check_placeholder, host_pixels, processor_fate, text_side
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Connected, Host, PlanRequest, Swap
from mllm_adapters.families.qwen_vl.original import (
    EMBEDDINGS,
    QUERY,
    TOWER_PREFIX,
    OriginalFields,
    VisualFields,
    check_widths,
    language_model,
    original_contract,
    original_steps,
    original_vision,
)
from mllm_adapters.families.qwen_vl.tokenization import IMAGE_TOKEN, end_tokens, new_processor, tokenizer

MODEL_TYPE = "mgll_qwen_vl"
CONNECTOR = "attn_pool.kv_proj"

SWAPPED_LAYER = -2
"""Hidden layer of a CLIP tower for the resampler; the original tower is read at its end."""


class OwnFields(BaseModel):
    """The used fields of a config.json in our layout."""

    vision_feature_layer: int
    image_seq_length: PositiveInt
    image_token_id: int


@dataclass(frozen=True)
class QwenVL(PlannedFamily):
    """Qwen-VL of 2023 under its family name."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``original``, ``transformers`` (ours) or None."""
        if config.get("model_type") == MODEL_TYPE:
            return "transformers"
        original = config.get("model_type") == "qwen" and isinstance(config.get("visual"), dict)
        return "original" if original else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:  # noqa: ARG002 (none is needed)
        """See `PlannedFamily.host`."""
        original = self.layout(checkpoint.config) == "original"
        return self._original(checkpoint) if original else self._own(checkpoint)

    def connect(self, swap: Swap) -> Connected:
        """See `PlannedFamily.connect`: a projection is added if the original needed none."""
        host, steps, query = swap.host, swap.steps, swap.host.step(QUERY)
        width = query.shape[1]
        if any(step.name == f"{CONNECTOR}.weight" for step in steps):
            found = super().connect(swap)
        elif host.before.width != width:
            raise BadDataError(
                f"{swap.checkpoint.folder}: tensor {CONNECTOR}.weight is missing, but the tower's features "
                f"have width {host.before.width} and the resampler needs {width}: is it complete?"
            )
        elif swap.after.width == width:
            found = Connected(steps, {CONNECTOR: Unneeded(width=width)})
        else:
            found = _with_connector(steps, query, swap.after.width)
        reads = any(step.name == f"{CONNECTOR}.weight" for step in found.steps)
        return replace(found, config={"kv_projection": reads})

    def adapted(self, swap: Swap) -> Mapping[str, Any]:
        """See `PlannedFamily.adapted`."""
        return {"vision_feature_layer": swap.after.feature_layer}

    def processor(self, plan: Plan) -> Any | None:
        """Return the QwenVLProcessor of the planned checkpoint; None if the source has no tokenizer."""
        from mgll_encoder.tower.preprocess import image_processor
        from mllm_adapters.families.qwen_vl.modeling import QwenVLProcessor

        text = self._text_side(plan)
        if text is None:
            return None
        words, template = text
        check_placeholder(words, IMAGE_TOKEN, plan.image_token_id)
        return QwenVLProcessor(
            image_processor=image_processor(plan.after),
            tokenizer=words,
            image_seq_length=plan.after.tokens,
            image_token=IMAGE_TOKEN,
            chat_template=template,
        )

    def _text_side(self, plan: Plan) -> tuple[Any, str | None] | None:
        """Return tokenizer and chat template."""
        if plan.layout == "transformers":
            text = text_side(plan.source)
            return None if text is None else text[:2]
        context = plan.config["text_config"]["max_position_embeddings"]
        words = tokenizer(plan.source, plan.image_token_id, context)
        template = read_template("qwen_chatml.jinja")
        return None if words is None else (words, template)

    def _original(self, checkpoint: Checkpoint) -> Host:
        where = f"{checkpoint.folder}/config.json"
        fields = read_fields(OriginalFields, checkpoint.config, where)
        visual = read_fields(VisualFields, fields.visual, f"{where}, section visual")
        check_widths(fields, visual, where)
        steps, dropped = original_steps(checkpoint, visual)
        rows, dtype = _embeddings(checkpoint, steps, visual.image_token_id)
        return Host(
            layout="original",
            before=original_contract(visual),
            steps=steps,
            prefix=TOWER_PREFIX,
            dtype=dtype,
            config={
                "architectures": ["QwenVLForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                FAMILY_KEY: self.spec.name,
                "dtype": dtype_name(dtype),
                "vision_config": original_vision(visual),
                "text_config": language_model(checkpoint.config, fields, rows, where),
                "vision_feature_layer": -1,
                "image_seq_length": visual.n_queries,
                "resampler_heads": visual.output_dim // 128,
                "kv_projection": True,
                "image_token_id": visual.image_token_id,
                "tie_word_embeddings": fields.tie_word_embeddings,
            },
            image_token_id=visual.image_token_id,
            connector=(CONNECTOR,),
            read_at=SWAPPED_LAYER,
            queries=visual.n_queries,
            dropped=dropped,
            generation=end_tokens(checkpoint.folder, visual.image_token_id),
            processor=new_processor(checkpoint.folder),
            remarks=(
                f"sequences of more than {fields.context} tokens are refused: beyond them the original stretches its "
                "rotary base and scales its attention, which transformers' Qwen2 does not",
                f"the image placeholder is {IMAGE_TOKEN} = {visual.image_token_id}, {visual.n_queries} per image; file "
                "names between <img> and </img> are no longer read",
            ),
        )

    def _own(self, checkpoint: Checkpoint) -> Host:
        fields = read_fields(OwnFields, checkpoint.config, f"{checkpoint.folder}/config.json")
        before, notes = _own_contract(checkpoint, fields)
        if QUERY not in checkpoint.tensors:
            raise BadDataError(
                f"{checkpoint.folder} has no resampler ({QUERY} is not in its weights): is it complete?"
            )
        return Host(
            layout="transformers",
            before=before,
            steps=[copied(header) for header in checkpoint.tensors.values()],
            prefix=TOWER_PREFIX,
            dtype=checkpoint.tensors[QUERY].dtype,
            config={**checkpoint.config, FAMILY_KEY: self.spec.name},
            image_token_id=fields.image_token_id,
            connector=(CONNECTOR,),
            read_at=SWAPPED_LAYER,
            queries=fields.image_seq_length,
            processor=processor_fate(checkpoint.folder),
            notes=notes,
        )


def _own_contract(checkpoint: Checkpoint, fields: OwnFields) -> tuple[VisionContract, tuple[str, ...]]:
    """Return the vision contract of a checkpoint in our layout, and notes on assumptions."""
    vision = build_config(checkpoint.config, f"{checkpoint.folder}/config.json").vision_config.to_dict()
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    contract = VisionContract(
        width=vision["hidden_size"],
        patch_size=vision["patch_size"],
        tokens=fields.image_seq_length,
        feature_layer=fields.vision_feature_layer,
        class_token=False,
        activation=vision.get("hidden_act", "gelu"),
        **pixels.model_dump(),
    )
    return contract, notes


def _with_connector(steps: list[Step], query: Step, width: int) -> Connected:
    """Add a projection from features of this width to the resampler's width."""
    own = query.shape[1]
    added = Step(name=f"{CONNECTOR}.weight", dtype=query.dtype, shape=(own, width), operation="reinit")
    return Connected([*steps, added], {CONNECTOR: Added(before=own, after=width)})


def _embeddings(checkpoint: Checkpoint, steps: list[Step], image_token_id: int) -> tuple[int, Any]:
    """Return rows and dtype of the embedding, which has a row for the placeholder."""
    (source,) = next(step.sources for step in steps if step.name == EMBEDDINGS)
    header = checkpoint.tensors[source]
    if image_token_id >= header.shape[0]:
        raise MismatchError(
            f"{checkpoint.folder}/config.json: visual.image_start_id is {image_token_id - 2}, but {source} has only "
            f"{header.shape[0]} rows: expected at least {image_token_id + 1}; config.json and weights do not belong "
            "together"
        )
    return header.shape[0], header.dtype


QWEN_VL = QwenVL(
    spec=FamilySpec(
        name="qwen-vl",
        title="Qwen-VL",
        hub_id="Qwen/Qwen-VL-Chat",
        reads=("Qwen-VL and Qwen-VL-Chat original",),
        tower=r"vision_tower\.",
        projector=r"attn_pool\.",
        language_model=r"language_model\.",
        not_llava="Qwen-VL cannot be written as a LLaVA: between tower and language model it has a resampler with "
        "learned queries, where a LLaVA has an MLP",
    )
)
