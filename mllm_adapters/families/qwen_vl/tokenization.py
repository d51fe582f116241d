"""The tokenizer of Qwen-VL: a rank file and special tokens, as in tokenization_qwen.py of Qwen/Qwen-VL-Chat."""

from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import MismatchError
from mllm_adapters.core.fates import ProcessorFate
from mllm_adapters.core.processing import load_tokenizer, processor_fate

RANK_FILE = "qwen.tiktoken"
IMAGE_TOKEN = "<imgpad>"
EXTRAS = 205
"""Unnamed special tokens of the published tokenizer, ``<|extra_0|>`` to ``<|extra_204|>``."""
BEFORE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AFTER = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", IMAGE_TOKEN)
"""Special tokens before and after the extras."""


def new_processor(folder: Path) -> ProcessorFate | None:
    """Describe the processor of a plan; None if the folder has no tokenizer."""
    if (folder / RANK_FILE).is_file():
        return ProcessorFate(name="QwenVLProcessor", made_of=RANK_FILE)
    return processor_fate(folder, name="QwenVLProcessor")


def read_tokens(folder: Path, image_token_id: int) -> tuple[dict[bytes, int], list[str]] | None:
    """Read ranks and special tokens of a folder; None if there is no rank file.

    Raises:
        UserError: the rank file is damaged, or does not belong to the config.json.
    """
    if not (folder / RANK_FILE).is_file():
        return None
    from mllm_adapters.families.qwen_vl.tiktoken_vocab import read_ranks

    ranks = read_ranks(folder / RANK_FILE)
    return ranks, special_tokens(len(ranks), image_token_id, folder / RANK_FILE)


def special_tokens(ranks: int, image_token_id: int, where: Path) -> list[str]:
    """Return the special tokens, whose ids follow the ranks up to the placeholder's.

    Args:
        ranks: Number of tokens in the rank file.
        image_token_id: Id of the placeholder, the last of them.
        where: The rank file.

    Raises:
        UserError: their number is not that of the published tokenizer.
    """
    named = len(BEFORE) + len(AFTER)
    extras = image_token_id + 1 - ranks - named
    if not 0 <= extras <= EXTRAS:
        raise MismatchError(
            f"{where} has {ranks} tokens, but visual.image_start_id in config.json is {image_token_id - 2}: expected "
            f"{image_token_id + 1 - named - EXTRAS} tokens; download it again"
        )
    return [*BEFORE, *(f"<|extra_{i}|>" for i in range(extras)), *AFTER]


def tokenizer(folder: Path, image_token_id: int, context: int) -> Any | None:
    """Return the fast tokenizer that equals the published one, or the folder's own.

    Args:
        folder: Checkpoint folder.
        image_token_id: Id of the placeholder.
        context: Longest sequence in tokens.
    """
    found = read_tokens(folder, image_token_id)
    if found is None:
        return load_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from mllm_adapters.families.qwen_vl.tiktoken_vocab import rank_tokenizer

    ranks, specials = found
    return PreTrainedTokenizerFast(
        tokenizer_object=rank_tokenizer(ranks, PRETOKENIZE_REGEX, specials),
        eos_token=BEFORE[0],
        pad_token=BEFORE[0],
        additional_special_tokens=specials[1:],
        padding_side="left",
        model_max_length=context,
    )


def end_tokens(folder: Path, image_token_id: int) -> dict[str, Any]:
    """Return the tokens that end generation: end of text and end of turn, which the original's chat code checks."""
    found = read_tokens(folder, image_token_id)
    if found is None:
        return {}
    first = len(found[0])
    return {"eos_token_id": [first, first + BEFORE.index("<|im_end|>")], "pad_token_id": first}
