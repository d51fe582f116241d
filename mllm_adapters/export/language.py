"""The language model of a LLaVA as a GGUF file.

Names and fields after gguf-py (constants.py) and llama.cpp's loader (src/llama-model.cpp, release b11549).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.weights.keytable import KeyTable, renames
from mllm_adapters.export.gguf_file import Field, GGUFFile, GGUFTensor
from mllm_adapters.export.source import LANGUAGE, LlavaSource


@dataclass(frozen=True)
class LanguageArchitecture:
    """How llama.cpp takes a language model.

    Attributes:
        name: Its ``general.architecture``.
        interleaved: Whether the two dimensions of a rotary pair are neighbors there. transformers pairs each dimension
            with the one half a head further.
    """

    name: str
    interleaved: bool


LANGUAGE_ARCHITECTURES: Mapping[str, LanguageArchitecture] = {
    "llama": LanguageArchitecture("llama", interleaved=True),
    "mistral": LanguageArchitecture("llama", interleaved=True),
    "qwen2": LanguageArchitecture("qwen2", interleaved=False),
    "qwen3": LanguageArchitecture("qwen3", interleaved=False),
}
"""``model_type`` of the language model -> how llama.cpp takes it."""

_TABLE = KeyTable(
    {
        **renames(
            {
                "language_model.embed_tokens.weight": "token_embd.weight",
                "language_model.norm.weight": "output_norm.weight",
                "language_model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
                "language_model.layers.{}.self_attn.{q,k,v}_proj.{weight,bias}": "blk.{}.attn_{}.{}",
                "language_model.layers.{}.self_attn.o_proj.{weight,bias}": "blk.{}.attn_output.{}",
                "language_model.layers.{}.self_attn.{q,k}_norm.weight": "blk.{}.attn_{}_norm.weight",
                "language_model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
                "language_model.layers.{}.mlp.{gate,up,down}_proj.weight": "blk.{}.ffn_{}.weight",
                "lm_head.weight": "output.weight",
            }
        ),
        "language_model.layers.{}.self_attn.rotary_emb.inv_freq": None,
    }
)


def language_file(source: LlavaSource, vocabulary: Mapping[str, Field]) -> GGUFFile:
    """Return the language model as a GGUF file.

    Args:
        source: The model.
        vocabulary: The fields of its tokenizer.

    Raises:
        UnsupportedCheckpointError: llama.cpp has no such language model, or not with these settings.
    """
    text = source.config.text_config
    architecture = LANGUAGE_ARCHITECTURES.get(text.model_type)
    if architecture is None:
        raise UnsupportedCheckpointError(
            f"{source.where}: text_config: model_type is {text.model_type!r}, expected one of "
            f"{', '.join(LANGUAGE_ARCHITECTURES)}; for others name llama.cpp's own converter (`converter`)"
        )
    settings = {f"{architecture.name}.{key}": value for key, value in _settings(text, source.where).items()}
    heads = {"q": text.num_attention_heads, "k": text.num_key_value_heads} if architecture.interleaved else {}
    tied = {"lm_head.weight"} if text.tie_word_embeddings else set()
    tensors = [
        GGUFTensor(target, source.headers[name].shape, partial(_values, source, name, _heads_of(name, heads)))
        for name, target in source.part(LANGUAGE, _TABLE)
        if name not in tied
    ]
    return GGUFFile(
        architecture.name, {"general.name": source.name, **settings, **vocabulary}, tuple(tensors)
    )


def _settings(text: Any, where: str) -> dict[str, Field]:
    rope = text.rope_parameters
    scaling: dict[str, dict[str, Field]] = {
        "default": {},
        "dynamic": {},
        "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": rope.get("factor")},
    }
    for name, found, known in (
        ("rope_type", rope["rope_type"], scaling),
        ("hidden_act", text.hidden_act, ("silu",)),
    ):
        if found not in known:
            raise UnsupportedCheckpointError(
                f"{where}: text_config: {name} is {found!r}, expected {' or '.join(known)}; for others name "
                "llama.cpp's own converter (`converter`)"
            )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # llama.cpp applies no sliding window in these architectures, and no dynamic scaling; both change nothing up to here
    window, unscaled = getattr(text, "sliding_window", None), rope.get("original_max_position_embeddings")
    lengths = (text.max_position_embeddings, window, unscaled)
    return {
        "context_length": min(length for length in lengths if length),
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope["rope_theta"]),
        **scaling[rope["rope_type"]],
    }


def _heads_of(name: str, heads: Mapping[str, int]) -> int | None:
    """Return the heads of a projection whose rotary pairs are reordered; None for other tensors."""
    return next((count for part, count in heads.items() if f".self_attn.{part}_proj." in name), None)


def _values(source: LlavaSource, name: str, heads: int | None) -> Tensor:
    values = source.read(name)
    if heads is None:
        return values
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)
