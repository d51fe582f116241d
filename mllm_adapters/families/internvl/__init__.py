"""InternVL-Chat (1.1 to 3.5): original layout (``InternVLChatModel``) and the transformers layout.

Defaults and vision contract after OpenGVLab/InternVL 2410d1d (internvl_chat/internvl/model/internvl_chat:
configuration_*.py, modeling_*.py; internvl_chat/internvl/train/dataset.py) and transformers 5.23.0 (models/internvl).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mgll_encoder.common.texts import read_json
from mgll_encoder.tower.architectures import HOSTED
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import FAMILY_KEY, FamilySpec, Plan, VisionContract
from mllm_adapters.core.fates import Reinitialized
from mllm_adapters.core.planning import after_swap, reinitialized
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Connected, Host, PlanRequest, Swap
from mllm_adapters.families.internvl import text as internvl_text
from mllm_adapters.families.internvl.hosts import CLASSES, NAME, native_host, original_host
from mllm_adapters.families.llava import LLAVA, Llava

ORIGINAL = "InternVLChatModel"


@dataclass(frozen=True)
class InternVL(PlannedFamily):
    """InternVL-Chat."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``original``, ``transformers`` or None."""
        names = config.get("architectures")
        if isinstance(names, list) and names[:1] == [ORIGINAL] and "llm_config" in config:
            return None if "audio_config" in config else "original"
        kind = config.get("model_type")
        native = kind in CLASSES and "vision_config" in config and "text_config" in config
        mine = kind != "llava" or config.get(FAMILY_KEY) == self.spec.name
        return "transformers" if native and mine else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """See `PlannedFamily.host`."""
        original = self.layout(checkpoint.config) == "original"
        return (original_host if original else native_host)(checkpoint, request)

    def after(self, host: Host, request: PlanRequest) -> VisionContract:
        """See `PlannedFamily.after`; a LLaVA has as many tokens as the host, but does not merge patches."""
        if request.tower is None or request.target != "llava":
            return super().after(host, request)
        usual = isqrt(host.before.tokens) * request.tower.spec.patch_size
        size = usual if request.image_size is None else request.image_size
        return after_swap(host.clip_contract, request.tower, size)

    def connect(self, swap: Swap) -> Connected:
        """See `PlannedFamily.connect`; a LLaVA gets a projector without normalization."""
        if swap.request.target != "llava":
            return super().connect(swap)
        norm, first = swap.host.connector
        shapes = {f"{first}.weight": (swap.host.step(f"{first}.weight").shape[0], swap.after.width)}
        made = [
            reinitialized(step, shapes.get(step.name, step.shape))
            if step.name.startswith(f"{first}.")
            else step
            for step in swap.steps
            if not step.name.startswith(f"{norm}.")
        ]
        before, after = swap.host.before.width, swap.after.width
        return Connected(made, {first: Reinitialized(before=before, after=after, because="patches")})

    def adapted(self, swap: Swap) -> Mapping[str, Any]:
        """See `PlannedFamily.adapted`."""
        return {
            "vision_feature_layer": swap.after.feature_layer,
            "image_seq_length": swap.after.tokens,
        }

    def remarks(self, swap: Swap) -> tuple[str, ...]:
        """See `PlannedFamily.remarks`."""
        before = swap.host.before
        if before.tiles <= swap.after.tiles:
            return ()
        return (
            f"the original cuts an image into up to {before.tiles} tiles of {before.tokens} tokens; now each image is "
            "one",
        )

    def processor(self, plan: Plan) -> Any | None:
        """Return the planned checkpoint's processor; None if the source has no tokenizer."""
        if read_json(plan.source / "config.json").get("model_type") == "llava":
            return self.as_llava.processor(plan)
        return internvl_text.processor(plan, self.image_processor(plan))

    def image_processor(self, plan: Plan) -> Any:
        """Return InternVL's own, which can cut tiles, unless images are cropped or padded or the target is a LLaVA."""
        return internvl_text.image_processor(plan) or super().image_processor(plan)

    def token_order(self, model: Any, contract: VisionContract) -> Tensor | None:
        """See `Family.token_order`: the first releases merge patches column by column."""
        if getattr(model.config, "ps_version", "v2") == "v2":
            return None
        side = isqrt(contract.tokens)
        return torch.arange(contract.tokens).view(side, side).T.flatten()

    @property
    def as_llava(self) -> Llava:
        """See `PlannedFamily.as_llava`."""
        return replace(LLAVA, spec=replace(self.spec, encoders=HOSTED))


INTERNVL = InternVL(
    spec=FamilySpec(
        name=NAME,
        title="InternVL",
        hub_id="OpenGVLab/InternVL2_5-8B",
        reads=(
            "InternVL-Chat V1-1 to 3.5 original (LLaMA/Vicuna, InternLM2, Qwen2, Qwen3; InternViT-300M and 6B)",
            "transformers layout (-hf)",
        ),
        tower=r"vision_tower\.",
        projector=r"multi_modal_projector\.",
        language_model=r"language_model\.|lm_head\.",
        targets=("own", "llava"),
    )
)
