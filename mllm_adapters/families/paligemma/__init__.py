"""PaliGemma and PaliGemma 2: a native transformers family whose configuration takes any tower, so a swap stays stock.

Vision contract after transformers 5.23 (models/paligemma/modeling_paligemma.py): the tower's full
``last_hidden_state``, and one linear layer. No field selects another hidden state or drops a class token, so
a new tower is read at its end, and its class token becomes an additional visual token. Prompt after
processing_paligemma.py of the same release: image, ``<bos>``, question, line break. Where ``token_type_ids``
is 0, in image and prompt, tokens attend to each other in both directions; the answer is causal (1).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.tower.architectures import HOSTED, described_by
from mgll_encoder.tower.spec import PixelRule
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import read_fields
from mllm_adapters.core.contract import FAMILY_KEY, FamilySpec, Plan, VisionContract
from mllm_adapters.core.planning import copied, tower_root
from mllm_adapters.core.processing import (
    check_placeholder,
    host_pixels,
    llava_processor,
    load_processor,
    load_tokenizer,
    processor_fate,
)
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Host, PlanRequest, Swap

TOWER = "vision_tower."
IMAGE_TOKEN = "<image>"
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
"""Outputs of the tokenizer; without the last one stock classes treat a padded prompt as causal, but not others."""


class VisionFields(BaseModel):
    """The used fields of ``vision_config``, with the defaults of ``PaliGemmaConfig``."""

    model_type: str = "siglip_vision_model"
    hidden_size: PositiveInt = 1152
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 14
    hidden_act: str = "gelu_pytorch_tanh"


class Fields(BaseModel):
    """The used fields of config.json, with the defaults of ``PaliGemmaConfig``."""

    vision_config: VisionFields = Field(default_factory=VisionFields)
    image_token_index: int = 256000


class PaliGemma(PlannedFamily):
    """The PaliGemma architecture."""

    spec = FamilySpec(
        name="paligemma",
        title="PaliGemma",
        hub_id="google/paligemma-3b-mix-224",
        reads=("PaliGemma and PaliGemma 2 as published",),
        tower=r"vision_tower\.",
        projector=r"multi_modal_projector\.",
        language_model=r"language_model\.|lm_head\.",
        encoders=HOSTED,
        not_llava="PaliGemma cannot be written as a LLaVA: its image and its prompt attend to each other",
    )

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``transformers`` (written here: with chat template and token types), ``published`` or None."""
        if config.get("model_type") != "paligemma":
            return None
        return "transformers" if config.get(FAMILY_KEY) == self.spec.name else "published"

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:  # noqa: ARG002 (one target)
        """See `PlannedFamily.host`."""
        fields = read_fields(Fields, checkpoint.config, f"{checkpoint.folder}/config.json")
        root, dtype = tower_root(checkpoint, TOWER)
        before, notes = _contract(checkpoint, fields.vision_config)
        return Host(
            layout=self.layout(checkpoint.config) or "",
            before=before,
            steps=[copied(header) for header in checkpoint.tensors.values()],
            prefix=f"{root}{TOWER}vision_model.",
            dtype=dtype,
            config={**checkpoint.config, FAMILY_KEY: self.spec.name},
            image_token_id=fields.image_token_index,
            connector=(f"{root}multi_modal_projector.linear",),
            processor=processor_fate(checkpoint.folder, name="LlavaProcessor", template=True),
            notes=notes,
        )

    def after(self, host: Host, request: PlanRequest) -> VisionContract:
        """See `PlannedFamily.after`; the class token of a new tower, if it has one, is read."""
        if request.tower is not None:
            host = host.updated(before=host.before.model_copy(update={"class_token": True}))
        return super().after(host, request)

    def remarks(self, swap: Swap) -> tuple[str, ...]:
        """See `PlannedFamily.remarks`."""
        if swap.request.tower is None:
            return ()
        end = "PaliGemma reads a tower at its end (LLaVA: one block before it)"
        more = (
            ", and the new tower's class token is an additional visual token"
            if swap.after.class_token
            else ""
        )
        return (end + more,)

    def processor(self, plan: Plan) -> Any | None:
        """Return a LlavaProcessor with PaliGemma's prompt as chat template; None if the source has no tokenizer."""
        written = load_processor(plan.source) if plan.layout == "transformers" else None
        tokenizer = written.tokenizer if written else load_tokenizer(plan.source)
        if tokenizer is None:
            return None
        check_placeholder(tokenizer, IMAGE_TOKEN, plan.image_token_id)
        tokenizer.add_bos_token = False  # the template writes it after the image
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = INPUTS
        template = written.chat_template if written else read_template("paligemma.jinja")
        return llava_processor(plan.after, tokenizer, template)


def _contract(checkpoint: Checkpoint, vision: VisionFields) -> tuple[VisionContract, tuple[str, ...]]:
    """Return the vision contract of the source, and notes on assumptions."""
    assumed = PixelRule(image_size=vision.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, resize="squash")
    pixels, notes = host_pixels(checkpoint.folder, vision.image_size, assumed)
    architecture = described_by(vision.model_type)
    class_token = architecture is not None and architecture.leading > 0
    contract = VisionContract(
        **pixels.model_dump(),
        width=vision.hidden_size,
        patch_size=vision.patch_size,
        tokens=(vision.image_size // vision.patch_size) ** 2 + class_token,
        feature_layer=-1,
        class_token=class_token,
        leading=int(class_token),
        activation=vision.hidden_act,
    )
    return contract, notes


PALIGEMMA = PaliGemma()
