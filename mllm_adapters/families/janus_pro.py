"""Janus-Pro: original checkpoints (deepseek-ai/Janus), converted ones, and those that this project writes.

Key names, vision contract, token ids and prompt after deepseek-ai/Janus 1daa72f (janus/models/modeling_vlm.py,
clip_encoder.py, siglip_vit.py, vq_model.py, processing_vlm.py, janus/utils/conversation.py); names of the converted
layout after transformers (models/janus). Janus-1.3B is the same architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.filesize import decimal
from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.texts import read_json
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import tower_config
from mllm_adapters.contract import (
    FAMILY_KEY,
    Dropped,
    Family,
    FamilySpec,
    Plan,
    Reading,
    Step,
    Target,
    VisionContract,
)
from mllm_adapters.families import read_template
from mllm_adapters.families.janus_original import read_original
from mllm_adapters.families.janus_source import (
    EMBEDDINGS,
    GENERATION,
    IMAGE_BEGIN,
    IMAGE_END,
    PLACEHOLDER,
    READER,
    TOWER,
    JanusSource,
    janus_pixels,
    janus_tokenizer,
    read_converted,
)
from mllm_adapters.families.llava import Llava
from mllm_adapters.planning import REPLACED, after_swap, refit_reader, swap_notes, tower_steps
from mllm_adapters.processing import check_placeholder, llava_processor
from mllm_adapters.swap.streaming import nbytes

OWN_TYPE = "mgll_janus"

CLIP_LAYER = -2
"""Hidden layer that a CLIP tower is read at, as LLaVA does: the last one serves CLIP's class token only."""

LLAVA_TOWER = "vision_tower.vision_model."

LLAVA_NAMES: tuple[tuple[str, str], ...] = (
    ("model.aligner.fc1.", "multi_modal_projector.linear_1."),
    ("model.aligner.hidden_layers.0.", "multi_modal_projector.linear_2."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Beginning of a name in the Janus layout -> in the LLaVA layout."""


@dataclass(frozen=True)
class JanusPro(Family):
    """Janus-Pro and Janus.

    Attributes:
        spec: Names and module patterns, of both targets.
        llava: Reads what ``--layout llava`` has written.
    """

    spec: FamilySpec
    llava: Llava = field(init=False)

    def __post_init__(self) -> None:
        shaped = Llava(spec=self.spec, chat_template=_template(llava=True))
        object.__setattr__(self, "llava", shaped)

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` or None. DeepSeek-VL shares the model_type of the original layout."""
        kind = config.get("model_type")
        if kind == "multi_modality":
            return "original" if "gen_head_config" in config else None
        return "transformers" if kind in ("janus", OWN_TYPE) else self.llava.layout(config)

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to transformers' own Janus; see `Family.plan`."""
        if checkpoint.config.get("model_type") == "llava":
            return self.llava.plan(checkpoint, tower, image_size)
        layout = self.layout(checkpoint.config)
        if tower is None and layout == "transformers":
            raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
        if tower is None and target == "llava":
            raise UserError(
                f"{checkpoint.folder}: the layout llava is for a checkpoint with a new tower: give one"
            )
        source = read_original(checkpoint) if layout == "original" else read_converted(checkpoint)
        if tower is None:
            return self._plan(checkpoint, source, source.steps, source.dropped, source.stock_config)
        return (self._swap_own if target == "own" else self._swap_llava)(
            checkpoint, source, tower, image_size
        )

    def processor(self, plan: Plan) -> Any | None:
        """A JanusProcessor or, for the layout llava, a LlavaProcessor; None where the source has no tokenizer."""
        if read_json(plan.source / "config.json").get("model_type") == "llava":
            return self.llava.processor(plan)
        tokenizer = janus_tokenizer(plan.source)
        if tokenizer is None:
            return None
        check_placeholder(tokenizer, PLACEHOLDER, plan.image_token_id)
        if plan.config["model_type"] == "llava":
            return llava_processor(plan.after, tokenizer, self.llava.chat_template, PLACEHOLDER)
        from transformers import JanusProcessor

        from mllm_adapters.modeling.janus import MgllJanusProcessor

        kind = MgllJanusProcessor if plan.swapped else JanusProcessor
        return kind(
            image_processor=self.image_processor(plan),
            tokenizer=tokenizer,
            chat_template=_template(),
            num_image_tokens=plan.after.tokens,
        )

    def image_processor(self, plan: Plan) -> Any:
        """Janus' own image processor for its own tower, the new tower's after a swap."""
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

    def readings(self, plan: Plan) -> tuple[Reading, ...]:
        """The aligner's first layer, under its name in either layout."""
        (reading,) = super().readings(plan)
        was_llava = read_json(plan.source / "config.json").get("model_type") == "llava"
        return (reading if was_llava else replace(reading, host=READER),)

    def look(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (none is needed)
        """See `Family.look`; Janus' outer class has no ``get_image_features``."""
        model.base_model.get_image_features(pixel_values=pixels)

    def _swap_own(
        self, checkpoint: Checkpoint, source: JanusSource, tower: TowerHeader, image_size: int | None
    ) -> Plan:
        """Understanding through the new tower, image generation as before."""
        after = after_swap(_as_clip(source), tower, image_size)
        steps, dropped = _without(source, TOWER, REPLACED)
        dtype = checkpoint.tensors[steps_of(steps, f"{READER}.weight").sources[0]].dtype
        steps, readers = refit_reader(steps, READER, source.before, after, checkpoint.folder)
        config = {
            "architectures": ["MgllJanusForConditionalGeneration"],
            "model_type": OWN_TYPE,
            "vision_config": tower_config(tower.spec, after),
            "vq_config": source.vq_config,
            "text_config": source.text_config,
            "image_token_id": source.image_token_id,
            "boi_token_id": source.boi_token_id,
            "aligner_depth": source.aligner_depth,
            "aligner_hidden_act": source.aligner_act,
            **_selection(after),
        }
        side = source.vq_config["num_patches"]
        notes = (
            *_swap_notes(source, tower, after),
            f"image generation is kept: it draws {side}x{side} = {side**2} tokens per image, whatever the tower's grid",
        )
        steps += tower_steps(tower, TOWER, after, dtype)
        return self._plan(checkpoint, source, steps, dropped, config, tower, after, readers, notes)

    def _swap_llava(
        self, checkpoint: Checkpoint, source: JanusSource, tower: TowerHeader, image_size: int | None
    ) -> Plan:
        """The understanding path as a LLaVA."""
        if (source.aligner_depth, source.aligner_act) != (2, "gelu"):
            raise UserError(
                f"{checkpoint.folder}: its aligner has {source.aligner_depth} layers with {source.aligner_act}, but a "
                "LLaVA's projector two with gelu: take --layout own"
            )
        after = after_swap(_as_clip(source), tower, image_size)
        steps, dropped = _without(source, TOWER, REPLACED)
        generation = [step for step in steps if step.name.startswith(GENERATION)]
        dropped += _sources(generation, "image generation is no part of a LLaVA")
        dtype = checkpoint.tensors[steps_of(steps, f"{READER}.weight").sources[0]].dtype
        steps = [_as_llava(step) for step in steps if not step.name.startswith(GENERATION)]
        reader = LLAVA_NAMES[0][1].removesuffix(".")
        steps, readers = refit_reader(steps, reader, source.before, after, checkpoint.folder)
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_config": tower_config(tower.spec, after),
            "text_config": source.text_config,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "image_token_index": source.image_token_id,
            "image_seq_length": after.tokens,
            **_selection(after),
        }
        notes = (
            *_swap_notes(source, tower, after),
            f"image generation is left out: {len(generation)} tensors, {decimal(sum(map(nbytes, generation)))}",
        )
        steps += tower_steps(tower, LLAVA_TOWER, after, dtype)
        return self._plan(checkpoint, source, steps, dropped, config, tower, after, readers, notes)

    def _plan(
        self,
        checkpoint: Checkpoint,
        source: JanusSource,
        steps: list[Step],
        dropped: list[Dropped],
        config: dict[str, Any],
        tower: TowerHeader | None = None,
        after: VisionContract | None = None,
        readers: dict[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Plan:
        processor = None
        if source.tokenizer is not None:
            kind = "LlavaProcessor" if config["model_type"] == "llava" else "JanusProcessor"
            named = type(source.tokenizer).__name__
            processor = f"{kind} with the source's {named} and Janus-Pro's published chat template"
        return Plan(
            family=self.spec.name,
            layout=source.layout,
            source=checkpoint.folder,
            tower=tower.source if tower else None,
            tower_weights=tower.weights if tower else None,
            swapped=tower is not None,
            steps=tuple(steps),
            dropped=tuple(dropped),
            config={
                **config,
                FAMILY_KEY: self.spec.name,
                "dtype": steps_of(source.steps, EMBEDDINGS).dtype,
                "tie_word_embeddings": source.tied,
            },
            before=source.before,
            after=after or source.before,
            image_token_id=source.image_token_id,
            processor=processor,
            readers=readers or {},
            notes=(*source.notes, *notes),
        )


def steps_of(steps: list[Step], name: str) -> Step:
    """The step of this name."""
    return next(step for step in steps if step.name == name)


def _as_clip(source: JanusSource) -> VisionContract:
    """The host's contract with the layer at which a CLIP tower is read; a CLIP host keeps its own."""
    return source.before if source.clip else source.before.model_copy(update={"feature_layer": CLIP_LAYER})


def _selection(after: VisionContract) -> dict[str, Any]:
    return {
        "vision_feature_layer": after.feature_layer,
        "vision_feature_select_strategy": "full" if after.class_token else "default",
    }


def _swap_notes(source: JanusSource, tower: TowerHeader, after: VisionContract) -> tuple[str, ...]:
    if source.clip:
        return swap_notes(tower, after)
    read = (
        f"the new tower is read as LLaVA reads CLIP, patch tokens of hidden layer {after.feature_layer}; Janus reads "
        "its own after the last block and a final norm"
    )
    return (*swap_notes(tower, after), read)


def _without(source: JanusSource, prefix: str, reason: str) -> tuple[list[Step], list[Dropped]]:
    """The source's steps without those below a prefix, and what is dropped with these."""
    gone = [step for step in source.steps if step.name.startswith(prefix)]
    left = [step for step in source.steps if not step.name.startswith(prefix)]
    return left, [*source.dropped, *_sources(gone, reason)]


def _sources(steps: list[Step], reason: str) -> list[Dropped]:
    names = dict.fromkeys(name for step in steps for name in step.sources)
    return [Dropped(name=name, reason=reason) for name in names]


def _as_llava(step: Step) -> Step:
    before, after = next(row for row in LLAVA_NAMES if step.name.startswith(row[0]))
    operation = "rename" if step.operation == "keep" else step.operation
    name = after + step.name.removeprefix(before)
    return step.model_copy(update={"name": name, "operation": operation})


def _template(llava: bool = False) -> str:
    """Janus-Pro's chat template; JanusProcessor writes the tokens around an image, LlavaProcessor does not."""
    text = read_template("janus_pro.jinja")
    return text.replace(PLACEHOLDER, IMAGE_BEGIN + PLACEHOLDER + IMAGE_END) if llava else text


JANUS_PRO = JanusPro(
    spec=FamilySpec(
        name="janus-pro",
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
