"""Qwen-VL and Qwen-VL-Chat (2023): the original layout (`qwen_vl_original`), and ours.

The prompt is that of qwen_generation_utils.py of Qwen/Qwen-VL-Chat.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import build_config, read_fields, tower_config
from mllm_adapters.contract import FAMILY_KEY, Family, FamilySpec, Plan, Step, Target, VisionContract
from mllm_adapters.families import read_template
from mllm_adapters.families.qwen_vl_original import (
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
from mllm_adapters.families.qwen_vl_tokenizer import IMAGE_TOKEN, end_tokens, tokenizer, tokenizer_note
from mllm_adapters.planning import (
    after_swap,
    dtype_name,
    kept,
    refit_reader,
    replaced,
    swap_notes,
    tower_steps,
)
from mllm_adapters.processing import check_placeholder, host_pixels, own_processor, text_side

MODEL_TYPE = "mgll_qwen_vl"
READER = "attn_pool.kv_proj"

SWAPPED_LAYER = -2
"""Hidden layer of a CLIP tower that the resampler reads; the original tower is read at its end."""


class OwnFields(BaseModel):
    """What counts in a config.json of our layout."""

    vision_feature_layer: int
    image_seq_length: PositiveInt
    image_token_id: int


@dataclass(frozen=True)
class QwenVL(Family):
    """Qwen-VL of 2023 under its family name."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` (ours) or None."""
        if config.get("model_type") == MODEL_TYPE:
            return "transformers"
        original = config.get("model_type") == "qwen" and isinstance(config.get("visual"), dict)
        return "original" if original else None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to our layout; see `Family.plan`."""
        if target != "own":
            raise UserError(f"{checkpoint.folder}: {self.spec.not_llava}; use --layout own")
        if self.layout(checkpoint.config) == "original":
            return self._plan_original(checkpoint, tower, image_size)
        return self._plan_own(checkpoint, tower, image_size)

    def processor(self, plan: Plan) -> Any | None:
        """The QwenVLProcessor of the planned checkpoint; None where the source has no tokenizer."""
        from mgll_encoder.preprocess import image_processor
        from mllm_adapters.modeling.qwen_vl import QwenVLProcessor

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
        """Tokenizer and chat template."""
        if plan.layout == "transformers":
            text = text_side(plan.source)
            return None if text is None else text[:2]
        context = plan.config["text_config"]["max_position_embeddings"]
        words = tokenizer(plan.source, plan.image_token_id, context)
        template = read_template("qwen_chatml.jinja")
        return None if words is None else (words, template)

    def _plan_original(
        self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
    ) -> Plan:
        where = f"{checkpoint.folder}/config.json"
        fields = read_fields(OriginalFields, checkpoint.config, where)
        visual = read_fields(VisualFields, fields.visual, f"{where}, section visual")
        check_widths(fields, visual, where)
        steps, dropped = original_steps(checkpoint, visual)
        before = original_contract(visual)
        after = _after(before, tower, image_size)
        steps, readers = _read_anew(steps, before, after, checkpoint.folder)
        rows, dtype = _embeddings(checkpoint, steps, visual.image_token_id)
        vision: dict[str, Any] = original_vision(visual)
        if tower is not None:
            old = [step for step in steps if step.name.startswith(TOWER_PREFIX)]
            dropped += replaced(dict.fromkeys(source for step in old for source in step.sources))
            steps = [step for step in steps if not step.name.startswith(TOWER_PREFIX)]
            steps += tower_steps(tower, TOWER_PREFIX, after, dtype)
            vision = tower_config(tower.spec, after)
        return Plan(
            family=self.spec.name,
            layout="original",
            source=checkpoint.folder,
            tower=tower.source if tower else None,
            tower_weights=tower.weights if tower else None,
            swapped=tower is not None,
            steps=tuple(steps),
            dropped=tuple(dropped),
            config={
                "architectures": ["QwenVLForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                FAMILY_KEY: self.spec.name,
                "dtype": dtype_name(dtype),
                "vision_config": vision,
                "text_config": language_model(checkpoint.config, fields, rows, where),
                "vision_feature_layer": after.feature_layer,
                "image_seq_length": after.tokens,
                "resampler_heads": visual.output_dim // 128,
                "kv_projection": any(step.name == f"{READER}.weight" for step in steps),
                "image_token_id": visual.image_token_id,
                "tie_word_embeddings": fields.tie_word_embeddings,
            },
            generation=end_tokens(checkpoint.folder, visual.image_token_id),
            before=before,
            after=after,
            image_token_id=visual.image_token_id,
            processor=tokenizer_note(checkpoint.folder),
            readers=readers,
            notes=(
                *swap_notes(tower, after),
                f"sequences of more than {fields.context} tokens are refused: beyond them the original stretches its "
                "rotary base and scales its attention, which transformers' Qwen2 does not",
                f"the image placeholder is {IMAGE_TOKEN} = {visual.image_token_id}, {after.tokens} per image; file "
                "names between <img> and </img> are no longer read",
            ),
        )

    def _plan_own(self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None) -> Plan:
        if tower is None:
            raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
        fields = read_fields(OwnFields, checkpoint.config, f"{checkpoint.folder}/config.json")
        before, notes = _own_contract(checkpoint, fields)
        after = _after(before, tower, image_size)
        headers = checkpoint.tensors.values()
        steps = [kept(header) for header in headers if not header.name.startswith(TOWER_PREFIX)]
        steps, readers = _read_anew(steps, before, after, checkpoint.folder)
        dtype = checkpoint.tensors[QUERY].dtype  # `_read_anew` has found it
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            tower_weights=tower.weights,
            swapped=True,
            steps=(*steps, *tower_steps(tower, TOWER_PREFIX, after, dtype)),
            dropped=replaced(h.name for h in headers if h.name.startswith(TOWER_PREFIX)),
            config={
                **checkpoint.config,
                FAMILY_KEY: self.spec.name,
                "vision_config": tower_config(tower.spec, after),
                "vision_feature_layer": after.feature_layer,
                "kv_projection": any(step.name == f"{READER}.weight" for step in steps),
            },
            before=before,
            after=after,
            image_token_id=fields.image_token_id,
            processor=own_processor(checkpoint.folder),
            readers=readers,
            notes=(*notes, *swap_notes(tower, after)),
        )


def _own_contract(checkpoint: Checkpoint, fields: OwnFields) -> tuple[VisionContract, tuple[str, ...]]:
    """The vision contract of a checkpoint in our layout, and what had to be assumed."""
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


def _after(before: VisionContract, tower: TowerHeader | None, image_size: int | None) -> VisionContract:
    """The contract after a swap; the number of queries is the number of tokens, whatever the grid."""
    read = before.model_copy(update={"feature_layer": SWAPPED_LAYER}) if tower else before
    return after_swap(read, tower, image_size, tokens=lambda _: before.tokens)


def _read_anew(
    steps: list[Step], before: VisionContract, after: VisionContract, where: Path
) -> tuple[list[Step], dict[str, str]]:
    """Re-initialise the reader if the features' width changes; add it where the original needed none."""
    old = next((step for step in steps if step.name == f"{READER}.weight"), None)
    if old is not None:
        return refit_reader(steps, READER, before, after, where)
    query = next((step for step in steps if step.name == QUERY), None)
    if query is None:
        raise UserError(f"{where} has no resampler ({QUERY} is not in its weights): is it complete?")
    width = query.shape[1]
    if before.width != width:
        raise UserError(
            f"{where}: tensor {READER}.weight is missing, but the tower gives features of width {before.width} and "
            f"the resampler takes {width}: is it complete?"
        )
    if after.width == width:
        return steps, {READER: f"none: features and language model are both {width} wide"}
    added = Step(name=f"{READER}.weight", dtype=query.dtype, shape=(width, after.width), operation="reinit")
    text = f"added, at random: the original needs none ({width} -> {after.width} wide): retrain the projector"
    return [*steps, added], {READER: text}


def _embeddings(checkpoint: Checkpoint, steps: list[Step], image_token_id: int) -> tuple[int, Any]:
    """Rows and dtype of the embedding, which has one for the placeholder."""
    (source,) = next(step.sources for step in steps if step.name == EMBEDDINGS)
    header = checkpoint.tensors[source]
    if image_token_id >= header.shape[0]:
        raise UserError(
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
