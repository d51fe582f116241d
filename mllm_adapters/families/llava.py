"""LLaVA and LLaVA-Med: original layouts (haotian-liu/LLaVA, microsoft/LLaVA-Med) and the transformers layout.

Key names, vision contract and prompts after LLaVA c121f04 (llava/model/llava_arch.py,
llava/model/multimodal_encoder/clip_encoder.py, llava/conversation.py) and LLaVA-Med d406e3f.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, Field

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import Resize, TowerSpec, checked
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import build_config, read_fields, text_config, tower_config
from mllm_adapters.contract import FAMILY_KEY, Dropped, Family, FamilySpec, Plan, Target
from mllm_adapters.planning import (
    IMAGE_TOKEN,
    TOWER_PART,
    HostTower,
    after_swap,
    contract_of,
    dtype_name,
    external_tower,
    image_row,
    kept,
    refit_reader,
    swap_notes,
    tower_steps,
)
from mllm_adapters.processing import (
    check_placeholder,
    has_tokenizer,
    host_pixels,
    llava_processor,
    load_tokenizer,
    text_side,
    with_placeholder,
)

TOWER_PREFIX = "vision_tower.vision_model."
"""Prefix of tower keys that every transformers release since 4.37 reads."""

CLASS_EMBEDDING = "embeddings.class_embedding"

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

EMBEDDINGS = "language_model.model.embed_tokens.weight"
VOCABULARY_TENSORS = (EMBEDDINGS, "language_model.lm_head.weight")

CLASS_TOKEN = {"patch": False, "cls_patch": True, "default": False, "full": True}
"""``mm_vision_select_feature`` (original) or ``vision_feature_select_strategy`` -> class token among the features."""


class CommonFields(BaseModel):
    """What counts in a config.json of either layout."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    quantization_config: None = None


class OriginalFields(CommonFields):
    """What counts in an original config.json, with the original code's defaults and the values that are known here."""

    architectures: list[str]
    mm_vision_tower: str = Field(min_length=1)
    mm_projector_type: Literal["mlp2x_gelu"]
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: Literal["patch", "cls_patch"] = "patch"
    image_aspect_ratio: Literal["pad", "square"] | None = None
    mm_use_im_start_end: Literal[False] = False
    mm_use_im_patch_token: Literal[False] = False
    unfreeze_mm_vision_tower: bool | None = False
    tie_word_embeddings: bool = False


class NativeFields(CommonFields):
    """What counts in a config.json of the transformers layout, with the defaults of ``LlavaConfig``."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_token_index: int | None = None
    image_token_id: int | None = None

    @property
    def placeholder(self) -> int:
        """Id of the image placeholder, under its old or its new name."""
        return next((i for i in (self.image_token_index, self.image_token_id) if i is not None), 32000)


@dataclass(frozen=True)
class Llava(Family):
    """The LLaVA architecture under one family name.

    Attributes:
        spec: Names and module patterns.
        text_models: ``architectures[0]`` of the original layout -> transformers model_type of its LM.
        chat_template: Jinja template of the original conversation format.
        owns_native_layout: Whether an unmarked checkpoint in the transformers layout counts as this family.
        reads_trained_tower: Whether the original code, told that the tower was trained, takes it from the shards.
    """

    spec: FamilySpec
    text_models: Mapping[str, str]
    chat_template: str
    owns_native_layout: bool = False
    reads_trained_tower: bool = False

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` or None; model_type cannot tell, since both may say ``llava``."""
        if self._text_model(config) is not None and "mm_vision_tower" in config:
            return "original"
        native = config.get("model_type") == "llava" and "vision_config" in config and "text_config" in config
        mine = config.get(FAMILY_KEY, self.spec.name if self.owns_native_layout else None) == self.spec.name
        return "transformers" if native and mine else None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",  # noqa: ARG002 (a LLaVA's own layout is a LLaVA)
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to the transformers layout; see `Family.plan`."""
        if self.layout(checkpoint.config) == "original":
            return self._plan_original(checkpoint, tower, image_size)
        return self._plan_native(checkpoint, tower, image_size)

    def processor(self, plan: Plan) -> Any | None:
        """The LlavaProcessor of the planned checkpoint; None where the source has no tokenizer."""
        if plan.layout == "transformers":
            text = text_side(plan.source)
            if text is None:
                return None
            tokenizer, template, image_token = text
            check_placeholder(tokenizer, image_token, plan.image_token_id)
            return llava_processor(plan.after, tokenizer, template, image_token)
        tokenizer = load_tokenizer(plan.source)
        if tokenizer is None:
            return None
        with_placeholder(tokenizer, plan.image_token_id)
        return llava_processor(plan.after, tokenizer, self.chat_template)

    def _text_model(self, config: Mapping[str, Any]) -> str | None:
        names = config.get("architectures")
        return self.text_models.get(str(names[0])) if isinstance(names, list) and names else None

    def _plan_original(
        self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
    ) -> Plan:
        config = checkpoint.config
        where = f"{checkpoint.folder}/config.json"
        fields = read_fields(OriginalFields, config, where)
        names, dropped, inside = _sort_names(checkpoint)
        trained = self.reads_trained_tower and bool(fields.unfreeze_mm_vision_tower and inside)
        host = _original_tower(checkpoint, fields, inside=bool(inside), trained=trained, needed=tower is None)
        class_token = CLASS_TOKEN[fields.mm_vision_select_feature]
        before = contract_of(host.spec, fields.mm_vision_select_layer, class_token)
        after = after_swap(before, tower, image_size)

        embeddings = [checkpoint.tensors[names[name]] for name in VOCABULARY_TENSORS if name in names]
        vocabulary = max(header.shape[0] for header in embeddings)
        tokenizer = load_tokenizer(checkpoint.folder)
        image_token_id, rows = image_row(tokenizer, vocabulary)
        steps = [
            kept(checkpoint.tensors[source], name, rows if name in VOCABULARY_TENSORS else None)
            for name, source in names.items()
        ]
        steps, readers = refit_reader(steps, READER, before, after, checkpoint.folder)
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
                "dtype": dtype_name(embeddings[0].dtype),
                "vision_config": tower_config(new.spec if new else host.spec, after),
                "text_config": text_config(str(self._text_model(config)), config, rows, where),
                "vision_feature_layer": after.feature_layer,
                "vision_feature_select_strategy": "full" if after.class_token else "default",
                "projector_hidden_act": "gelu",
                "multimodal_projector_bias": True,
                "image_token_index": image_token_id,
                "image_seq_length": after.tokens,
                "tie_word_embeddings": fields.tie_word_embeddings,
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
        fields = read_fields(NativeFields, config, f"{checkpoint.folder}/config.json")
        prefix = _tower_prefix(checkpoint)
        old = [h for h in checkpoint.tensors.values() if h.name.startswith(prefix)]
        dtype = checkpoint.tensors[prefix + CLASS_EMBEDDING].dtype
        host = _native_tower(checkpoint, prefix)
        class_token = CLASS_TOKEN[fields.vision_feature_select_strategy]
        before = contract_of(host.spec, fields.vision_feature_layer, class_token)
        after = after_swap(before, tower, image_size)
        rest = [kept(h) for h in checkpoint.tensors.values() if not h.name.startswith(prefix)]
        weights = (s.name for s in rest if s.name.endswith(f"{READER}.weight"))
        reader = next(weights, READER).removesuffix(".weight")
        steps, readers = refit_reader(rest, reader, before, after, checkpoint.folder)
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            swapped=True,
            steps=(*steps, *tower_steps(tower, prefix, after, dtype)),
            dropped=tuple(Dropped(name=h.name, reason="replaced by the new tower") for h in old),
            config={
                **{key: value for key, value in config.items() if key != "auto_map"},
                FAMILY_KEY: self.spec.name,
                "vision_config": tower_config(tower.spec, after),
                "image_seq_length": after.tokens,
            },
            before=before,
            after=after,
            image_token_id=fields.placeholder,
            processor="the source's, with the new preprocessing"
            if has_tokenizer(checkpoint.folder)
            else None,
            readers=readers,
            notes=(*host.notes, *swap_notes(tower, after)),
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
    if EMBEDDINGS not in names:
        raise UserError(
            f"{checkpoint.folder} has no {EMBEDDINGS.removeprefix('language_model.')}: is it complete?"
        )
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


def _original_tower(
    checkpoint: Checkpoint, fields: OriginalFields, *, inside: bool, trained: bool, needed: bool
) -> HostTower:
    """The tower the original code would use: the one it names, unless it was trained and lies in the shards."""
    resize: Resize = "pad" if fields.image_aspect_ratio == "pad" else "crop"
    host = external_tower(fields.mm_vision_tower, checkpoint, resize, needed=needed and not inside)
    if trained:
        return replace(host, header=None, notes=("the host's own tower was trained and is in its shards",))
    if needed and host.header is None:
        note = f"the original code reads {host.name}, which is not on this machine: the tower in the shards is taken"
        return replace(host, notes=(*host.notes, note))
    return host


def _tower_prefix(checkpoint: Checkpoint) -> str:
    found = [n.removesuffix(CLASS_EMBEDDING) for n in checkpoint.tensors if n.endswith(CLASS_EMBEDDING)]
    if len(found) != 1 or "vision_tower." not in found[0]:
        raise UserError(
            f"{checkpoint.folder}: expected one CLIP vision tower under vision_tower, found {len(found)}: "
            "only CLIP towers can be replaced in this layout"
        )
    return found[0]


def _native_tower(checkpoint: Checkpoint, prefix: str) -> HostTower:
    """Geometry of the tower in a transformers checkpoint, from its configuration and image processor."""
    where = checkpoint.folder / "config.json"
    vision = build_config(checkpoint.config, str(where)).vision_config.to_dict()
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    geometry = {
        "width": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_width": vision["intermediate_size"],
        "patch_size": vision["patch_size"],
        "activation": vision["hidden_act"],
    }
    spec = checked(TowerSpec, {**geometry, **pixels.model_dump()}, where)
    positions = checkpoint.tensors[f"{prefix}embeddings.position_embedding.weight"]
    if positions.shape != (spec.patches + 1, spec.width):
        raise UserError(
            f"{checkpoint.folder}: config.json describes a tower of {spec.grid}x{spec.grid} patches and width "
            f"{spec.width}, but {positions.name} has shape {list(positions.shape)}"
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
        parts={TOWER_PART: "the tower that mm_vision_tower names"},
    ),
    text_models={"LlavaLlamaForCausalLM": "llama"},
    chat_template=_template("vicuna_v1.jinja"),
    owns_native_layout=True,
    reads_trained_tower=True,
)

LLAVA_MED = Llava(
    spec=replace(
        LLAVA.spec, name="llava-med", title="LLaVA-Med", hub_id="microsoft/llava-med-v1.5-mistral-7b"
    ),
    text_models={"LlavaMistralForCausalLM": "mistral"},
    chat_template=_template("mistral_instruct.jinja"),
)
