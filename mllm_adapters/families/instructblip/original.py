"""InstructBLIP in LAVIS: Q-Former, EVA tower and language model in separate files, without config.json.

Key names and constants after salesforce/LAVIS 506965b: lavis/models/blip2_models/{blip2,blip2_vicuna_instruct,
blip2_t5_instruct,Qformer}.py, lavis/models/eva_vit.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, MismatchError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.core.configs import build_config, text_config
from mllm_adapters.core.contract import Dropped
from mllm_adapters.core.host_tower import TOWER_PART
from mllm_adapters.core.known_towers import gone
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, dtype_name
from mllm_adapters.families.keytable import OriginalLayout, placed

LANGUAGE_PART, CONFIG_PART = "language-model", "config"

LOOSE_WEIGHTS = (r"Qformer\.bert\.", r"(?:visual_encoder\.)?blocks\.\d+\.attn\.(?:q_bias|qkv\.)")
"""The Q-Former's file identifies the family; the tower's is read if it is next to it."""

TOWER_FILE = "eva_vit_g.pth"

LANGUAGE_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "llama": (
        "vicuna-7b", "vicuna-13b", "llm/vicuna-7b", "llm/vicuna-13b", "lmsys/vicuna-7b-v1.1", "lmsys/vicuna-13b-v1.1",
    ),
    "t5": ("flan-t5-xl", "flan-t5-xxl", "google/flan-t5-xl", "google/flan-t5-xxl"),
}  # fmt: skip
"""Folders of the language model in LAVIS' model configurations, by its kind."""

PROJECTIONS = {"llm_proj": "llama", "t5_proj": "t5"}

EVA_WIDTH = 1408
EVA: Mapping[str, Any] = {
    "hidden_size": EVA_WIDTH, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14,
}  # fmt: skip
"""EVA-CLIP-g as LAVIS builds it, one block short of the 40 in its file."""

EVA_CONFIG: Mapping[str, Any] = {
    "model_type": "instructblip_vision_model", "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
"""Settings that are the same for every EVA tower in transformers."""

HEADS: Mapping[str, Mapping[int, int]] = {"vision_config": {EVA_WIDTH: 16}, "qformer_config": {768: 12}}
"""Attention heads by width: they are not in the weights; LAVIS has them in code (EVA-g) and in bert-base-uncased."""

NORM_EPSILON = 1e-5
"""Epsilon of ``ln_vision``: PyTorch's default in LAVIS, while all norms inside the tower have 1e-6."""

LAYOUT = OriginalLayout(
    {
        "query_tokens": "query_tokens",
        "ln_vision.*": "vision_model.post_layernorm.{}",
        "{llm,t5}_proj.*": "language_projection.{1}",
        "{llm,t5}_model.*rotary_emb.inv_freq": None,
        "{llm,t5}_model.*": "language_model.{1}",
        "Qformer.cls.*": None,  # the head of the Q-Former's own training
        "Qformer.bert.embeddings.position_ids": None,
        "Qformer.bert.embeddings.LayerNorm.*": "qformer.embeddings.layernorm.{}",
        "Qformer.bert.*attention.self.*": "qformer.{}attention.attention.{}",
        "Qformer.bert.*": "qformer.{}",
    },
    of="an InstructBLIP with an EVA tower",
)
"""Name in LAVIS -> name in transformers; None for buffers and heads."""

_BLOCK = "vision_model.encoder.layers.{}."

EVA_LAYOUT = OriginalLayout(
    {
        "cls_token": "vision_model.embeddings.class_embedding",
        "pos_embed": "vision_model.embeddings.position_embedding",
        "patch_embed.proj.{weight,bias}": "vision_model.embeddings.patch_embedding.{}",
        "blocks.{}.norm{1,2}.*": _BLOCK + "layer_norm{}.{}",
        "blocks.{}.attn.qkv.weight": _BLOCK + "self_attn.qkv.weight",
        "blocks.{}.attn.{q,v}_bias": _BLOCK + "self_attn.qkv.bias",
        "blocks.{}.attn.proj.*": _BLOCK + "self_attn.projection.{}",
        "blocks.{}.mlp.fc{1,2}.*": _BLOCK + "mlp.fc{}.{}",
        "{norm,fc_norm,head}.*": None,
        "mask_token": None,
    },
    of="an InstructBLIP with an EVA tower",
)
"""Likewise for the tower; None for tensors after its blocks, which LAVIS does not use."""


@dataclass(frozen=True)
class AsStock:
    """A checkpoint mapped to the transformers layout.

    Attributes:
        config: Its config.json there; it may lack an image placeholder.
        steps: Its tensors there.
        dropped: Tensors without a counterpart there.
        notes: Notes for the user about the source.
    """

    config: dict[str, Any]
    steps: list[Step]
    dropped: list[Dropped]
    notes: tuple[str, ...] = ()


def read(checkpoint: Checkpoint, *, swapped: bool, image_size: int | None = None) -> AsStock:
    """Read a LAVIS checkpoint with its parts, mapped to transformers' layout.

    Args:
        checkpoint: The loose weight files.
        swapped: Whether the tower will be replaced, and so need not exist.
        image_size: Requested input side in pixels.

    Raises:
        UserError: it is not an InstructBLIP, a part is missing, or parts do not belong together.
    """
    folder = checkpoint.folder
    kind = _kind(checkpoint)
    tower = {n.removeprefix("visual_encoder."): h for n, h in checkpoint.tensors.items() if _is_tower(n)}
    steps, dropped = LAYOUT.steps((h for n, h in checkpoint.tensors.items() if not _is_tower(n)), folder)
    language, language_steps = _language_model(checkpoint, kind, steps)
    steps += language_steps
    shapes = {step.name: step.shape for step in steps}
    sections = _sections(checkpoint)
    given = checkpoint.find(TOWER_PART, *([] if tower or swapped else [TOWER_FILE]))
    if given is not None:
        dropped += [
            Dropped(name=h.name, reason="the tower that was given is taken instead") for h in tower.values()
        ]
        attached = checkpoint.attach(TOWER_PART, given)
        tower = {n.removeprefix("visual_encoder."): h for n, h in attached.items()}
    width = _shape(shapes, "vision_model.post_layernorm.weight", folder)[0]
    notes: tuple[str, ...] = ()
    if tower or not swapped:
        vision = _vision_config(tower, width, folder, sections, swapped=swapped)
    else:
        vision, source = _replaced_tower(width, folder, image_size)
        notes = (gone(TOWER_FILE, source),)
    tower_steps, left_out = _tower_steps(tower, vision["num_hidden_layers"], folder)
    return AsStock(
        config={
            "architectures": ["InstructBlipForConditionalGeneration"],
            "model_type": "instructblip",
            "dtype": next(step.dtype for step in steps if step.name.startswith("language_model.")),
            "num_query_tokens": _shape(shapes, "query_tokens", folder)[1],
            "vision_config": vision,
            "qformer_config": _qformer_config(shapes, width, folder, sections),
            "text_config": language,
            "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
        },
        steps=steps + tower_steps,
        dropped=dropped + left_out,
        notes=notes,
    )


def with_special_tokens(tokenizer: Any) -> Any:
    """Add LAVIS' special tokens to LLaMA's tokenizer; T5's stays unchanged.

    ``</s>`` begins and ends a text, and padding has its own token.
    """
    if tokenizer.bos_token is not None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.bos_token = tokenizer.eos_token = "</s>"
        tokenizer.update_post_processor()
    return tokenizer


def original_name(name: str) -> str:
    """Return the LAVIS name of a tensor of the Q-Former's cross-attention, or of the norm before it."""
    if name.startswith("vision_model."):
        return f"ln_vision.{name.rpartition('.')[2]}"
    return name.replace("qformer.", "Qformer.bert.").replace("attention.attention.", "attention.self.")


def _kind(checkpoint: Checkpoint) -> str:
    """Return the kind of language model; refuse checkpoints that are not an InstructBLIP."""
    found = {name.partition(".")[0] for name in checkpoint.tensors}
    kinds = [kind for projection, kind in PROJECTIONS.items() if projection in found]
    if "opt_proj" in found or (
        kinds and "Qformer.bert.embeddings.word_embeddings.weight" not in checkpoint.tensors
    ):
        raise UnsupportedCheckpointError(
            f"{checkpoint.folder}: this is BLIP-2, whose Q-Former does not read the instruction: take an "
            "InstructBLIP such as "
            "instruct_blip_vicuna7b_trimmed.pth"
        )
    if len(kinds) != 1:
        raise BadDataError(
            f"{checkpoint.folder} holds a Q-Former without projection to a language model (expected llm_proj or "
            "t5_proj): take an InstructBLIP; a Q-Former alone can be given as `parts['qformer']=PATH`"
        )
    return kinds[0]


def _is_tower(name: str) -> bool:
    return name.startswith("visual_encoder.") or not re.match(
        r"query_tokens|ln_vision\.|Qformer\.|(?:llm|t5)_", name
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, folder: Path) -> tuple[int, ...]:
    if name not in shapes:
        raise BadDataError(f"{folder}: the tensor that transformers calls {name} is missing: is it complete?")
    return shapes[name]


def _sections(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the part ``config``: a config.json of the same model in the transformers layout; empty if not given."""
    path = checkpoint.find(CONFIG_PART)
    return {} if path is None else read_json(path / "config.json" if path.is_dir() else path)


def _heads(section: str, width: int, folder: Path, sections: Mapping[str, Any]) -> int:
    """Return the number of attention heads, from the given configuration or the published one."""
    given = sections.get(section)
    if isinstance(given, dict) and {"hidden_size", "num_attention_heads"} <= given.keys():
        if given["hidden_size"] != width:
            raise MismatchError(
                f"`parts['{CONFIG_PART}']`: its {section} describes a width of {given['hidden_size']}, but the weights "
                f"in {folder} are {width} wide: they do not belong together"
            )
        return int(given["num_attention_heads"])
    if width not in HEADS[section]:
        raise NotFoundError(
            f"{folder}: how many attention heads a {section.removesuffix('_config')} tower of width {width} has is in "
            f"no weight file (known: width {next(iter(HEADS[section]))}): give a config.json of this model in the "
            f"transformers layout with `parts['{CONFIG_PART}']=PATH`"
        )
    return HEADS[section][width]


def _language_model(
    checkpoint: Checkpoint, kind: str, steps: list[Step]
) -> tuple[dict[str, Any], list[Step]]:
    """Return the ``text_config`` of the language model, and its tensors unless they are in the checkpoint."""
    reads = next((step.shape[0] for step in steps if step.name == "language_projection.weight"), None)
    found: list[str] = []
    for name in LANGUAGE_FOLDERS[kind]:
        path = checkpoint.find(LANGUAGE_PART, name)
        if path is None or not (path / "config.json").is_file():
            continue
        config = read_json(path / "config.json")
        width = config.get("d_model" if kind == "t5" else "hidden_size")
        if config.get("model_type") == kind and width == reads:
            return _attached(checkpoint, kind, path, config, steps)
        found.append(f"{path} is a {config.get('model_type')} of width {width}")
    raise NotFoundError(
        f"{checkpoint.folder}: its language model, a {kind} of width {reads}, was not found "
        f"({'; '.join(dict.fromkeys(found)) or 'nothing there'}): put its folder at "
        f"{checkpoint.folder / LANGUAGE_FOLDERS[kind][0]}, or say where it is with `parts['{LANGUAGE_PART}']=PATH`"
    )


def _attached(
    checkpoint: Checkpoint, kind: str, path: Path, config: dict[str, Any], steps: list[Step]
) -> tuple[dict[str, Any], list[Step]]:
    inside = any(step.name.startswith("language_model.") for step in steps)
    where = f"{path}/config.json"
    tensors = {} if inside else checkpoint.attach(LANGUAGE_PART, path)
    checkpoint.parts[LANGUAGE_PART] = path
    taken = [copied(h, f"language_model.{n}") for n, h in tensors.items() if not n.endswith("inv_freq")]
    rows = max(
        (
            s.shape[0]
            for s in (*steps, *taken)
            if s.name.endswith(("embed_tokens.weight", "shared.weight"))
            and s.name.startswith("language_model.")
        ),
        default=0,
    )
    if kind == "llama":
        return text_config(kind, config, rows, where), taken
    return build_config({**config, "vocab_size": rows}, where).to_dict(), taken


def _qformer_config(
    shapes: Mapping[str, tuple[int, ...]], encoder_width: int, folder: Path, sections: Mapping[str, Any]
) -> dict[str, Any]:
    words, width = _shape(shapes, "qformer.embeddings.word_embeddings.weight", folder)
    layers = 1 + max(
        int(m[1]) for name in shapes if (m := re.match(r"qformer\.encoder\.layer\.(\d+)\.", name))
    )
    crossing = sorted(
        {int(m[1]) for name in shapes if (m := re.match(r"qformer\.encoder\.layer\.(\d+)\.crossatt", name))}
    )
    every = crossing[1] if len(crossing) > 1 else layers
    if crossing != list(range(0, layers, every)):
        raise BadDataError(
            f"{folder}: its Q-Former has cross-attention in layers {crossing}: expected every n-th"
        )
    return {
        "model_type": "instructblip_qformer",
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads("qformer_config", width, folder, sections),
        "intermediate_size": _shape(shapes, "qformer.encoder.layer.0.intermediate.dense.weight", folder)[0],
        "max_position_embeddings": _shape(shapes, "qformer.embeddings.position_embeddings.weight", folder)[0],
        "cross_attention_frequency": every,
        "encoder_hidden_size": encoder_width,
    }


def _vision_config(
    tower: Mapping[str, TensorHeader],
    width: int,
    folder: Path,
    sections: Mapping[str, Any],
    *,
    swapped: bool,
) -> dict[str, Any]:
    """Return the ``vision_config`` of the EVA tower, from its weights."""
    if not tower:
        raise NotFoundError(
            f"{folder}: its vision tower {TOWER_FILE} is neither in it nor next to it: put it there, or "
            f"pass `parts['{TOWER_PART}']=PATH`"
        )
    shapes = {name: header.shape for name, header in tower.items()}
    found = _shape(shapes, "cls_token", folder)[-1]
    if found != width:
        raise MismatchError(
            f"{folder}: its tower is {found} wide, but ln_vision reads a width of {width}: they do not belong together"
        )
    patch = _shape(shapes, "patch_embed.proj.weight", folder)[-1]
    blocks = 1 + max((int(m[1]) for n in shapes if (m := re.match(r"blocks\.(\d+)\.", n))), default=-1)
    used = sections.get("vision_config", {}).get("num_hidden_layers", EVA["num_hidden_layers"])
    return {
        **EVA_CONFIG,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "blocks.0.mlp.fc1.weight", folder)[0],
        "num_hidden_layers": min(blocks, used),
        # A tower that will be replaced is never run, so its number of heads is not needed.
        "num_attention_heads": 1 if swapped else _heads("vision_config", width, folder, sections),
        "image_size": patch * isqrt(_shape(shapes, "pos_embed", folder)[1] - 1),
        "patch_size": patch,
    }


def _replaced_tower(width: int, folder: Path, image_size: int | None) -> tuple[dict[str, Any], str]:
    """Return the ``vision_config`` of a missing tower that will be replaced, and the source of its geometry."""
    if width == EVA_WIDTH:
        return {**EVA_CONFIG, **EVA}, f"that of LAVIS' EVA-CLIP-g, which is as wide as ln_vision ({width})"
    if image_size is None:
        raise NotFoundError(
            f"{folder}: its vision tower {TOWER_FILE} is neither in it nor next to it, and ln_vision has "
            f"width {width}, unlike LAVIS' EVA-CLIP-g: a swap needs the old tower's size, pass "
            f"`image_size`; or pass `parts['{TOWER_PART}']=PATH`"
        )
    sizes = {"hidden_size": width, "num_attention_heads": 1, "image_size": image_size}
    return {**EVA_CONFIG, **EVA, **sizes}, f"taken as {width} wide (ln_vision) at {image_size} px"


def _tower_steps(
    tower: Mapping[str, TensorHeader], depth: int, folder: Path
) -> tuple[list[Step], list[Dropped]]:
    steps: list[Step] = []
    dropped: list[Dropped] = []
    for name, header in tower.items():
        place = EVA_LAYOUT.place(name, folder)
        block = re.match(r"blocks\.(\d+)\.", name)
        if not place.targets:
            dropped.append(Dropped(name=header.name, reason=EVA_LAYOUT.why(place)))
        elif block and int(block[1]) >= depth:
            dropped.append(Dropped(name=header.name, reason="LAVIS ends the tower before this block"))
        elif not name.endswith("_bias"):
            steps += placed(header, place)
        elif name.endswith("q_bias"):
            value = tower.get(name.replace("q_bias", "v_bias"))
            if value is None:
                raise BadDataError(f"{folder}: {name} has no matching v_bias: is the tower complete?")
            # The original has no bias on the keys, transformers one of zeros.
            steps.append(
                Step(
                    name=place.targets[0], dtype=dtype_name(header.dtype), shape=(3 * header.shape[0],),
                    operation="concat", sources=(header.name, value.name),
                )
            )  # fmt: skip
    return steps, dropped
