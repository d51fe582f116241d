"""Janus-Pro: original checkpoints (deepseek-ai/Janus), converted ones, and those written by this project.

Key names, vision contract, token ids and prompt after deepseek-ai/Janus 1daa72f (janus/models/modeling_vlm.py,
clip_encoder.py, siglip_vit.py, vq_model.py, processing_vlm.py, janus/utils/conversation.py); names of the converted
layout after transformers (models/janus). Janus-1.3B is the same architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.filesize import decimal
from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mgll_encoder.tower.architectures import HOSTED
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import FAMILY_KEY, ConnectorLayer, Dropped, FamilySpec, Plan, VisionContract
from mllm_adapters.core.operations import Step
from mllm_adapters.core.processing import check_placeholder, llava_processor
from mllm_adapters.core.streaming import nbytes
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Host, PlanRequest, Swap
from mllm_adapters.families.janus_pro.original import read_original
from mllm_adapters.families.janus_pro.source import (
    CONNECTOR,
    GENERATION,
    IMAGE_BEGIN,
    IMAGE_END,
    NAME,
    OWN_TYPE,
    PLACEHOLDER,
    janus_pixels,
    janus_tokenizer,
    read_converted,
)
from mllm_adapters.families.llava import Llava

LLAVA_TOWER = "vision_tower.vision_model."

LLAVA_NAMES: tuple[tuple[str, str], ...] = (
    ("model.aligner.fc1.", "multi_modal_projector.linear_1."),
    ("model.aligner.hidden_layers.0.", "multi_modal_projector.linear_2."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Name prefix in the Janus layout -> in the LLaVA layout."""

OWN_FIELDS = (
    "boi_token_id", "aligner_depth", "aligner_hidden_act", "vision_feature_layer", "vision_feature_select_strategy",
)  # fmt: skip
"""Fields of our configuration that transformers' own Janus does not have."""


@dataclass(frozen=True)
class JanusPro(PlannedFamily):
    """Janus-Pro and Janus."""

    spec: FamilySpec

    @cached_property
    def as_llava(self) -> Llava:
        """See `PlannedFamily.as_llava`."""
        return Llava(spec=replace(self.spec, encoders=HOSTED), chat_template=_template(llava=True))

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``original``, ``transformers`` or None. DeepSeek-VL shares the model_type of the original layout."""
        kind = config.get("model_type")
        if kind == "multi_modality":
            return "original" if "gen_head_config" in config else None
        return "transformers" if kind in ("janus", OWN_TYPE) else self.as_llava.layout(config)

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """See `PlannedFamily.host`."""
        original = self.layout(checkpoint.config) == "original"
        host = (read_original if original else read_converted)(checkpoint, request)
        if request.tower is None:
            return _as_stock(host)
        if request.target == "llava":
            return _as_llava(host, checkpoint)
        side = host.config["vq_config"]["num_patches"]
        generated = f"{side}x{side} = {side**2} tokens per image, for any grid of the tower"
        return host.updated(remarks=(f"image generation is kept: it generates {generated}",))

    def adapted(self, swap: Swap) -> Mapping[str, Any]:
        """See `PlannedFamily.adapted`."""
        after = swap.after
        length = {"image_seq_length": after.tokens} if swap.request.target == "llava" else {}
        strategy = "full" if after.class_token else "default"
        return {
            **length,
            "vision_feature_layer": after.feature_layer,
            "vision_feature_select_strategy": strategy,
        }

    def remarks(self, swap: Swap) -> tuple[str, ...]:
        """See `PlannedFamily.remarks`."""
        if swap.request.tower is None or swap.host.read_at is None:
            return ()
        return (
            "the new tower is read as in LLaVA, at the patch tokens of hidden layer "
            f"{swap.after.feature_layer}; Janus reads its own after the last block and a final norm",
        )

    def processor(self, plan: Plan) -> Any | None:
        """Return a JanusProcessor or, for the layout llava, a LlavaProcessor; None if the source has no tokenizer."""
        if read_json(plan.source / "config.json").get("model_type") == "llava":
            return self.as_llava.processor(plan)
        tokenizer = janus_tokenizer(plan.source)
        if tokenizer is None:
            return None
        check_placeholder(tokenizer, PLACEHOLDER, plan.image_token_id)
        if plan.config["model_type"] == "llava":
            return llava_processor(plan.after, tokenizer, self.as_llava.chat_template, PLACEHOLDER)
        from transformers import JanusProcessor

        from mllm_adapters.families.janus_pro.modeling import MgllJanusProcessor

        kind = MgllJanusProcessor if plan.swapped else JanusProcessor
        return kind(
            image_processor=self.image_processor(plan),
            tokenizer=tokenizer,
            chat_template=_template(),
            num_image_tokens=plan.after.tokens,
        )

    def image_processor(self, plan: Plan) -> Any:
        """Return Janus' own image processor for its own tower, the new tower's after a swap."""
        if plan.swapped:
            return super().image_processor(plan)
        from transformers import JanusImageProcessor

        _, min_size, _ = janus_pixels(plan.source, plan.after.image_size)
        side = plan.after.image_size
        return JanusImageProcessor(
            size={"height": side, "width": side},
            image_mean=list(plan.after.mean),
            image_std=list(plan.after.std),
            min_size=min_size,
        )

    def connector_layers(self, plan: Plan) -> tuple[ConnectorLayer, ...]:
        """Return the aligner's first layer, under its name in either layout."""
        (reading,) = super().connector_layers(plan)
        was_llava = read_json(plan.source / "config.json").get("model_type") == "llava"
        return (reading if was_llava else replace(reading, host=CONNECTOR),)

    def encode_images(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (none is needed)
        """See `Family.encode_images`; Janus' outer class has no ``get_image_features``."""
        model.base_model.get_image_features(pixel_values=pixels)


def _as_stock(host: Host) -> Host:
    """Return the host as transformers' own Janus."""
    config = {key: value for key, value in host.config.items() if key not in OWN_FIELDS}
    stock = {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus"}
    return host.updated(config={**config, **stock}, connector=())


def _as_llava(host: Host, checkpoint: Checkpoint) -> Host:
    """Return the host's understanding path as a LLaVA."""
    depth, activation = host.config["aligner_depth"], host.config["aligner_hidden_act"]
    if (depth, activation) != (2, "gelu"):
        raise UnsupportedCheckpointError(
            f"{checkpoint.folder}: its aligner has {depth} layers with {activation}, but a LLaVA's projector two with "
            "gelu: take `layout=own`"
        )
    generation = [step for step in host.steps if step.name.startswith(GENERATION)]
    names = dict.fromkeys(name for step in generation for name in step.sources)
    size = decimal(sum(map(nbytes, generation)))
    same = ("text_config", FAMILY_KEY, "dtype", "tie_word_embeddings")
    return host.updated(
        steps=[_renamed(step) for step in host.steps if not step.name.startswith(GENERATION)],
        prefix=LLAVA_TOWER,
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_config": {},
            "text_config": host.config["text_config"],
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "image_token_index": host.image_token_id,
            "image_seq_length": host.before.tokens,
            "vision_feature_layer": None,
            "vision_feature_select_strategy": None,
            **{key: host.config[key] for key in same},
        },
        connector=(LLAVA_NAMES[0][1].removesuffix("."),),
        dropped=[
            *host.dropped,
            *(Dropped(name=n, reason="image generation is not part of a LLaVA") for n in names),
        ],
        remarks=(f"image generation is left out: {len(generation)} tensors, {size}",),
    )


def _renamed(step: Step) -> Step:
    """Rename a step for a LLaVA; those of the old tower are unchanged."""
    found = next((row for row in LLAVA_NAMES if step.name.startswith(row[0])), None)
    if found is None:
        return step
    operation = "rename" if step.kind.in_place else step.operation
    name = found[1] + step.name.removeprefix(found[0])
    return step.model_copy(update={"name": name, "operation": operation})


def _template(llava: bool = False) -> str:
    """Return Janus-Pro's chat template; JanusProcessor adds the tokens around an image, LlavaProcessor does not."""
    text = read_template("janus_pro.jinja")
    return text.replace(PLACEHOLDER, IMAGE_BEGIN + PLACEHOLDER + IMAGE_END) if llava else text


JANUS_PRO = JanusPro(
    spec=FamilySpec(
        name=NAME,
        title="Janus-Pro",
        hub_id="deepseek-ai/Janus-Pro-7B",
        reads=("multi_modality original", "transformers layout"),
        tower=r"model\.vision_model\.|vision_tower\.",
        projector=r"model\.aligner\.|multi_modal_projector\.",
        language_model=r"language_model\.|lm_head\.",
        other=r"model\.vqmodel\.|model\.generation_",
        targets=("own", "llava"),
    )
)
