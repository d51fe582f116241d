"""LLaVA and LLaVA-Med: original layouts (haotian-liu/LLaVA, microsoft/LLaVA-Med) and the transformers layout.

Key names, vision contract and prompts after LLaVA c121f04 (llava/model/llava_arch.py,
llava/model/multimodal_encoder/clip_encoder.py, llava/conversation.py), LLaVA-Med d406e3f and, for the first releases,
LLaVA-Med v1.0.0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mgll_encoder.common.texts import read_json
from mgll_encoder.tower.architectures import HOSTED
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import FAMILY_KEY, FamilySpec, Plan
from mllm_adapters.core.host_tower import TOWER_PART
from mllm_adapters.core.planning import IMAGE_TOKEN
from mllm_adapters.core.processing import (
    check_placeholder,
    llava_processor,
    load_tokenizer,
    text_side,
    with_placeholder,
)
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Host, PlanRequest, Swap
from mllm_adapters.families.llava import fields as llava_fields
from mllm_adapters.families.llava.native import native_host
from mllm_adapters.families.llava.original import (
    image_markup,
    original_host,
    placeholder_token,
    tokenizer_folder,
)
from mllm_adapters.families.llava.processor import processor_files
from mllm_adapters.families.llava.prompts import prompt_template
from mllm_adapters.families.llava.weights import BASE_PART, PARTIAL_WEIGHTS


@dataclass(frozen=True)
class Llava(PlannedFamily):
    """The LLaVA architecture under one family name.

    Attributes:
        spec: Names and module patterns.
        chat_template: Jinja template of the original conversation format.
        owns_native_layout: Whether an unmarked checkpoint in the transformers layout counts as this family.
        reads_trained_tower: Whether the original code loads a trained tower from the shards.
    """

    spec: FamilySpec
    chat_template: str
    owns_native_layout: bool = False
    reads_trained_tower: bool = False

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``original``, ``transformers`` or None; model_type may be ``llava`` in both."""
        if llava_fields.owner(config) == self.spec.name:
            return "original"
        native = config.get("model_type") == "llava" and "vision_config" in config and "text_config" in config
        mine = config.get(FAMILY_KEY, self.spec.name if self.owns_native_layout else None) == self.spec.name
        return "transformers" if native and mine else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """See `PlannedFamily.host`."""
        name = self.spec.name
        if self.layout(checkpoint.config) == "transformers":
            return native_host(name, checkpoint)
        return original_host(name, checkpoint, request, reads_trained_tower=self.reads_trained_tower)

    def adapted(self, swap: Swap) -> Mapping[str, Any]:
        """See `PlannedFamily.adapted`."""
        return {"image_seq_length": swap.after.tokens}

    def processor(self, plan: Plan) -> Any | None:
        """Return the LlavaProcessor of the planned checkpoint; None if the source has no tokenizer."""
        if plan.layout == "transformers":
            text = text_side(plan.source)
            if text is None:
                return None
            tokenizer, template, image_token = text
            check_placeholder(tokenizer, image_token, plan.image_token_id)
            return llava_processor(plan.after, tokenizer, template, image_token)
        tokenizer = load_tokenizer(tokenizer_folder(plan.source, plan.parts))
        if tokenizer is None:
            return None
        image_token = placeholder_token(tokenizer, plan.image_token_id)
        with_placeholder(tokenizer, plan.image_token_id, image_token)
        config = read_json(plan.source / "config.json")
        template = prompt_template(config, tokenizer, self.chat_template)
        template = template.replace(IMAGE_TOKEN, image_markup(config, image_token))
        return llava_processor(plan.after, tokenizer, template, image_token)

    def processor_writer(self, plan: Plan) -> Callable[[Path], None]:
        """See `Family.processor_writer`; if only the pixel rule changes, the files are written as text."""
        if plan.layout == "transformers" and (files := processor_files(plan)) is not None:
            return partial(_write, files)
        return super().processor_writer(plan)


def _write(files: Mapping[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


LLAVA = Llava(
    spec=FamilySpec(
        name="llava",
        title="LLaVA",
        hub_id="liuhaotian/llava-v1.5-7b",
        reads=(
            "LLaVA-1.5 original, whole, projector only or LoRA",
            "LLaVA of 2023 with one projector layer",
            "LLaVA on Qwen2 (HuatuoGPT-Vision)",
            "transformers layout (llava-hf)",
        ),
        tower=r"vision_tower\.",
        projector=r"multi_modal_projector\.",
        language_model=r"language_model\.|lm_head\.",
        encoders=HOSTED,
        extra_weights=PARTIAL_WEIGHTS,
        parts={
            TOWER_PART: "the tower that mm_vision_tower names",
            BASE_PART: "the language model of a projector-only or LoRA folder",
        },
    ),
    chat_template=read_template("vicuna_v1.jinja"),
    owns_native_layout=True,
    reads_trained_tower=True,
)

LLAVA_MED = Llava(
    spec=replace(
        LLAVA.spec,
        name="llava-med",
        title="LLaVA-Med",
        hub_id="microsoft/llava-med-v1.5-mistral-7b",
        reads=("v1.5 original", "v1.0 with its delta applied", "transformers layout"),
    ),
    chat_template=read_template("mistral_instruct.jinja"),
)
