"""The tokenizer of Qwen-VL: a rank file and special tokens, as in tokenization_qwen.py of Qwen/Qwen-VL-Chat."""

from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UserError
from mllm_adapters.processing import has_tokenizer, load_tokenizer

RANK_FILE = "qwen.tiktoken"
IMAGE_TOKEN = "<imgpad>"
EXTRAS = 205
"""Unnamed special tokens of the published tokenizer, ``<|extra_0|>`` to ``<|extra_204|>``."""
BEFORE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AFTER = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", IMAGE_TOKEN)
"""Special tokens: those before the extras, and those after them."""


def tokenizer_note(folder: Path) -> str | None:
    """What the processor's tokenizer is made of; None where the folder has none."""
    if (folder / RANK_FILE).is_file():
        return f"QwenVLProcessor with a fast tokenizer made of {RANK_FILE}"
    return "QwenVLProcessor with the source's tokenizer" if has_tokenizer(folder) else None


def special_ids(folder: Path, image_token_id: int) -> range | None:
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


def tokenizer(folder: Path, image_token_id: int, context: int) -> Any | None:
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
