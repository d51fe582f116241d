"""Mini-Gemini (MGM) on LLaMA: the original layout (dvlab-research/MGM), under its old and its new name, and ours.

After MGM 769820c (mgm/model/mgm_arch.py, mgm/conversation.py) and, for the older name, c88592e (minigemini/).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import PixelRule
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import read_fields, text_config, tower_config
from mllm_adapters.contract import Dropped, Family, FamilySpec, Plan, Reading, Step, Target, VisionContract
from mllm_adapters.convnext import CONVNEXT, STRIDE, convnext_config
from mllm_adapters.families import read_template
from mllm_adapters.families.mini_gemini_source import (
    AUX_PART,
    AUX_PREFIX,
    CLASS_EMBEDDING,
    TOWER_PREFIX,
    VOCABULARY_TENSORS,
    CommonFields,
    NativeFields,
    OriginalFields,
    aux_tower,
    original_tower,
    own_tower,
    sort_names,
)
from mllm_adapters.planning import (
    IMAGE_TOKEN,
    TOWER_PART,
    after_swap,
    anew,
    contract_of,
    dtype_name,
    growth,
    image_row,
    kept,
    refit_reader,
    replaced,
    swap_notes,
    tower_steps,
)
from mllm_adapters.processing import (
    check_placeholder,
    load_tokenizer,
    own_processor,
    text_side,
    with_placeholder,
)

MODEL_TYPE = "mgll_mini_gemini"

ARCHITECTURES = ("MGMLlamaForCausalLM", "MiniGeminiLlamaForCausalLM")
MODEL_TYPES = ("mgm", "mini_gemini")

READERS = ("model.vlm_uni_query_projector.0", "model.vlm_uni_query_projector.1", "model.mm_projector.0")
"""What reads the low-resolution tower's features: the queries of the mining and, after it, the projector."""

MINED = "model.vlm_uni_val_projector.1"
"""What is mined comes out of here, and is added to the low-resolution tower's features."""


@dataclass(frozen=True)
class MiniGemini(Family):
    """Mini-Gemini.

    Attributes:
        spec: Names and module patterns.
        chat_template: Jinja template of the original conversation format.
    """

    spec: FamilySpec
    chat_template: str

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` (ours) or None."""
        if config.get("model_type") == MODEL_TYPE:
            return "transformers"
        named = config.get("model_type") in MODEL_TYPES and _architecture(config) in (*ARCHITECTURES, "")
        known = named or _architecture(config) in ARCHITECTURES
        return "original" if known else None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",  # noqa: ARG002 (without the high-resolution branch it would be another model)
    ) -> Plan:
        """Plan a swap of the low-resolution tower or a conversion to our layout; see `Family.plan`."""
        if self.layout(checkpoint.config) == "original":
            return self._plan_original(checkpoint, tower, image_size)
        return self._plan_own(checkpoint, tower, image_size)

    def processor(self, plan: Plan) -> Any | None:
        """The MiniGeminiProcessor of the planned checkpoint; None where the source has no tokenizer."""
        from mllm_adapters.modeling.mini_gemini import MiniGeminiProcessor

        template: str | None = self.chat_template
        image_token = IMAGE_TOKEN
        if plan.layout == "transformers":
            text = text_side(plan.source)
            if text is None:
                return None
            tokenizer, template, image_token = text
            check_placeholder(tokenizer, image_token, plan.image_token_id)
        else:
            tokenizer = load_tokenizer(plan.source)
            if tokenizer is None:
                return None
            with_placeholder(tokenizer, plan.image_token_id)
        same = ("image_seq_length", "image_grid", "image_global", "low_resolution_antialias")
        return MiniGeminiProcessor(
            image_processor=self.image_processor(plan),
            tokenizer=tokenizer,
            image_size=plan.after.image_size,
            image_token=image_token,
            chat_template=template,
            **{name: plan.config[name] for name in same},
        )

    def image_processor(self, plan: Plan) -> Any:
        """What makes the high-resolution pictures; the model makes the low-resolution views of them."""
        from mgll_encoder.preprocess import image_processor

        return image_processor(plan.after.model_copy(update={"image_size": plan.config["image_size_aux"]}))

    def readings(self, plan: Plan) -> tuple[Reading, ...]:  # noqa: ARG002 (they are always the same)
        """The queries of the mining, and the projector, which reads the same features with what was mined added."""
        norm, queries, projector = READERS
        return Reading(queries, at=norm), Reading(projector, at=norm, adds=MINED)

    def picture(self, contract: VisionContract, config: Mapping[str, Any]) -> PixelRule:
        """See `Family.picture`: the model makes its low-resolution views of the high-resolution picture."""
        return contract.model_copy(update={"image_size": config["image_size_aux"]})

    def look(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (none is needed)
        """See `Family.look`: without the high-resolution tower, which stays."""
        model.model.vlm_uni_query_projector(model.model.queries(pixels))

    def _plan_original(
        self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
    ) -> Plan:
        config, where = checkpoint.config, f"{checkpoint.folder}/config.json"
        fields = read_fields(OriginalFields, config, where)
        names = sort_names(checkpoint)
        host = original_tower(checkpoint, fields, names.tower, image_size, replaced=tower is not None)
        aux = aux_tower(checkpoint, fields, names.aux)
        before = contract_of(host.spec, fields.mm_vision_select_layer, class_token=False)
        before, after = _contracts(before, tower, image_size, fields, where)

        embeddings = [
            checkpoint.tensors[names.kept[name]] for name in VOCABULARY_TENSORS if name in names.kept
        ]
        vocabulary = max(header.shape[0] for header in embeddings)
        tokenizer = load_tokenizer(checkpoint.folder)
        image_token_id, rows = image_row(tokenizer, vocabulary)
        steps = [
            kept(checkpoint.tensors[source], name, rows if name in VOCABULARY_TENSORS else None)
            for name, source in names.kept.items()
        ]
        steps, readers, notes = _refit(steps, before, after, checkpoint.folder)
        reader = checkpoint.tensors[names.kept[f"{READERS[-1]}.weight"]]
        new, dropped = tower or host.header, list(names.dropped)
        if new is None:
            steps += [
                kept(checkpoint.tensors[source], TOWER_PREFIX + key) for key, source in names.tower.items()
            ]
        else:
            steps += tower_steps(new, TOWER_PREFIX, after, reader.dtype)
            dropped += replaced(names.tower.values())
        used = {header.name for header in aux.tensors.values()}
        steps += [
            kept(header, AUX_PREFIX + CONVNEXT.place(key, aux.where).targets[0]).model_copy(
                update={"dtype": dtype_name(reader.dtype)}
            )
            for key, header in aux.tensors.items()
        ]
        dropped += [
            Dropped(name=name, reason=f"the original code reads {fields.mm_vision_tower_aux} instead")
            for name in names.aux.values()
            if name not in used
        ]
        sizes = convnext_config(aux.tensors, fields.image_size_aux, aux.where)
        mining = checkpoint.tensors["model.vlm_uni_aux_projector.1.weight"].shape
        if sum(sizes["hidden_sizes"]) != mining[1]:
            raise UserError(
                f"{checkpoint.folder}: model.vlm_uni_aux_projector.1.weight reads features of width {mining[1]}, but "
                f"{aux.where} gives {sum(sizes['hidden_sizes'])}: they do not belong together"
            )
        return Plan(
            family=self.spec.name,
            layout="original",
            source=checkpoint.folder,
            tower=new.source if new else None,
            tower_weights=new.weights if new else None,
            swapped=tower is not None,
            parts=dict(checkpoint.parts),
            steps=tuple(steps),
            dropped=tuple(dropped),
            config={
                "architectures": ["MiniGeminiForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                "dtype": dtype_name(embeddings[0].dtype),
                "vision_config": tower_config(new.spec if new else host.spec, after),
                "vision_config_aux": sizes,
                "text_config": text_config("llama", config, rows, where),
                "image_token_id": image_token_id,
                "image_seq_length": after.tokens * fields.views,
                "vision_feature_layer": after.feature_layer,
                "image_size_aux": fields.image_size_aux,
                "image_grid": fields.image_grid,
                "image_global": fields.image_global,
                "mining_width": mining[0],
                "low_resolution_antialias": tower is not None,
                "tie_word_embeddings": fields.tie_word_embeddings,
            },
            before=before,
            after=after,
            image_token_id=image_token_id,
            processor=f"MiniGeminiProcessor with the source's {type(tokenizer).__name__}"
            if tokenizer
            else None,
            readers=readers,
            notes=(
                *host.notes,
                *aux.notes,
                *notes,
                *_notes(tower, after, fields),
                f"{growth(vocabulary, rows)}the image placeholder is {IMAGE_TOKEN} = {image_token_id}, not -200",
            ),
        )

    def _plan_own(self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None) -> Plan:
        if tower is None:
            raise UserError(f"{checkpoint.folder} is in this project's layout already: nothing to convert")
        where = f"{checkpoint.folder}/config.json"
        fields = read_fields(NativeFields, checkpoint.config, where)
        host, prefix = own_tower(checkpoint, fields)
        before = contract_of(host.spec, fields.vision_feature_layer, class_token=False)
        before, after = _contracts(before, tower, image_size, fields, where)
        old = [name for name in checkpoint.tensors if name.startswith(prefix)]
        rest = [kept(header) for name, header in checkpoint.tensors.items() if name not in old]
        steps, readers, notes = _refit(rest, before, after, checkpoint.folder)
        dtype = checkpoint.tensors[prefix + CLASS_EMBEDDING].dtype
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            tower_weights=tower.weights,
            swapped=True,
            steps=(*steps, *tower_steps(tower, prefix, after, dtype)),
            dropped=replaced(old),
            config={
                **checkpoint.config,
                "vision_config": tower_config(tower.spec, after),
                "image_seq_length": after.tokens * fields.views,
                "low_resolution_antialias": True,
            },
            before=before,
            after=after,
            image_token_id=fields.image_token_id,
            processor=own_processor(checkpoint.folder),
            readers=readers,
            notes=(*host.notes, *notes, *_notes(tower, after, fields)),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _contracts(
    before: VisionContract,
    tower: TowerHeader | None,
    image_size: int | None,
    fields: CommonFields,
    where: str,
) -> tuple[VisionContract, VisionContract]:
    """The contracts of all views together; the high-resolution cells divide among the patches of each.

    Raises:
        UserError: they do not.
    """
    if fields.image_global and fields.image_grid == 1:
        raise UserError(
            f"{where}: image_global is true, but image_grid is 1: expected 2 or more, as in MGM-7B-HD"
        )
    cells, rest = divmod(fields.image_size_aux // STRIDE, fields.image_grid)
    if rest or cells % before.grid:
        unit = STRIDE * fields.image_grid * before.grid
        raise UserError(
            f"{where}: image_size_aux is {fields.image_size_aux}: expected a multiple of {unit}, so that the "
            f"high-resolution cells divide among {before.grid}x{before.grid} patches"
        )
    after = after_swap(before, tower, image_size)
    if cells % after.grid:
        near = sorted((g for g in range(1, cells + 1) if cells % g == 0), key=lambda g: abs(g - after.grid))[
            :2
        ]
        sizes = " or ".join(str(g * after.patch_size) for g in sorted(near))
        raise UserError(
            f"--image-size {after.image_size} makes {after.grid}x{after.grid} patches, among which the {cells}x{cells} "
            f"high-resolution cells do not divide: try {sizes}"
        )
    views = {"tiles": fields.views}
    return before.model_copy(update=views), after.model_copy(update=views)


def _refit(
    steps: Iterable[Step], before: VisionContract, after: VisionContract, where: Path
) -> tuple[list[Step], dict[str, str], tuple[str, ...]]:
    """What reads the tower, and what is added to its features, at the new width; the steps, the readers, notes."""
    readers: dict[str, str] = {}
    for reader in READERS:
        steps, fate = refit_reader(steps, reader, before, after, where)
        readers |= fate
    if before.width == after.width:
        return list(steps), readers, ()
    fresh = []
    for step in steps:
        if step.name == f"{MINED}.weight":
            step = anew(step, (after.width, step.shape[1]))
        elif step.name == f"{MINED}.bias":
            step = anew(step, (after.width,))
        fresh.append(step)
    note = (
        f"{MINED} is re-initialised too: what it gives is added to the tower's features, which are {after.width} wide "
        f"now, not {before.width}; the keys of the mining (vlm_uni_aux_projector) stay as they are"
    )
    return fresh, readers, (note,)


def _notes(tower: TowerHeader | None, after: VisionContract, fields: CommonFields) -> tuple[str, ...]:
    notes = list(swap_notes(tower, after))
    if tower is not None:
        notes.append(
            f"the high-resolution tower is kept; both see the same {fields.image_size_aux} px picture, made by the new "
            f"tower's rule, and the new one a {after.image_size} px view of it (bicubic with antialiasing)"
        )
    if fields.views > 1:
        notes.append(
            f"a picture is {fields.image_grid}x{fields.image_grid} tiles{' and the whole' * fields.image_global}: "
            f"{fields.views} views of {after.tokens} tokens, {fields.views * after.tokens} in all"
        )
    return tuple(notes)


MINI_GEMINI = MiniGemini(
    spec=FamilySpec(
        name="mini-gemini",
        title="Mini-Gemini",
        hub_id="YanweiLi/MGM-7B",
        reads=("MGM / Mini-Gemini original on LLaMA, HD too; towers inside or in model_zoo/",),
        tower=r"vision_tower\.",
        projector=r"mm_projector\.|vlm_uni_\w+_projector\.",
        language_model=r"language_model\.|lm_head\.",
        not_llava="Mini-Gemini cannot be written as a LLaVA: it sees each image through a second tower, too",
        other=r"vision_tower_aux\.",
        parts={
            TOWER_PART: "the low-resolution tower that mm_vision_tower names",
            AUX_PART: "the high-resolution tower that mm_vision_tower_aux names",
        },
    ),
    chat_template=read_template("vicuna_v1.jinja"),
)
