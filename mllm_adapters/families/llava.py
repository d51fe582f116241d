"""LLaVA and LLaVA-Med: original layouts (haotian-liu/LLaVA, microsoft/LLaVA-Med) and the transformers layout.

Key names, vision contract and prompts after LLaVA c121f04 (llava/model/llava_arch.py,
llava/model/multimodal_encoder/clip_encoder.py, llava/conversation.py) and LLaVA-Med d406e3f.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import Resize, TowerSpec
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import FAMILY_KEY, Dropped, FamilySpec, Plan
from mllm_adapters.planning import (
    IMAGE_TOKEN,
    HostTower,
    after_swap,
    contract_of,
    external_tower,
    image_row,
    kept,
    refit_reader,
    swap_notes,
    text_config,
    tower_config,
    tower_steps,
)
from mllm_adapters.processing import (
    has_tokenizer,
    host_pixels,
    llava_processor,
    load_processor,
    load_tokenizer,
    with_placeholder,
)

TOWER_PREFIX = "vision_tower.vision_model."
"""Prefix of tower keys that every transformers release since 4.37 reads."""

READER = "multi_modal_projector.linear_1"

PROJECTOR_LAYERS = {"0": "linear_1", "2": "linear_2"}
"""Layers of ``mm_projector_type: mlp2x_gelu`` -> transformers' LlavaMultiModalProjector."""

ORIGINAL_TOWER = re.compile(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")
ORIGINAL_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(\d+)\.(weight|bias)")

ORIGINAL_NAMES: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r".*rotary_emb\.inv_freq"), None),
    (re.compile(r"model\.image_newline"), None),
    (re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)"), r"language_model.model.\1"),
    (re.compile(r"lm_head\.(.+)"), r"language_model.lm_head.\1"),
)
"""Original name -> transformers name; None for what is left out on purpose: the rotary table is recomputed from the
configuration, and ``image_newline`` belongs to the anyres modes, which are refused."""

VOCABULARY_TENSORS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")

CLASS_TOKEN = {"patch": False, "cls_patch": True, "default": False, "full": True}
"""``mm_vision_select_feature`` (original) or ``vision_feature_select_strategy`` -> class token among the features."""

SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "image_aspect_ratio": ("pad", "square", None),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
}
"""Fields of the original config.json and the values that this reader knows; the first is the default."""


@dataclass(frozen=True)
class Llava:
    """The LLaVA architecture under one family name.

    Attributes:
        spec: Names and module patterns.
        text_models: ``architectures[0]`` of the original layout -> transformers model_type of its LM.
        chat_template: Jinja template of the original conversation format.
        owns_native_layout: Whether an unmarked checkpoint in the transformers layout counts as this family.
    """

    spec: FamilySpec
    text_models: Mapping[str, str]
    chat_template: str
    owns_native_layout: bool = False

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` or None; model_type cannot tell, since both may say ``llava``."""
        architecture = (config.get("architectures") or [""])[0]
        if architecture in self.text_models and "mm_vision_tower" in config:
            return "original"
        native = config.get("model_type") == "llava" and "vision_config" in config and "text_config" in config
        mine = config.get(FAMILY_KEY, self.spec.name if self.owns_native_layout else None) == self.spec.name
        return "transformers" if native and mine else None

    def plan(
        self, checkpoint: Checkpoint, tower: TowerHeader | None = None, image_size: int | None = None
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to the transformers layout.

        Raises:
            UserError: the checkpoint is of a variant that is not supported, or lacks something.
        """
        if self.layout(checkpoint.config) == "original":
            return self._plan_original(checkpoint, tower, image_size)
        return self._plan_native(checkpoint, tower, image_size)

    def processor(self, plan: Plan) -> Any | None:
        """The LlavaProcessor of the planned checkpoint; None where the source has no tokenizer."""
        if plan.layout == "transformers":
            source = load_processor(plan.source)
            if source is None:
                return None
            return llava_processor(plan.after, source.tokenizer, source.chat_template, source.image_token)
        tokenizer = load_tokenizer(plan.source)
        if tokenizer is None:
            return None
        with_placeholder(tokenizer, plan.image_token_id)
        return llava_processor(plan.after, tokenizer, self.chat_template)

    def _plan_original(
        self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
    ) -> Plan:
        config = checkpoint.config
        _refuse_variants(checkpoint)
        names, dropped, inside = _sort_names(checkpoint)
        host = _original_tower(checkpoint, inside, needed=tower is None)
        feature = config.get("mm_vision_select_feature", "patch")
        before = contract_of(host.spec, config.get("mm_vision_select_layer", -2), CLASS_TOKEN[feature])
        after = after_swap(before, tower, image_size)

        vocabulary = int(config["vocab_size"])
        tokenizer = load_tokenizer(checkpoint.folder)
        image_token_id, rows = image_row(tokenizer, vocabulary)
        steps = [
            kept(checkpoint.tensors[source], name, rows if name in VOCABULARY_TENSORS else None)
            for name, source in names.items()
        ]
        steps, readers = refit_reader(steps, READER, before, after)
        dtype = checkpoint.tensors[names[f"{READER}.weight"]].dtype
        new = tower or host.header
        if new is None:
            steps += [kept(checkpoint.tensors[source], TOWER_PREFIX + key) for key, source in inside.items()]
        else:
            steps += tower_steps(new, TOWER_PREFIX, after, dtype)
            reason = "replaced by the new tower" if tower else f"the original code reads {host.name} instead"
            dropped += [Dropped(name=source, reason=reason) for source in inside.values()]

        added = (
            f"the vocabulary grows from {vocabulary} to {rows} rows (each new row is the mean of the old ones); "
            if rows > vocabulary
            else ""
        )
        return Plan(
            family=self.spec.name,
            layout="original",
            source=checkpoint.folder,
            tower=new.source if new else None,
            swapped=tower is not None,
            steps=tuple(steps),
            dropped=tuple(dropped),
            config={
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                FAMILY_KEY: self.spec.name,
                "dtype": steps[0].dtype,
                "vision_config": tower_config(new.spec if new else host.spec, after),
                "text_config": text_config(self.text_models[config["architectures"][0]], config, rows),
                "vision_feature_layer": after.feature_layer,
                "vision_feature_select_strategy": "full" if after.class_token else "default",
                "projector_hidden_act": "gelu",
                "multimodal_projector_bias": True,
                "image_token_index": image_token_id,
                "image_seq_length": after.tokens,
                "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            },
            before=before,
            after=after,
            image_token_id=image_token_id,
            processor=f"LlavaProcessor with the source's {type(tokenizer).__name__}" if tokenizer else None,
            readers=readers,
            notes=(
                *host.notes,
                *swap_notes(tower, after),
                f"{added}the image placeholder is {IMAGE_TOKEN} = {image_token_id}, not -200",
            ),
        )

    def _plan_native(self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None) -> Plan:
        config = checkpoint.config
        if tower is None:
            raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
        layer = config.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise UserError(
                f"{checkpoint.folder}/config.json: vision_feature_layer is {layer}, expected one number"
            )
        prefix = _tower_prefix(checkpoint)
        old = [h for h in checkpoint.tensors.values() if h.name.startswith(prefix)]
        host = _native_tower(checkpoint, prefix)
        strategy = config.get("vision_feature_select_strategy", "default")
        before = contract_of(host.spec, layer, CLASS_TOKEN[strategy])
        after = after_swap(before, tower, image_size)
        rest = [kept(h) for h in checkpoint.tensors.values() if not h.name.startswith(prefix)]
        reader = next(s.name for s in rest if s.name.endswith(f"{READER}.weight")).removesuffix(".weight")
        steps, readers = refit_reader(rest, reader, before, after)
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            swapped=True,
            steps=(*steps, *tower_steps(tower, prefix, after, old[0].dtype)),
            dropped=tuple(Dropped(name=h.name, reason="replaced by the new tower") for h in old),
            config={
                **config,
                FAMILY_KEY: self.spec.name,
                "vision_config": tower_config(tower.spec, after),
                "image_seq_length": after.tokens,
            },
            before=before,
            after=after,
            image_token_id=int(config.get("image_token_index", config.get("image_token_id", 32000))),
            processor="the source's, with the new preprocessing"
            if has_tokenizer(checkpoint.folder)
            else None,
            readers=readers,
            notes=(*host.notes, *swap_notes(tower, after)),
        )


def _refuse_variants(checkpoint: Checkpoint) -> None:
    for field, values in SUPPORTED.items():
        found = checkpoint.config.get(field, values[0])
        if found not in values:
            expected = " or ".join(repr(v) for v in values)
            raise UserError(
                f"{checkpoint.folder}/config.json: {field} is {found!r}, expected {expected}: "
                "this variant of LLaVA is not supported"
            )


def _sort_names(checkpoint: Checkpoint) -> tuple[dict[str, str], list[Dropped], dict[str, str]]:
    """Target name -> source name, what is left out, and tower key -> source name."""
    names: dict[str, str] = {}
    dropped: list[Dropped] = []
    inside: dict[str, str] = {}
    for source in checkpoint.tensors:
        if match := ORIGINAL_TOWER.fullmatch(source):
            if not source.endswith("position_ids"):
                inside[match[1]] = source
        elif match := ORIGINAL_PROJECTOR.fullmatch(source):
            if match[1] not in PROJECTOR_LAYERS:
                raise UserError(f"{checkpoint.folder}: projector layer {source} is not one of mlp2x_gelu")
            names[f"multi_modal_projector.{PROJECTOR_LAYERS[match[1]]}.{match[2]}"] = source
        else:
            target = _language_model_name(checkpoint, source)
            if target is None:
                dropped.append(Dropped(name=source, reason="not part of the transformers layout"))
            else:
                names[target] = source
    if f"{READER}.weight" not in names:
        raise UserError(
            f"{checkpoint.folder} has no projector, neither in its shards nor as mm_projector.bin: "
            "is this the language model only?"
        )
    return names, dropped, inside


def _language_model_name(checkpoint: Checkpoint, source: str) -> str | None:
    for pattern, target in ORIGINAL_NAMES:
        if match := pattern.fullmatch(source):
            return None if target is None else match.expand(target)
    raise UserError(f"{checkpoint.folder}: tensor {source} is not part of a LLaVA checkpoint")


def _original_tower(checkpoint: Checkpoint, inside: Mapping[str, str], *, needed: bool) -> HostTower:
    """The tower the original code would use: the one it names, unless it was trained and lies in the shards."""
    config = checkpoint.config
    trained = bool(config.get("unfreeze_mm_vision_tower")) and bool(inside)
    resize: Resize = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
    host = external_tower(config["mm_vision_tower"], checkpoint, resize, needed=needed and not inside)
    if trained:
        return HostTower(
            host.name, host.spec, None, ("the host's own tower was trained and is in its shards",)
        )
    return host


def _tower_prefix(checkpoint: Checkpoint) -> str:
    ending = "embeddings.class_embedding"
    found = [n.removesuffix(ending) for n in checkpoint.tensors if n.endswith(ending)]
    if len(found) != 1 or "vision_tower." not in found[0]:
        raise UserError(
            f"{checkpoint.folder}: expected one CLIP vision tower under vision_tower, found {len(found)}: "
            "only CLIP towers can be replaced in this layout"
        )
    return found[0]


def _native_tower(checkpoint: Checkpoint, prefix: str) -> HostTower:
    """Geometry of the tower in a transformers checkpoint, from its configuration and image processor."""
    from transformers import LlavaConfig

    declared: Any = LlavaConfig(vision_config=checkpoint.config["vision_config"])
    vision = declared.vision_config.to_dict()
    positions = checkpoint.tensors[f"{prefix}embeddings.position_embedding.weight"]
    grid = vision["image_size"] // vision["patch_size"]
    if positions.shape != (grid**2 + 1, vision["hidden_size"]):
        raise UserError(
            f"{checkpoint.folder}: config.json describes a tower of {grid}x{grid} patches and width "
            f"{vision['hidden_size']}, but {positions.name} has shape {list(positions.shape)}"
        )
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    spec = TowerSpec(
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        activation=vision["hidden_act"],
        **pixels.model_dump(),
    )
    return HostTower("vision_tower", spec, None, notes)


def _template(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


LLAVA = Llava(
    spec=FamilySpec(
        name="llava",
        title="LLaVA",
        hub_id="liuhaotian/llava-v1.5-7b",
        tower=r"vision_tower\.",
        projector=r"multi_modal_projector\.",
        language_model=r"language_model\.|lm_head\.",
        extra_weights=("mm_projector.bin",),
    ),
    text_models={"LlavaLlamaForCausalLM": "llama"},
    chat_template=_template("vicuna_v1.jinja"),
    owns_native_layout=True,
)

LLAVA_MED = Llava(
    spec=replace(
        LLAVA.spec, name="llava-med", title="LLaVA-Med", hub_id="microsoft/llava-med-v1.5-mistral-7b"
    ),
    text_models={"LlavaMistralForCausalLM": "mistral"},
    chat_template=_template("mistral_instruct.jinja"),
)
