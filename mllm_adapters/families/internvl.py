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

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.texts import read_json
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import tower_config
from mllm_adapters.contract import FAMILY_KEY, Dropped, Family, FamilySpec, Plan, Step, Target, VisionContract
from mllm_adapters.families import internvl_text
from mllm_adapters.families.internvl_hosts import Host, native_host, original_host
from mllm_adapters.families.internvl_names import PROJECTOR, TOWER
from mllm_adapters.families.llava import LLAVA, Llava
from mllm_adapters.planning import REPLACED, after_swap, anew, refit_reader, swap_notes, tower_steps

ORIGINAL = "InternVLChatModel"

CLASSES: Mapping[str, str] = {
    "internvl": "InternVLForConditionalGeneration",
    "mgll_internvl": "MgllInternVLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
"""``model_type`` of what is read and written in the transformers layout -> its class."""

FEATURE_LAYER = -2
"""Hidden layer that is read of a new tower: a CLIP's last block is trained to feed its class token only."""


@dataclass(frozen=True)
class InternVL(Family):
    """InternVL-Chat."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` or None."""
        names = config.get("architectures")
        if isinstance(names, list) and names[:1] == [ORIGINAL] and "llm_config" in config:
            return None if "audio_config" in config else "original"
        kind = config.get("model_type")
        native = kind in CLASSES and "vision_config" in config and "text_config" in config
        mine = kind != "llava" or config.get(FAMILY_KEY) == self.spec.name
        return "transformers" if native and mine else None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to the transformers layout; see `Family.plan`.

        Raises:
            UserError: also where a LLaVA is wanted without a new tower.
        """
        if checkpoint.config.get("model_type") == "llava":
            return self._as_llava.plan(checkpoint, tower, image_size)
        if self.layout(checkpoint.config) == "original":
            host = original_host(checkpoint)
        elif tower is None:
            raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
        else:
            host = native_host(checkpoint)
        if tower is None:
            if target == "llava":
                raise UserError(f"{checkpoint.folder}: a LLaVA has a CLIP tower: give one with --encoder")
            return self._finish(host, checkpoint, None, host.contract, (*host.tower, *host.rest), target)
        if target == "llava":
            return self._llava(host, checkpoint, tower, image_size)
        seen = host.contract.model_copy(update={"feature_layer": FEATURE_LAYER})
        after = after_swap(seen, tower, image_size, tokens=host.tokens, multiple=host.shrink)
        steps = list(host.rest)
        readers: dict[str, str] = {}
        for reader in ("layer_norm", "linear_1"):
            name = host.root + PROJECTOR + reader
            steps, fate = refit_reader(steps, name, host.contract, after, checkpoint.folder)
            readers |= fate
        steps += tower_steps(tower, host.root + TOWER, after, _projector_dtype(host, checkpoint))
        return self._finish(host, checkpoint, tower, after, tuple(steps), target, readers)

    def processor(self, plan: Plan) -> Any | None:
        """The planned checkpoint's processor; None where the source has no tokenizer."""
        if read_json(plan.source / "config.json").get("model_type") == "llava":
            return self._as_llava.processor(plan)
        return internvl_text.processor(plan, self.image_processor(plan))

    def image_processor(self, plan: Plan) -> Any:
        """InternVL's own, which can cut tiles, unless images are cropped or padded or the target is a LLaVA."""
        return internvl_text.image_processor(plan) or super().image_processor(plan)

    def token_order(self, model: Any, contract: VisionContract) -> Tensor | None:
        """See `Family.token_order`: the first releases join patches column by column."""
        if getattr(model.config, "ps_version", "v2") == "v2":
            return None
        side = isqrt(contract.tokens)
        return torch.arange(contract.tokens).view(side, side).T.flatten()

    @property
    def _as_llava(self) -> Llava:
        """The LLaVA family under this family's name."""
        return replace(LLAVA, spec=self.spec)

    def _llava(self, host: Host, checkpoint: Checkpoint, tower: TowerHeader, image_size: int | None) -> Plan:
        """A LLaVA of the new tower, a new projector and the host's language model, with as many tokens."""
        seen = host.contract.model_copy(update={"feature_layer": FEATURE_LAYER})
        size = isqrt(host.contract.tokens) * tower.spec.patch_size if image_size is None else image_size
        after = after_swap(seen, tower, size)
        projector = host.root + PROJECTOR
        first, norm = f"{projector}linear_1.", f"{projector}layer_norm."
        steps = []
        for step in host.rest:
            if step.name.startswith(first):
                shape = (step.shape[0], after.width) if step.name.endswith("weight") else step.shape
                steps.append(anew(step, shape))
            elif not step.name.startswith(norm):
                steps.append(step)
        prefix = f"{host.root}{TOWER}vision_model."
        steps += tower_steps(tower, prefix, after, _projector_dtype(host, checkpoint))
        fate = "re-initialised (reads single patches, not joined ones): retrain the projector"
        readers = {first.removesuffix("."): fate}
        return self._finish(host, checkpoint, tower, after, tuple(steps), "llava", readers)

    def _finish(
        self,
        host: Host,
        checkpoint: Checkpoint,
        tower: TowerHeader | None,
        after: VisionContract,
        steps: tuple[Step, ...],
        target: Target,
        readers: Mapping[str, str] | None = None,
    ) -> Plan:
        # The stock class has one order of visual tokens, and its processor one resize rule.
        stock = tower is None and host.config["ps_version"] == "v2" and after.resize == "squash"
        model_type = target if target == "llava" else "internvl" if stock else "mgll_internvl"
        config = {
            **host.config,
            "architectures": [CLASSES[model_type]],
            "model_type": model_type,
            FAMILY_KEY: self.spec.name,
            "vision_config": tower_config(tower.spec, after) if tower else dict(host.vision_config),
            "vision_feature_layer": after.feature_layer,
            "image_seq_length": after.tokens,
        }
        if model_type != "mgll_internvl":
            del config["ps_version"]
        if target == "llava":
            del config["downsample_ratio"]
            # The name that releases before 5.0 read.
            config |= {"image_token_index": config.pop("image_token_id"), "multimodal_projector_bias": True}
        return Plan(
            family=self.spec.name,
            layout=host.layout,
            source=checkpoint.folder,
            tower=tower.source if tower else None,
            tower_weights=tower.weights if tower else None,
            swapped=tower is not None,
            steps=steps,
            dropped=(*host.dropped, *_left_out(host, steps)),
            config=config,
            before=host.contract,
            after=after,
            image_token_id=host.config["image_token_id"],
            processor=internvl_text.described(checkpoint.folder, model_type),
            readers=dict(readers or {}),
            notes=(*host.notes, *swap_notes(tower, after), *_tile_notes(host.contract, after)),
        )


def _projector_dtype(host: Host, checkpoint: Checkpoint) -> Any:
    name = f"{host.root}{PROJECTOR}linear_1.weight"
    source = next((step.sources[0] for step in host.rest if step.name == name), None)
    if source is None:
        raise UserError(f"{checkpoint.folder}: tensor {name} is missing: is this the language model only?")
    return checkpoint.tensors[source].dtype


def _left_out(host: Host, steps: tuple[Step, ...]) -> list[Dropped]:
    """What a swap leaves out of the source."""
    used = {source for step in steps if step.operation != "tower" for source in step.sources}
    used |= {step.replaces for step in steps if step.replaces}
    old = {source: REPLACED for step in host.tower for source in step.sources}
    read = {source: "read features of another shape" for step in host.rest for source in step.sources}
    return [Dropped(name=name, reason=reason) for name, reason in {**old, **read}.items() if name not in used]


def _tile_notes(before: VisionContract, after: VisionContract) -> tuple[str, ...]:
    if before.tiles <= after.tiles:
        return ()
    return (
        f"the original cuts an image into up to {before.tiles} tiles of {before.tokens} tokens; now each image is one",
    )


INTERNVL = InternVL(
    spec=FamilySpec(
        name="internvl",
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
