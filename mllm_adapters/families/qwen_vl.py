"""Qwen-VL and Qwen-VL-Chat (2023): the original layout, and ours.

Key names, vision contract, tokenizer and prompt after modeling_qwen.py, visual.py, tokenization_qwen.py and
qwen_generation_utils.py of Qwen/Qwen-VL-Chat.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from math import isqrt
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD
from mllm_adapters.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.configs import read_fields, text_config, tower_config
from mllm_adapters.contract import FAMILY_KEY, Dropped, Family, FamilySpec, Plan, Step, Target, VisionContract
from mllm_adapters.planning import after_swap, dtype_name, kept, refit_reader, swap_notes, tower_steps
from mllm_adapters.processing import (
    check_placeholder,
    has_tokenizer,
    host_pixels,
    load_tokenizer,
    text_side,
)

MODEL_TYPE = "mgll_qwen_vl"
TOWER_PREFIX = "vision_tower."
SOURCE_TOWER = re.compile(r"transformer\.visual\.(conv1|positional_embedding|ln_pre|transformer)\b.*")
READER = "attn_pool.kv_proj"
QUERY = "attn_pool.query"
EMBEDDINGS = "language_model.model.embed_tokens.weight"

SWAPPED_LAYER = -2
"""Hidden layer of a CLIP tower that the resampler reads; the original tower is read at its end."""

_LAYER, _BLOCK = r"transformer\.h\.(\d+)\.", r"transformer\.visual\.transformer\.resblocks\.(\d+)\."
_TO_LAYER, _TO_BLOCK = r"language_model.model.layers.\1.", r"vision_tower.layers.\1."

NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(source), target)
    for source, target in (
        (r"transformer\.wte\.weight", EMBEDDINGS),
        (r"transformer\.ln_f\.weight", "language_model.model.norm.weight"),
        (r"lm_head\.weight", "language_model.lm_head.weight"),
        (_LAYER + r"ln_1\.weight", _TO_LAYER + "input_layernorm.weight"),
        (_LAYER + r"ln_2\.weight", _TO_LAYER + "post_attention_layernorm.weight"),
        (_LAYER + r"attn\.c_attn\.(weight|bias)", _TO_LAYER + r"self_attn.{part}_proj.\2"),
        (_LAYER + r"attn\.c_proj\.weight", _TO_LAYER + "self_attn.o_proj.weight"),
        # The original computes w1(x) * silu(w2(x)): w2 is the gate.
        (_LAYER + r"mlp\.w1\.weight", _TO_LAYER + "mlp.up_proj.weight"),
        (_LAYER + r"mlp\.w2\.weight", _TO_LAYER + "mlp.gate_proj.weight"),
        (_LAYER + r"mlp\.c_proj\.weight", _TO_LAYER + "mlp.down_proj.weight"),
        (r"transformer\.visual\.conv1\.weight", "vision_tower.patch_embedding.weight"),
        (r"transformer\.visual\.positional_embedding", "vision_tower.position_embedding.weight"),
        (r"transformer\.visual\.ln_pre\.(weight|bias)", r"vision_tower.ln_pre.\1"),
        (_BLOCK + r"(ln_[12])\.(weight|bias)", _TO_BLOCK + r"\2.\3"),
        (_BLOCK + r"attn\.in_proj\.(weight|bias)", _TO_BLOCK + r"attn.{part}_proj.\2"),
        (_BLOCK + r"attn\.out_proj\.(weight|bias)", _TO_BLOCK + r"attn.out_proj.\2"),
        (_BLOCK + r"mlp\.c_fc\.(weight|bias)", _TO_BLOCK + r"fc1.\2"),
        (_BLOCK + r"mlp\.c_proj\.(weight|bias)", _TO_BLOCK + r"fc2.\2"),
        (r"transformer\.visual\.attn_pool\.attn\.in_proj_(weight|bias)", r"attn_pool.attn.{part}_proj.\1"),
        (r"transformer\.visual\.(attn_pool\.(?:query|pos_embed|kv_proj\.weight))", r"\1"),
        (r"transformer\.visual\.(attn_pool\.(?:ln_q|ln_kv|attn\.out_proj)\.(?:weight|bias))", r"\1"),
        (r"transformer\.visual\.(ln_post\.(?:weight|bias)|proj)", r"attn_pool.\1"),
    )
)
"""Original name -> our name; ``{part}`` stands for q, k and v in turn, which the original keeps in one tensor."""

RECOMPUTED = re.compile(r".*(rotary_emb\.inv_freq|attn\.masked_bias|logn_tensor)")
"""Tables that some saved checkpoints hold, and that follow from the configuration."""

RANK_FILE = "qwen.tiktoken"
IMAGE_TOKEN = "<imgpad>"
EXTRAS = 205
"""Unnamed special tokens of the published tokenizer, ``<|extra_0|>`` to ``<|extra_204|>``."""
BEFORE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AFTER = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", IMAGE_TOKEN)
"""Special tokens: those before the extras, and those after them."""


class VisualFields(BaseModel):
    """What counts in the ``visual`` section of an original config.json."""

    heads: PositiveInt
    image_size: PositiveInt
    image_start_id: PositiveInt
    layers: PositiveInt
    mlp_ratio: float = Field(gt=0)
    n_queries: PositiveInt = 256
    output_dim: PositiveInt = Field(multiple_of=128)
    patch_size: PositiveInt
    width: PositiveInt

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder: it follows those of ``<img>`` and ``</img>``."""
        return self.image_start_id + 2


class OriginalFields(BaseModel):
    """What counts in an original config.json, with the original code's defaults and the values that are known here."""

    visual: dict[str, Any]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    kv_channels: PositiveInt = 128
    layer_norm_epsilon: float = 1e-6
    max_position_embeddings: PositiveInt = 8192
    no_bias: Literal[True] = True
    num_attention_heads: PositiveInt
    rotary_emb_base: float = 10000
    rotary_pct: float = Field(default=1, ge=1, le=1)
    scale_attn_weights: Literal[True] = True
    seq_length: PositiveInt
    tie_word_embeddings: bool = False
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    @property
    def context(self) -> int:
        """Longest sequence for which the original is a plain Qwen2."""
        stretches = self.use_dynamic_ntk or self.use_logn_attn
        return self.seq_length if stretches else self.max_position_embeddings


class OwnFields(BaseModel):
    """What counts in a config.json of our layout."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int
    image_seq_length: PositiveInt
    image_token_id: int
    kv_projection: bool
    quantization_config: None = None


@dataclass(frozen=True)
class QwenVL(Family):
    """Qwen-VL of 2023 under its family name."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """``original``, ``transformers`` (ours) or None."""
        if config.get("model_type") == MODEL_TYPE:
            return "transformers"
        original = config.get("model_type") == "qwen" and self.refusal(config) is None
        return "original" if original else None

    def refusal(self, config: Mapping[str, Any]) -> str | None:
        """Why a first-generation Qwen checkpoint is not a Qwen-VL that can be read."""
        if config.get("model_type") != "qwen":
            return None
        take = "take Qwen/Qwen-VL or Qwen/Qwen-VL-Chat"
        if "audio" in config:
            return f"this is Qwen-Audio: it has an 'audio' section, expected 'visual' (a tower for images); {take}"
        if not isinstance(config.get("visual"), dict):
            return f"this is the text-only Qwen: it has no 'visual' section, so there is no tower to replace; {take}"
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            return f"its weights are quantised ({method}), expected float16, bfloat16 or float32; {take}, unquantised"
        return None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to our layout; see `Family.plan`."""
        if target != "own":
            raise UserError(
                f"{checkpoint.folder}: Qwen-VL cannot be written as a LLaVA: between tower and language model it has "
                "a resampler with learned queries, and a LLaVA has an MLP there; use --layout own"
            )
        if self.layout(checkpoint.config) == "original":
            return self._plan_original(checkpoint, tower, image_size)
        return self._plan_own(checkpoint, tower, image_size)

    def processor(self, plan: Plan) -> Any | None:
        """The QwenVLProcessor of the planned checkpoint; None where the source has no tokenizer."""
        from mgll_encoder.preprocess import image_processor
        from mllm_adapters.modeling.qwen_vl import QwenVLProcessor

        text = self._text_side(plan)
        if text is None:
            return None
        tokenizer, template = text
        check_placeholder(tokenizer, IMAGE_TOKEN, plan.image_token_id)
        return QwenVLProcessor(
            image_processor=image_processor(plan.after),
            tokenizer=tokenizer,
            image_seq_length=plan.after.tokens,
            image_token=IMAGE_TOKEN,
            chat_template=template,
        )

    def _text_side(self, plan: Plan) -> tuple[Any, str | None] | None:
        """Tokenizer and chat template."""
        if plan.layout == "transformers":
            text = text_side(plan.source)
            return None if text is None else text[:2]
        context = plan.config["text_config"]["max_position_embeddings"]
        tokenizer = _tokenizer(plan.source, plan.image_token_id, context)
        template = files(__package__).joinpath("templates", "qwen_chatml.jinja").read_text(encoding="utf-8")
        return None if tokenizer is None else (tokenizer, template)

    def _plan_original(
        self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
    ) -> Plan:
        where = f"{checkpoint.folder}/config.json"
        fields = read_fields(OriginalFields, checkpoint.config, where)
        visual = read_fields(VisualFields, fields.visual, f"{where}, section visual")
        _check_widths(fields, visual, where)
        steps, dropped = _original_steps(checkpoint, visual)
        before = _original_contract(visual)
        after = _after(before, tower, image_size)
        steps, readers = _read_anew(steps, before, after, checkpoint.folder)
        rows, dtype = _embeddings(checkpoint, steps, visual.image_token_id)
        vision: dict[str, Any] = _original_vision(visual)
        if tower is not None:
            old = [step for step in steps if step.name.startswith(TOWER_PREFIX)]
            replaced = dict.fromkeys(source for step in old for source in step.sources)
            dropped += [Dropped(name=name, reason="replaced by the new tower") for name in replaced]
            steps = [step for step in steps if not step.name.startswith(TOWER_PREFIX)]
            steps += tower_steps(tower, TOWER_PREFIX, after, dtype)
            vision = tower_config(tower.spec, after)
        specials = _special_ids(checkpoint.folder, visual.image_token_id)
        return Plan(
            family=self.spec.name,
            layout="original",
            source=checkpoint.folder,
            tower=tower.source if tower else None,
            swapped=tower is not None,
            steps=tuple(steps),
            dropped=tuple(dropped),
            config={
                "architectures": ["QwenVLForConditionalGeneration"],
                "model_type": MODEL_TYPE,
                FAMILY_KEY: self.spec.name,
                "dtype": dtype_name(dtype),
                "vision_config": vision,
                "text_config": _language_model(checkpoint.config, fields, rows, where),
                "vision_feature_layer": after.feature_layer,
                "image_seq_length": after.tokens,
                "resampler_heads": visual.output_dim // 128,
                "kv_projection": any(step.name == f"{READER}.weight" for step in steps),
                "image_token_id": visual.image_token_id,
                "tie_word_embeddings": fields.tie_word_embeddings,
            },
            generation={"eos_token_id": [specials[0], specials[2]], "pad_token_id": specials[0]} if specials else {},
            before=before,
            after=after,
            image_token_id=visual.image_token_id,
            processor=_processor_note(checkpoint.folder),
            readers=readers,
            notes=(
                *swap_notes(tower, after),
                f"sequences of more than {fields.context} tokens are refused: beyond them the original stretches its "
                "rotary base and scales its attention, which transformers' Qwen2 does not",
                f"the image placeholder is {IMAGE_TOKEN} = {visual.image_token_id}, {after.tokens} per image; file "
                "names between <img> and </img> are no longer read",
            ),
        )

    def _plan_own(self, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None) -> Plan:
        if tower is None:
            raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
        fields = read_fields(OwnFields, checkpoint.config, f"{checkpoint.folder}/config.json")
        before, notes = _own_contract(checkpoint, fields)
        after = _after(before, tower, image_size)
        headers = checkpoint.tensors.values()
        steps = [kept(header) for header in headers if not header.name.startswith(TOWER_PREFIX)]
        steps, readers = _read_anew(steps, before, after, checkpoint.folder)
        dtype = checkpoint.tensors[QUERY].dtype
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            swapped=True,
            steps=(*steps, *tower_steps(tower, TOWER_PREFIX, after, dtype)),
            dropped=tuple(
                Dropped(name=header.name, reason="replaced by the new tower")
                for header in headers
                if header.name.startswith(TOWER_PREFIX)
            ),
            config={
                **checkpoint.config,
                FAMILY_KEY: self.spec.name,
                "vision_config": tower_config(tower.spec, after),
                "vision_feature_layer": after.feature_layer,
                "kv_projection": any(step.name == f"{READER}.weight" for step in steps),
            },
            before=before,
            after=after,
            image_token_id=fields.image_token_id,
            processor="the source's, with the new preprocessing" if has_tokenizer(checkpoint.folder) else None,
            readers=readers,
            notes=(*notes, *swap_notes(tower, after)),
        )


def _original_steps(checkpoint: Checkpoint, visual: VisualFields) -> tuple[list[Step], list[Dropped]]:
    """Steps that bring the original's tensors under our names, and what is left out."""
    steps: list[Step] = []
    dropped: list[Dropped] = []
    for header in checkpoint.tensors.values():
        if RECOMPUTED.fullmatch(header.name):
            dropped.append(Dropped(name=header.name, reason="follows from config.json"))
            continue
        target = next((match.expand(to) for of, to in NAMES if (match := of.fullmatch(header.name))), None)
        if target is None:
            raise UserError(
                f"{checkpoint.folder}: tensor {header.name} is not part of a Qwen-VL checkpoint: if it is an adapter, "
                "merge it into the model first"
            )
        # The tower keeps query, key and value of each head together; elsewhere all queries come first.
        groups = visual.heads if target.startswith(TOWER_PREFIX) else 1
        steps += _parts(header, target, groups) if "{part}" in target else [kept(header, target)]
    found = {step.name for step in steps}
    for name, lacks in ((EMBEDDINGS, "language model"), (QUERY, "resampler")):
        if name not in found:
            raise UserError(f"{checkpoint.folder} has no {lacks} ({name} is not in its weights): is it complete?")
    return steps, dropped


def _parts(header: TensorHeader, target: str, groups: int) -> list[Step]:
    """Query, key and value of a fused projection."""
    shape = (header.shape[0] // 3, *header.shape[1:])
    return [
        Step(
            name=target.format(part=part),
            dtype=dtype_name(header.dtype),
            shape=shape,
            operation="slice",
            sources=(header.name,),
            arguments={"groups": groups, "units": 3, "start": start, "stop": start + 1},
        )
        for start, part in enumerate("qkv")
    ]


def _original_contract(visual: VisualFields) -> VisionContract:
    return VisionContract(
        width=visual.width,
        image_size=visual.image_size,
        patch_size=visual.patch_size,
        tokens=visual.n_queries,
        feature_layer=-1,
        class_token=False,
        activation="gelu",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize="squash",
    )


def _own_contract(checkpoint: Checkpoint, fields: OwnFields) -> tuple[VisionContract, tuple[str, ...]]:
    """The vision contract of a checkpoint in our layout, and what had to be assumed."""
    vision = fields.vision_config
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    contract = VisionContract(
        width=vision["hidden_size"],
        patch_size=vision["patch_size"],
        tokens=fields.image_seq_length,
        feature_layer=fields.vision_feature_layer,
        class_token=False,
        activation=vision.get("hidden_act", "gelu"),
        **pixels.model_dump(),
    )
    return contract, notes


def _after(before: VisionContract, tower: TowerHeader | None, image_size: int | None) -> VisionContract:
    """The contract after a swap; the number of queries is the number of tokens, whatever the grid."""
    read = before.model_copy(update={"feature_layer": SWAPPED_LAYER}) if tower else before
    return after_swap(read, tower, image_size, tokens=lambda _: before.tokens)


def _read_anew(
    steps: list[Step], before: VisionContract, after: VisionContract, where: Path
) -> tuple[list[Step], dict[str, str]]:
    """Re-initialise the reader if the features' width changes; add it where the original needed none."""
    if any(step.name == f"{READER}.weight" for step in steps):
        return refit_reader(steps, READER, before, after, where)
    query = next(step for step in steps if step.name == QUERY)
    width = query.shape[1]
    if before.width != width:
        raise UserError(
            f"{where}: tensor {READER}.weight is missing, but the tower gives features of width {before.width} and "
            f"the resampler takes {width}: is it complete?"
        )
    if after.width == width:
        return steps, {READER: f"none: features and language model are both {width} wide"}
    added = Step(name=f"{READER}.weight", dtype=query.dtype, shape=(width, after.width), operation="reinit")
    text = f"added, at random: the original needs none ({width} -> {after.width} wide): retrain the projector"
    return [*steps, added], {READER: text}


def _embeddings(checkpoint: Checkpoint, steps: list[Step], image_token_id: int) -> tuple[int, Any]:
    """Rows and dtype of the embedding, which has one for the placeholder."""
    (source,) = next(step.sources for step in steps if step.name == EMBEDDINGS)
    header = checkpoint.tensors[source]
    if image_token_id >= header.shape[0]:
        raise UserError(
            f"{checkpoint.folder}/config.json: visual.image_start_id is {image_token_id - 2}, but {source} has only "
            f"{header.shape[0]} rows: expected at least {image_token_id + 1}; config.json and weights do not belong "
            "together"
        )
    return header.shape[0], header.dtype


def _check_widths(fields: OriginalFields, visual: VisualFields, where: str) -> None:
    """Refuse configurations for which the original code has no model either."""
    for name, found, expected in (
        ("visual.output_dim", visual.output_dim, fields.hidden_size),
        ("kv_channels x num_attention_heads", fields.kv_channels * fields.num_attention_heads, fields.hidden_size),
        ("visual.n_queries", visual.n_queries, isqrt(visual.n_queries) ** 2),
        ("intermediate_size", fields.intermediate_size, fields.intermediate_size // 2 * 2),
        ("visual.width", visual.width, visual.width // visual.heads * visual.heads),
    ):
        if found != expected:
            raise UserError(f"{where}: {name} is {found}, expected {expected}: this is no Qwen-VL that can be read")


def _original_vision(visual: VisualFields) -> dict[str, Any]:
    """``vision_config`` of the original tower."""
    from mllm_adapters.modeling.qwen_vl import QwenVisionConfig

    return QwenVisionConfig(
        hidden_size=visual.width,
        intermediate_size=int(visual.width * visual.mlp_ratio),
        num_hidden_layers=visual.layers,
        num_attention_heads=visual.heads,
        image_size=visual.image_size,
        patch_size=visual.patch_size,
    ).to_dict()


def _language_model(config: Mapping[str, Any], fields: OriginalFields, rows: int, where: str) -> dict[str, Any]:
    """``text_config``: the Qwen2 that equals the original's language model within its context."""
    settings = {
        **config,
        "intermediate_size": fields.intermediate_size // 2,  # the original splits it between its two branches
        "num_key_value_heads": fields.num_attention_heads,
        "rms_norm_eps": fields.layer_norm_epsilon,
        "rope_theta": fields.rotary_emb_base,
        "max_position_embeddings": fields.context,
    }
    return text_config("qwen2", settings, rows, where)


def _processor_note(folder: Path) -> str | None:
    if (folder / RANK_FILE).is_file():
        return f"QwenVLProcessor with a fast tokenizer made of {RANK_FILE}"
    return "QwenVLProcessor with the source's tokenizer" if has_tokenizer(folder) else None


def _special_ids(folder: Path, image_token_id: int) -> range | None:
    """Ids of the special tokens, of which ``BEFORE`` come first; None where there is no rank file."""
    if not (folder / RANK_FILE).is_file():
        return None
    from mllm_adapters.ranks import read_ranks

    return _specials_after(len(read_ranks(folder / RANK_FILE)), folder, image_token_id)


def _specials_after(ranks: int, folder: Path, image_token_id: int) -> range:
    extras = image_token_id + 1 - ranks - len(BEFORE) - len(AFTER)
    if not 0 <= extras <= EXTRAS:
        expected = image_token_id + 1 - EXTRAS - len(BEFORE) - len(AFTER)
        raise UserError(
            f"{folder / RANK_FILE} has {ranks} tokens, but visual.image_start_id in config.json is "
            f"{image_token_id - 2}: expected {expected} tokens; download it again"
        )
    return range(ranks, image_token_id + 1)


def _tokenizer(folder: Path, image_token_id: int, context: int) -> Any | None:
    """The fast tokenizer that equals the published one, or the one that the folder has besides."""
    if not (folder / RANK_FILE).is_file():
        return load_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from mllm_adapters.ranks import rank_tokenizer, read_ranks

    ranks = read_ranks(folder / RANK_FILE)
    ids = _specials_after(len(ranks), folder, image_token_id)
    extras = [f"<|extra_{i}|>" for i in range(len(ids) - len(BEFORE) - len(AFTER))]
    return PreTrainedTokenizerFast(
        tokenizer_object=rank_tokenizer(ranks, PRETOKENIZE_REGEX, [*BEFORE, *extras, *AFTER]),
        eos_token=BEFORE[0],
        pad_token=BEFORE[0],
        additional_special_tokens=[*BEFORE[1:], *AFTER],
        padding_side="left",
        model_max_length=context,
    )


QWEN_VL = QwenVL(
    spec=FamilySpec(
        name="qwen-vl",
        title="Qwen-VL",
        hub_id="Qwen/Qwen-VL-Chat",
        tower=r"vision_tower\.",
        projector=r"attn_pool\.",
        language_model=r"language_model\.",
    )
)
