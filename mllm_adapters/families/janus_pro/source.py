"""Reads a Janus checkpoint of any layout: tensors under transformers' names, image preprocessing, token ids."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.pretrained import load_pretrained
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, PixelRule, TowerSpec, checked
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config, read_fields
from mllm_adapters.core.contract import FAMILY_KEY
from mllm_adapters.core.fates import ProcessorFate
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import check_positions, contract_of, copied, growth, image_row
from mllm_adapters.core.processing import host_pixels, image_settings, load_tokenizer
from mllm_adapters.families.host import Host, PlanRequest

NAME, OWN_TYPE = "janus-pro", "mgll_janus"
"""model_type of the family, and of the architecture with a CLIP tower."""

CLIP_LAYER = -2
"""Hidden layer at which a CLIP tower is read, as in LLaVA: the last one is only for CLIP's class token."""

PLACEHOLDER, IMAGE_BEGIN, IMAGE_END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"

PUBLISHED_VOCABULARY = 102400
PUBLISHED_IDS = {"placeholder": 100581, "boi": 100003, "bos": 100000, "eos": 100001, "pad": 100002}
"""Ids of the published tokenizer, used for a checkpoint without tokenizer but with its number of embedding rows."""

TOWER = "model.vision_model."
CONNECTOR = "model.aligner.fc1"
POSITIONS = f"{TOWER}embeddings.position_embedding.weight"
GENERATION = ("model.vqmodel.", "model.generation_")
EMBEDDINGS, LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


class Quantizable(BaseModel):
    """A config.json of either layout."""


class JanusPixels(BaseModel):
    """A preprocessor_config.json of the original code or of transformers, with the defaults of both."""

    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    min_size: PositiveInt = 14
    do_normalize: Literal[True] = True
    rescale_factor: Annotated[float, Field(gt=0.0039, lt=0.00394)] = 1 / 255
    image_size: PositiveInt | None = None
    size: dict[str, int] = Field(default_factory=lambda: {"height": 384})


def janus_host(
    layout: str,
    spec: TowerSpec,
    steps: list[Step],
    config: Mapping[str, Any],
    tied: bool,
    tokenizer: Any | None,
    request: PlanRequest,
    **more: Any,
) -> Host:
    """Make a host from a Janus checkpoint of any layout, under the names of transformers' own Janus.

    Args:
        layout: ``original`` or ``transformers``.
        spec: Its tower; a CLIP's if ``vision_feature_layer`` is in the configuration.
        steps: Its tensors.
        config: Fields of a `MgllJanusConfig`, the tower's included.
        tied: Whether the language model's head is its embedding.
        tokenizer: Its tokenizer, or None.
        request: The request.
        **more: Additional fields of the host.
    """
    layer, strategy = config.get("vision_feature_layer"), config.get("vision_feature_select_strategy")
    dtypes = {step.name: step.dtype for step in steps}
    kind = "LlavaProcessor" if request.target == "llava" else "JanusProcessor"
    processor = ProcessorFate(name=kind, tokenizer=type(tokenizer).__name__, template=True)
    return Host(
        layout=layout,
        before=contract_of(spec, -1 if layer is None else layer, class_token=strategy == "full"),
        steps=steps,
        prefix=TOWER,
        dtype=getattr(torch, dtypes[f"{CONNECTOR}.weight"]),
        config={
            "architectures": ["MgllJanusForConditionalGeneration"],
            "model_type": OWN_TYPE,
            **config,
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": strategy,
            FAMILY_KEY: NAME,
            "dtype": dtypes[EMBEDDINGS],
            "tie_word_embeddings": tied,
        },
        image_token_id=config["image_token_id"],
        connector=(CONNECTOR,),
        read_at=CLIP_LAYER if layer is None else None,
        processor=None if tokenizer is None else processor,
        **more,
    )


def read_converted(checkpoint: Checkpoint, request: PlanRequest) -> Host:
    """Read transformers' own Janus, or one with a CLIP tower written by this project.

    Raises:
        UserError: it is incomplete or inconsistent.
    """
    where = f"{checkpoint.folder}/config.json"
    read_fields(Quantizable, checkpoint.config, where)
    built = build_config(checkpoint.config, where)
    for name in (f"{CONNECTOR}.weight", EMBEDDINGS, POSITIONS):
        shape_of(checkpoint, name)
    vision, clip = built.vision_config, built.model_type != "janus"
    pixels, _, notes = janus_pixels(checkpoint.folder, vision.image_size)
    geometry = {
        "width": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_width": vision.intermediate_size if clip else int(vision.hidden_size * vision.mlp_ratio),
        "patch_size": vision.patch_size,
        "activation": vision.hidden_act,
    }
    spec = checked(TowerSpec, {**geometry, **pixels.model_dump()}, Path(where))
    check_positions(checkpoint.tensors[POSITIONS], spec, class_token=clip)
    tokenizer = janus_tokenizer(checkpoint.folder)
    begin = built.boi_token_id if clip else begin_id(tokenizer, shape_of(checkpoint, EMBEDDINGS)[0])
    selected = ("vision_feature_layer", "vision_feature_select_strategy") if clip else ()
    config = {
        "vision_config": checkpoint.config.get("vision_config"),
        "vq_config": {
            **(checkpoint.config.get("vq_config") or {}),
            "num_patches": built.vq_config.num_patches,
        },
        "text_config": dict(checkpoint.config.get("text_config") or {}),
        "image_token_id": built.image_token_id,
        "boi_token_id": begin,
        "aligner_depth": built.aligner_depth if clip else vision.depth,
        "aligner_hidden_act": built.aligner_hidden_act if clip else vision.hidden_act,
        **{name: getattr(built, name) for name in selected},
    }
    # transformers' default is true, even if the weights have a head of their own; then it is not tied.
    tied = built.tie_word_embeddings and LM_HEAD not in checkpoint.tensors
    steps = [copied(header) for header in checkpoint.tensors.values()]
    return janus_host("transformers", spec, steps, config, tied, tokenizer, request, notes=notes)


def janus_tokenizer(folder: Path) -> Any | None:
    """Load the tokenizer of a Janus folder, with its three named image tokens; None if there is none.

    Raises:
        UserError: it cannot be read, or lacks the tokens around an image.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in (IMAGE_BEGIN, IMAGE_END) if token not in vocabulary]:
        raise BadDataError(f"{folder}: the tokenizer has no {absent[0]}: it is not a Janus tokenizer")
    named = {"image_token": PLACEHOLDER, "boi_token": IMAGE_BEGIN, "eoi_token": IMAGE_END}
    tokenizer = load_pretrained(
        type(tokenizer), folder, f"the tokenizer in {folder}", extra_special_tokens=named
    )
    settings = folder / "tokenizer_config.json"
    begins = settings.is_file() and read_json(settings).get("add_bos_token")
    if begins and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        # Releases before 5.0, which the original code uses, read this field; later ones tokenizer.json.
        tokenizer.add_bos_token = True
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def janus_pixels(folder: Path, image_size: int) -> tuple[PixelRule, int, tuple[str, ...]]:
    """Return a Janus folder's pixel rule, the minimum side of an image, and notes on assumptions.

    Raises:
        UserError: its image processor makes images of another size, or does not normalize.
    """
    settings, where = image_settings(folder)
    if settings is None:
        assumed = PixelRule(image_size=image_size, mean=(0.5,) * 3, std=(0.5,) * 3, resize="pad")
        return assumed, 14, ("there is no image processor: mean and std 0.5 are assumed, and padding",)
    if not re.match("VLM|Janus", str(settings.get("image_processor_type", "Janus"))):
        rule, notes = host_pixels(folder, image_size)  # that of a swapped tower
        return rule, 1, notes
    pixels = read_fields(JanusPixels, settings, str(where))
    side = pixels.image_size or pixels.size.get("height")
    if side != image_size:
        raise MismatchError(
            f"{where}: images are resized to {side} px, but config.json's tower takes {image_size} px"
        )
    rule = PixelRule(image_size=image_size, mean=pixels.image_mean, std=pixels.image_std, resize="pad")
    return rule, pixels.min_size, ()


def shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Raises:
        UserError: it is missing.
    """
    if name not in checkpoint.tensors:
        raise BadDataError(f"{checkpoint.folder}: tensor {name} is missing: complete the download")
    return checkpoint.tensors[name].shape


def placeholder(tokenizer: Any | None, vocabulary: int) -> tuple[int, int, tuple[str, ...]]:
    """Return the id of the image placeholder, the rows of the embedding, and notes for the user."""
    if tokenizer is None and vocabulary == PUBLISHED_VOCABULARY:
        number = PUBLISHED_IDS["placeholder"]
        note = f"there is no tokenizer: the image placeholder is {number}, as in the published one"
        return number, vocabulary, (note,)
    number, rows = image_row(tokenizer, vocabulary, PLACEHOLDER)
    note = f"the image placeholder is {PLACEHOLDER} = {number}"
    if tokenizer is None:
        note += ", a new row: there is no tokenizer, and the vocabulary is not the published one"
    return number, rows, (growth(vocabulary, rows) + note,)


def begin_id(tokenizer: Any | None, vocabulary: int) -> int | None:
    """Return the id of the begin-of-image token; None if unknown."""
    if tokenizer is not None:
        return int(tokenizer.convert_tokens_to_ids(IMAGE_BEGIN))
    return PUBLISHED_IDS["boi"] if vocabulary == PUBLISHED_VOCABULARY else None


def text_ids(tokenizer: Any | None, vocabulary: int) -> dict[str, int]:
    """Return begin, end and padding id of the language model, which an original config.json does not contain."""
    names = ("bos", "eos", "pad")
    if tokenizer is not None:
        return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    known = vocabulary == PUBLISHED_VOCABULARY
    return {f"{name}_token_id": PUBLISHED_IDS[name] for name in names} if known else {}
