"""Mini-Gemini (MGM) on LLaMA: the original layout (dvlab-research/MGM), under its old and its new name, and ours.

After MGM 769820c (mgm/model/mgm_arch.py, mgm/conversation.py) and, for the older name, c88592e (minigemini/).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError
from mgll_encoder.tower.spec import PixelRule
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import read_fields, text_config, tower_config
from mllm_adapters.core.contract import ConnectorLayer, FamilySpec, Plan, VisionContract
from mllm_adapters.core.fates import ProcessorFate
from mllm_adapters.core.host_tower import TOWER_PART, HostTower
from mllm_adapters.core.planning import (
    IMAGE_TOKEN,
    contract_of,
    copied,
    dtype_name,
    extended,
    growth,
    image_row,
    reinitialized,
)
from mllm_adapters.core.processing import (
    check_placeholder,
    load_tokenizer,
    processor_fate,
    text_side,
    with_placeholder,
)
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Connected, Host, PlanRequest, Swap
from mllm_adapters.families.mini_gemini.convnext import STRIDE
from mllm_adapters.families.mini_gemini.original import (
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

MODEL_TYPE = "mgll_mini_gemini"

ARCHITECTURES = ("MGMLlamaForCausalLM", "MiniGeminiLlamaForCausalLM")
MODEL_TYPES = ("mgm", "mini_gemini")

CONNECTORS = ("model.vlm_uni_query_projector.0", "model.vlm_uni_query_projector.1", "model.mm_projector.0")
"""The connector layers of the low-resolution tower: the queries of the mining and, after it, the projector."""

MINED = "model.vlm_uni_val_projector.1"
"""The output layer of the mining, whose result is added to the low-resolution tower's features."""


@dataclass(frozen=True)
class MiniGemini(PlannedFamily):
    """Mini-Gemini.

    Attributes:
        spec: Names and module patterns.
        chat_template: Jinja template of the original conversation format.
    """

    spec: FamilySpec
    chat_template: str

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``original``, ``transformers`` (ours) or None."""
        if config.get("model_type") == MODEL_TYPE:
            return "transformers"
        named = config.get("model_type") in MODEL_TYPES and _architecture(config) in (*ARCHITECTURES, "")
        known = named or _architecture(config) in ARCHITECTURES
        return "original" if known else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """See `PlannedFamily.host`."""
        if self.layout(checkpoint.config) == "original":
            return self._original(checkpoint, request)
        return _own(checkpoint)

    def after(self, host: Host, request: PlanRequest) -> VisionContract:
        """See `PlannedFamily.after`: every patch of a view gets the same number of high-resolution cells."""
        after = super().after(host, request)
        cells = host.config["image_size_aux"] // STRIDE // host.config.get("image_grid", 1)
        if cells % after.grid:
            near = sorted(
                (g for g in range(1, cells + 1) if cells % g == 0), key=lambda g: abs(g - after.grid)
            )[:2]
            sizes = " or ".join(str(g * after.patch_size) for g in sorted(near))
            raise InvalidArgumentError(
                f"`image_size={after.image_size}` makes {after.grid}x{after.grid} patches, among which the "
                f"{cells}x{cells} high-resolution cells do not divide: try {sizes}"
            )
        return after

    def connect(self, swap: Swap) -> Connected:
        """See `PlannedFamily.connect`; the mined features get the same width as the tower's."""
        found = super().connect(swap)
        old, new = swap.host.before.width, swap.after.width
        if old == new:
            return found
        made = [
            reinitialized(step, (new, *step.shape[1:])) if step.name.startswith(f"{MINED}.") else step
            for step in found.steps
        ]
        note = (
            f"{MINED} is re-initialized, too: its output is added to the tower's features, which are now "
            f"{new} wide, not {old}; the keys of the mining (vlm_uni_aux_projector) are kept"
        )
        return replace(found, steps=made, notes=(note,))

    def adapted(self, swap: Swap) -> Mapping[str, Any]:
        """See `PlannedFamily.adapted`."""
        return {"image_seq_length": swap.after.tokens * swap.host.tiles, "low_resolution_antialias": True}

    def remarks(self, swap: Swap) -> tuple[str, ...]:
        """See `PlannedFamily.remarks`."""
        host, after = swap.host, swap.after
        grid, whole, views = host.config.get("image_grid", 1), host.config.get("image_global"), host.tiles
        notes = []
        if swap.request.tower is not None:
            notes.append(
                f"the high-resolution tower is kept; it reads the {host.config['image_size_aux']} px image "
                f"made by the new tower's rule, and the new tower a {after.image_size} px view of it "
                "(bicubic with antialiasing)"
            )
        if views > 1:
            notes.append(
                f"a picture is {grid}x{grid} tiles{' and the whole' if whole else ''}: {views} views of "
                f"{after.tokens} tokens, {views * after.tokens} in all"
            )
        return tuple(notes)

    def processor(self, plan: Plan) -> Any | None:
        """Return the MiniGeminiProcessor of the planned checkpoint; None if the source has no tokenizer."""
        from mllm_adapters.families.mini_gemini.modeling import MiniGeminiProcessor

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
        """Return the image processor for high-resolution images; the model makes the low-resolution views."""
        from mgll_encoder.tower.preprocess import image_processor

        return image_processor(plan.after.model_copy(update={"image_size": plan.config["image_size_aux"]}))

    def connector_layers(self, plan: Plan) -> tuple[ConnectorLayer, ...]:  # noqa: ARG002 (always the same)
        """Return the queries of the mining, and the projector, which reads the sum of features and mined features."""
        norm, queries, projector = CONNECTORS
        return ConnectorLayer(queries, at=norm), ConnectorLayer(projector, at=norm, adds=MINED)

    def pixel_rule(self, contract: VisionContract, config: Mapping[str, Any]) -> PixelRule:
        """See `Family.pixel_rule`: the model makes its low-resolution views from the high-resolution image."""
        return contract.model_copy(update={"image_size": config["image_size_aux"]})

    def encode_images(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (none is needed)
        """See `Family.encode_images`: without the high-resolution tower, which is kept."""
        model.model.vlm_uni_query_projector(model.model.queries(pixels))

    def _original(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        config, where = checkpoint.config, f"{checkpoint.folder}/config.json"
        fields = read_fields(OriginalFields, config, where)
        names = sort_names(checkpoint)
        tower = original_tower(
            checkpoint, fields, names.tower, request.image_size, replaced=request.tower is not None
        )
        aux = aux_tower(checkpoint, fields, names.aux)
        before = _contract(tower, fields.mm_vision_select_layer, fields, where)
        embeddings = [
            checkpoint.tensors[names.kept[name]] for name in VOCABULARY_TENSORS if name in names.kept
        ]
        vocabulary = max(header.shape[0] for header in embeddings)
        tokenizer = load_tokenizer(checkpoint.folder)
        image_token_id, rows = image_row(tokenizer, vocabulary)
        sources = {**names.kept, **{TOWER_PREFIX + key: source for key, source in names.tower.items()}}
        steps = [copied(checkpoint.tensors[source], name) for name, source in sources.items()]
        dtype = checkpoint.tensors[names.kept[f"{CONNECTORS[-1]}.weight"]].dtype
        mining = checkpoint.tensors["model.vlm_uni_aux_projector.1.weight"].shape
        return Host(
            layout="original",
            before=before,
            steps=[*extended(steps, VOCABULARY_TENSORS, rows), *aux.steps(dtype)],
            prefix=TOWER_PREFIX,
            dtype=dtype,
            config={
                "architectures": ["MiniGeminiForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                "dtype": dtype_name(embeddings[0].dtype),
                "vision_config": tower_config(tower.spec, before),
                "vision_config_aux": aux.config(fields, mining[1], checkpoint.folder),
                "text_config": text_config("llama", config, rows, where),
                "image_token_id": image_token_id,
                "image_seq_length": before.tokens * fields.views,
                "vision_feature_layer": before.feature_layer,
                "image_size_aux": fields.image_size_aux,
                "image_grid": fields.image_grid,
                "image_global": fields.image_global,
                "mining_width": mining[0],
                "low_resolution_antialias": False,
                "tie_word_embeddings": fields.tie_word_embeddings,
            },
            image_token_id=image_token_id,
            connector=CONNECTORS,
            last=(AUX_PREFIX,),
            tiles=fields.views,
            outside=tower,
            dropped=[*names.dropped, *aux.unused(names.aux.values(), fields.mm_vision_tower_aux)],
            processor=ProcessorFate(name="MiniGeminiProcessor", tokenizer=type(tokenizer).__name__)
            if tokenizer
            else None,
            notes=(*tower.notes, *aux.notes),
            remarks=(
                f"{growth(vocabulary, rows)}the image placeholder is {IMAGE_TOKEN} = {image_token_id}, not -200",
            ),
        )


def _own(checkpoint: Checkpoint) -> Host:
    """Read a checkpoint in our layout."""
    where = f"{checkpoint.folder}/config.json"
    fields = read_fields(NativeFields, checkpoint.config, where)
    tower, prefix = own_tower(checkpoint, fields)
    return Host(
        layout="transformers",
        before=_contract(tower, fields.vision_feature_layer, fields, where),
        steps=[copied(header) for header in checkpoint.tensors.values()],
        prefix=prefix,
        dtype=checkpoint.tensors[prefix + CLASS_EMBEDDING].dtype,
        config=checkpoint.config,
        image_token_id=fields.image_token_id,
        connector=CONNECTORS,
        tiles=fields.views,
        processor=processor_fate(checkpoint.folder),
        notes=tower.notes,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _contract(tower: HostTower, layer: int, fields: CommonFields, where: str) -> VisionContract:
    """Return the contract of all views together.

    Raises:
        UserError: the high-resolution cells cannot be divided evenly among the patches of a view.
    """
    if fields.image_global and fields.image_grid == 1:
        raise BadDataError(
            f"{where}: image_global is true, but image_grid is 1: expected 2 or more, as in MGM-7B-HD"
        )
    contract = contract_of(tower.spec, layer, class_token=False)
    cells, rest = divmod(fields.image_size_aux // STRIDE, fields.image_grid)
    if rest or cells % contract.grid:
        unit = STRIDE * fields.image_grid * contract.grid
        raise BadDataError(
            f"{where}: image_size_aux is {fields.image_size_aux}: expected a multiple of {unit}, so that the "
            f"high-resolution cells divide among {contract.grid}x{contract.grid} patches"
        )
    return contract.model_copy(update={"tiles": fields.views})


MINI_GEMINI = MiniGemini(
    spec=FamilySpec(
        name="mini-gemini",
        title="Mini-Gemini",
        hub_id="YanweiLi/MGM-7B",
        reads=("MGM / Mini-Gemini original on LLaMA, HD too; towers inside or in model_zoo/",),
        tower=r"vision_tower\.",
        projector=r"mm_projector\.|vlm_uni_\w+_projector\.",
        language_model=r"language_model\.|lm_head\.",
        not_llava="Mini-Gemini cannot be written as a LLaVA: it also encodes each image with a second tower",
        other=r"vision_tower_aux\.",
        parts={
            TOWER_PART: "the low-resolution tower that mm_vision_tower names",
            AUX_PART: "the high-resolution tower that mm_vision_tower_aux names",
        },
    ),
    chat_template=read_template("vicuna_v1.jinja"),
)
