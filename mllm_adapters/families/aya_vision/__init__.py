"""Aya Vision: a native transformers family whose configuration takes any tower, so a swap stays stock.

Vision contract after transformers 5.23 (models/aya_vision/modeling_aya_vision.py): one hidden state of the tower, pixel
shuffle by ``downsample_factor``, LayerNorm, SwiGLU projector.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.tower.architectures import HOSTED, described_by
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import read_fields
from mllm_adapters.core.contract import FAMILY_KEY, FamilySpec, Plan, VisionContract
from mllm_adapters.core.planning import copied, tower_root
from mllm_adapters.core.processing import host_pixels, image_settings, load_processor, processor_fate
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Host, PlanRequest, Swap

TOWER = "vision_tower."
CONNECTORS = ("multi_modal_projector.layernorm", "multi_modal_projector.linear_1")

FEATURE_LAYER = -2
"""Hidden layer at which a new tower is read; the host's own SigLIP is read at its end."""


class VisionFields(BaseModel):
    """The used fields of ``vision_config``, with the defaults of ``AyaVisionConfig``."""

    hidden_size: PositiveInt = 1152
    image_size: PositiveInt = 384
    model_type: str = "siglip_vision_model"
    patch_size: PositiveInt = 14
    hidden_act: str = "gelu_pytorch_tanh"


class Fields(BaseModel):
    """The used fields of config.json, with the defaults of ``AyaVisionConfig``."""

    vision_config: VisionFields = Field(default_factory=VisionFields)
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    downsample_factor: PositiveInt = 2
    image_token_index: int = 255036


class AyaVision(PlannedFamily):
    """The Aya Vision architecture."""

    spec = FamilySpec(
        name="aya-vision",
        title="Aya Vision",
        hub_id="CohereLabs/aya-vision-8b",
        reads=("transformers layout",),
        tower=r"vision_tower\.",
        projector=r"multi_modal_projector\.",
        language_model=r"language_model\.|lm_head\.",
        encoders=HOSTED,
        not_llava="Aya Vision cannot be written as a LLaVA: its projector merges 2 x 2 patches and gates them",
    )

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``transformers``, the only layout, or None."""
        return "transformers" if config.get("model_type") == "aya_vision" else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:  # noqa: ARG002 (one layout, one target)
        """See `PlannedFamily.host`."""
        fields = read_fields(Fields, checkpoint.config, f"{checkpoint.folder}/config.json")
        before, notes = _contract(checkpoint, fields)
        root, dtype = tower_root(checkpoint, TOWER)
        return Host(
            layout="transformers",
            before=before,
            steps=[copied(header) for header in checkpoint.tensors.values()],
            prefix=f"{root}{TOWER}vision_model.",
            dtype=dtype,
            config={**checkpoint.config, FAMILY_KEY: self.spec.name},
            image_token_id=fields.image_token_index,
            connector=tuple(root + name for name in CONNECTORS),
            read_at=FEATURE_LAYER,
            merge=fields.downsample_factor,
            tiles=before.tiles,
            processor=processor_fate(checkpoint.folder),
            notes=notes,
        )

    def adapted(self, swap: Swap) -> Mapping[str, Any]:
        """See `PlannedFamily.adapted`."""
        return {
            "vision_feature_layer": swap.after.feature_layer,
            "vision_feature_select_strategy": swap.after.select_strategy,
        }

    def processor(self, plan: Plan) -> Any | None:
        """Return the AyaVisionProcessor of the planned checkpoint; None if the source has no tokenizer."""
        from transformers import AyaVisionProcessor

        own = load_processor(plan.source)
        if own is None:
            return None
        return AyaVisionProcessor(
            image_processor=self.image_processor(plan),
            tokenizer=own.tokenizer,
            patch_size=plan.after.patch_size,
            downsample_factor=plan.config.get("downsample_factor", 2),
            img_size=plan.after.image_size,
            image_token=own.image_token,
            chat_template=own.chat_template,
        )

    def image_processor(self, plan: Plan) -> Any:
        """Return an image processor that resizes an image, or each of its tiles, to the tower's square."""
        from transformers import GotOcr2ImageProcessor

        side = plan.after.image_size
        return GotOcr2ImageProcessor(
            size={"height": side, "width": side},
            image_mean=list(plan.after.mean),
            image_std=list(plan.after.std),
            max_patches=plan.after.tiles,
        )


def _contract(checkpoint: Checkpoint, fields: Fields) -> tuple[VisionContract, tuple[str, ...]]:
    """Return the vision contract of the source, and notes on assumptions."""
    vision = fields.vision_config
    architecture = described_by(vision.model_type)
    pixels, notes = host_pixels(checkpoint.folder, vision.image_size)
    contract = VisionContract(
        **pixels.model_dump(),
        width=vision.hidden_size,
        patch_size=vision.patch_size,
        tokens=(vision.image_size // vision.patch_size // fields.downsample_factor) ** 2,
        feature_layer=fields.vision_feature_layer,
        class_token=False,
        leading=architecture.leading if architecture else 0,
        activation=vision.hidden_act,
        tiles=_tiles(checkpoint),
    )
    return contract, notes


def _tiles(checkpoint: Checkpoint) -> int:
    settings, _ = image_settings(checkpoint.folder)
    return 1 if settings is None else int(settings.get("max_patches", 12))


AYA_VISION = AyaVision()
