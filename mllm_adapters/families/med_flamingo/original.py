"""Reads a Flamingo's weight file: original names, their aliases, and the geometry from the shapes.

``open_flamingo`` saves the trained parameters, under names that depend on the release: up to 0.0.2 each
gated block twice (shared storage) with rotary tables, the whole CLIP under ``vision_encoder.visual``; from
2.0 on once, wrapped as ``{epoch, model_state_dict}``, ``vision_encoder`` being the vision tower alone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mgll_encoder.common.errors import BadDataError, MismatchError, UnsupportedCheckpointError
from mgll_encoder.weights.keytable import Destination
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.core.contract import Dropped, VisionContract
from mllm_adapters.core.fates import ConnectorFate, Kept, Reinitialized
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, dtype_name, refit_connector, reinitialized
from mllm_adapters.families.keytable import OriginalLayout

PERCEIVER = "model.perceiver."
BRIDGE = "model.bridge"
BLOCKS = "model.cross_attention."
LANGUAGE_MODEL = "model.language_model."
EMBEDDINGS = f"{LANGUAGE_MODEL}embed_tokens.weight"
HEAD = "lm_head.weight"

HEAD_DIM = 64
"""Width of a head in the perceiver and the gated blocks; a constant of the original code."""

_LM, _TO_LAYER = "lang_encoder.model.layers.{}.", f"{LANGUAGE_MODEL}layers.{{}}.{{}}.{{}}"

LAYOUT = OriginalLayout(
    {
        "*rotary_emb.inv_freq": None,
        "perceiver.latents": f"{PERCEIVER}latents",
        "perceiver.norm.*": f"{PERCEIVER}norm.{{}}",
        "perceiver.layers.{}.{0,1}.*": f"{PERCEIVER}layers.{{}}.{{}}.{{}}",
        _LM + "gated_cross_attn_layer.{attn_gate,ff_gate}": BLOCKS + "{}.{}",
        _LM + "gated_cross_attn_layer.{attn,ff}.*": BLOCKS + "{}.{}.{}",
        "lang_encoder.gated_cross_attn_layers.{}.{attn_gate,ff_gate}": BLOCKS + "{}.{}",
        "lang_encoder.gated_cross_attn_layers.{}.{attn,ff}.*": BLOCKS + "{}.{}.{}",
        _LM + "decoder_layer.{self_attn,mlp,input_layernorm,post_attention_layernorm}.*": _TO_LAYER,
        _LM + "{self_attn,mlp,input_layernorm,post_attention_layernorm}.*": _TO_LAYER,
        "lang_encoder.old_decoder_blocks.{}.*": f"{LANGUAGE_MODEL}layers.{{}}.{{}}",
        "lang_encoder.model.{embed_tokens,norm}.*": f"{LANGUAGE_MODEL}{{}}.{{}}",
        "lang_encoder.lm_head.*": "lm_head.{}",
    },
    prefix="module.",
    of="a Flamingo on a LLaMA",
    reason="recomputed from the configuration",
)
"""Original name -> ours; None for rotary tables."""

VISION = re.compile(r"(?:module\.)?vision_encoder\.")

OTHER_LANGUAGE_MODELS = (
    (re.compile(r"(?:module\.)?lang_encoder\.transformer\."), "an MPT"),
    (re.compile(r"(?:module\.)?lang_encoder\.gpt_neox\."), "a GPT-NeoX (RedPajama, Pythia)"),
    (re.compile(r"(?:module\.)?lang_encoder\.model\.decoder\."), "an OPT"),
)
"""Language models of other OpenFlamingos, by an identifying key."""

_VIDEO = re.compile(r"(?:module\.)?perceiver\.(frame_embs|media_time_embs)")


@dataclass(frozen=True)
class Names:
    """The tensors of a weight file, sorted.

    Attributes:
        found: Target name -> its source names.
        vision: Source names of the vision encoder, if the file has one.
        dropped: Dropped tensors.
    """

    found: Mapping[str, tuple[str, ...]]
    vision: tuple[str, ...]
    dropped: tuple[Dropped, ...]

    def steps(self, checkpoint: Checkpoint) -> list[Step]:
        """Return a step for each target tensor.

        Raises:
            UserError: two names of one tensor have different shapes or dtypes.
        """
        return [_step(name, [checkpoint.tensors[s] for s in sources]) for name, sources in self.found.items()]


@dataclass(frozen=True)
class Geometry:
    """Geometry from the tensors' shapes.

    Attributes:
        rows: Rows of the embedding, added tokens included.
        text_width: Width of the language model.
        width: Width of the vision features.
        config: Fields of `FlamingoConfig`.
    """

    rows: int
    text_width: int
    width: int
    config: Mapping[str, int]


def sort_names(checkpoint: Checkpoint) -> Names:
    """Sort the tensors of a weight file.

    Raises:
        UserError: it is not a Flamingo on a LLaMA, or was saved before training.
    """
    found: dict[str, list[str]] = {}
    vision: list[str] = []
    dropped: list[Dropped] = []
    for source in checkpoint.tensors:
        if VISION.match(source):
            vision.append(source)
        elif places := _place(source, checkpoint).targets:
            found.setdefault(places[0], []).append(source)
        else:
            dropped.append(Dropped(name=source, reason=LAYOUT.reason))
    file = checkpoint.files[0]
    for needed, what in (
        (f"{PERCEIVER}latents", "perceiver"),
        (BLOCKS, "gated cross-attention blocks"),
        (EMBEDDINGS, "embedding of the added tokens (lang_encoder.model.embed_tokens.weight)"),
    ):
        if not any(name.startswith(needed) for name in found):
            raise UnsupportedCheckpointError(
                f"{file} has no {what}: expected the trained weights of a Flamingo, as open_flamingo saves them "
                "(Med-Flamingo's model.pt, OpenFlamingo-9B's checkpoint.pt)"
            )
    return Names({name: tuple(s) for name, s in found.items()}, tuple(vision), tuple(dropped))


def measure(steps: Mapping[str, Step], depth: int, where: str) -> Geometry:
    """Read the geometry from the planned tensors.

    Args:
        steps: Steps of the perceiver, the gated blocks and the embedding, by target name.
        depth: Layers of the language model.
        where: Name of the file in error messages.

    Raises:
        UserError: blocks are missing, or the shapes are not those of a Flamingo.
    """
    first = f"{BLOCKS}{_interval(steps, depth, where) - 1}"
    try:
        (latents, width), (rows, text_width) = (
            steps[name].shape for name in (f"{PERCEIVER}latents", EMBEDDINGS)
        )
        inner, inner_block = (
            steps[f"{name}.to_q.weight"].shape[0] for name in (f"{PERCEIVER}layers.0.0", f"{first}.attn")
        )
        mlp, mlp_block = (
            steps[f"{name}.1.weight"].shape[0] for name in (f"{PERCEIVER}layers.0.1", f"{first}.ff")
        )
    except KeyError as error:
        raise BadDataError(f"{where}: tensor {error.args[0]} is missing: download the file again") from None
    except ValueError:
        raise UnsupportedCheckpointError(
            f"{where}: latents and embedding must be tables: this is not a Flamingo's file"
        ) from None
    if inner % HEAD_DIM or inner_block % HEAD_DIM:
        raise BadDataError(
            f"{where}: attention is {inner} wide in the perceiver and {inner_block} in the gated blocks: expected "
            f"multiples of {HEAD_DIM}, the width of a head in open_flamingo"
        )
    layers = {name.split(".")[3] for name in steps if name.startswith(f"{PERCEIVER}layers.")}
    config = {
        "cross_attention_interval": _interval(steps, depth, where),
        "cross_attention_heads": inner_block // HEAD_DIM,
        "cross_attention_intermediate_size": mlp_block,
        "perceiver_latents": latents,
        "perceiver_depth": len(layers),
        "perceiver_heads": inner // HEAD_DIM,
        "perceiver_intermediate_size": mlp,
        "resampler_head_dim": HEAD_DIM,
    }
    return Geometry(rows, text_width, width, config)


def rewidened(
    steps: list[Step], before: VisionContract, after: VisionContract, where: Path
) -> tuple[list[Step], dict[str, ConnectorFate]]:
    """Re-initialize the connector if the features' width changes, because latents have the same width.

    If there is a bridge, only the bridge reads the features.

    Returns:
        The steps, and the fate of each connector.
    """
    old, new = before.width, after.width
    if any(step.name == f"{BRIDGE}.weight" for step in steps):
        return refit_connector(steps, BRIDGE, before, after, where)
    if old == new:
        return steps, {PERCEIVER[:-1]: Kept(width=new)}
    changed = []
    for step in steps:
        for pattern, reshape in _WIDENED:
            if pattern.fullmatch(step.name):
                step = reinitialized(step, reshape(step.shape, old, new))
                break
        changed.append(step)
    return changed, {
        PERCEIVER[:-1]: Reinitialized(before=old, after=new, because="latents"),
        f"{BLOCKS}*.attn.to_kv": Reinitialized(before=old, after=new),
    }


_WIDENED: tuple[tuple[re.Pattern[str], Callable[[tuple[int, ...], int, int], tuple[int, ...]]], ...] = (
    (re.compile(rf"{PERCEIVER}layers\.\d+\.1\.1\.weight"), lambda s, old, new: (s[0] // old * new, new)),
    (re.compile(rf"{PERCEIVER}layers\.\d+\.1\.3\.weight"), lambda s, old, new: (new, s[1] // old * new)),
    (re.compile(rf"{PERCEIVER}layers\.\d+\.0\.to_out\.weight"), lambda s, _, new: (new, s[1])),
    (re.compile(rf"{PERCEIVER}(?:latents|layers\.\d+\.0\.to_k?[qv]\.weight)"), lambda s, _, new: (s[0], new)),
    (re.compile(rf"{BLOCKS}\d+\.attn\.to_kv\.weight"), lambda s, _, new: (s[0], new)),
    (re.compile(rf"{PERCEIVER}.+\.(?:weight|bias)"), lambda _, __, new: (new,)),  # the LayerNorms
)
"""Tensors that depend on the features' width: name -> shape after a change of width. The first match is used."""


def _place(source: str, checkpoint: Checkpoint) -> Destination:
    where = checkpoint.tensors[source].file
    for pattern, what in OTHER_LANGUAGE_MODELS:
        if pattern.match(source):
            raise UnsupportedCheckpointError(
                f"{where}: its language model is {what} ({source}): only Flamingos on a LLaMA are supported, "
                "Med-Flamingo and OpenFlamingo-9B of 2023 (openflamingo/OpenFlamingo-9B-deprecated)"
            )
    if match := _VIDEO.match(source):
        raise UnsupportedCheckpointError(
            f"{where} was trained on videos ({match[1]}): only Flamingos for pictures are supported"
        )
    return LAYOUT.place(source, where)


def _step(name: str, headers: list[TensorHeader]) -> Step:
    first, *others = headers
    for other in others:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise MismatchError(
                f"{first.file}: {first.name} {list(first.shape)} and {other.name} {list(other.shape)} are two names "
                "of one tensor, but differ: the file is damaged or was edited; download it again"
            )
    if not others:
        return copied(first, name)
    sources = tuple(header.name for header in headers)
    dtype = dtype_name(first.dtype)
    return Step(name=name, dtype=dtype, shape=first.shape, operation="same", sources=sources)


def _interval(steps: Mapping[str, Step], depth: int, where: str) -> int:
    """Return the interval of gated blocks, from the layer numbers."""
    found = sorted({int(name.split(".")[2]) for name in steps if name.startswith(BLOCKS)})
    if not found:
        raise BadDataError(f"{where} has no gated cross-attention blocks: complete the download")
    interval = found[0] + 1
    expected = list(range(found[0], depth, interval))
    if found != expected:
        raise BadDataError(
            f"{where} has gated blocks before layers {found}, but one every {interval} layers of a LLaMA with {depth} "
            f"would be before {expected}: the file is incomplete, or this is not the LLaMA it was trained on"
        )
    return interval
