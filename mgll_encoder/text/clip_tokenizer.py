"""CLIP's tokenizer as a transformers tokenizer: complete, or reduced to the pieces that a set of texts needs."""

import gzip
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 77
"""Maximum length of a text in tokens, as in CLIP."""

_MERGES = 48_894
"""Number of merges that CLIP uses from its file: 49,408 tokens minus 512 bytes and 2 special tokens."""


@lru_cache(maxsize=1)
def _merges() -> tuple[tuple[str, str], ...]:
    """Read CLIP's merges in order, from the file in the open_clip package."""
    import open_clip.tokenizer

    path = Path(open_clip.tokenizer.default_bpe())
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return tuple((left, right) for left, right in (line.split() for line in lines[1 : 1 + _MERGES]))


@lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with 49,408 pieces; the ids are those of open_clip."""
    return _tokenizer([*_bytes(), *("".join(pair) for pair in _merges()), START, END], _merges())


def trimmed_tokenizer(texts: Iterable[str]) -> tuple[CLIPTokenizer, int]:
    """Build CLIP's tokenizer with the pieces that occur in texts, and the smaller ones that they are merged from.

    Args:
        texts: All texts that the tower will be trained on; read once, not stored.

    Returns:
        The tokenizer, and the number of pieces that occur in the texts. These have the first ids, in CLIP's order, the
        last two being start and end of text; later ids are of pieces that no text has. A text is split into the same
        pieces as by CLIP's own tokenizer.
    """
    whole = clip_tokenizer()
    occurring = {0}  # CLIP's first piece always gets a row
    # Not `verbose`: the library warns about texts that are longer than the context, which is no matter here.
    ids_of = lru_cache(maxsize=2**16)(lambda text: frozenset(whole(text, verbose=False)["input_ids"]))
    for text in texts:
        occurring |= ids_of(text)
    first = whole.convert_ids_to_tokens(sorted(occurring))
    origin = {"".join(pair): pair for pair in _merges()}  # each piece comes from exactly one merge
    needed, open_ends = set(first), list(first)
    while open_ends:
        for part in origin.get(open_ends.pop(), ()):
            if part not in needed:
                needed.add(part)
                open_ends.append(part)
    known = needed.union(_bytes()).difference(first)
    rest = [piece for piece in (*_bytes(), *origin) if piece in known]
    merges = tuple(pair for pair in _merges() if "".join(pair) in needed)
    return _tokenizer([*first, *rest], merges), len(first)


def numbered_anew(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[CLIPTokenizer, list[int | None]]:
    """Renumber a trimmed tokenizer so that start and end of text have the last ids of all, as in CLIP.

    Args:
        tokenizer: As from `trimmed_tokenizer`.
        rows: Number of pieces with an embedding, the first ones.

    Returns:
        The tokenizer, and for each of its ids the former one; None for pieces without an embedding.
    """
    former = tokenizer.get_vocab()
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    pieces = [piece for piece in sorted(former, key=former.__getitem__) if piece not in ends] + ends
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    new = _tokenizer(pieces, [tuple(pair) for pair in merges])
    return new, [former[piece] if former[piece] < rows else None for piece in pieces]


@lru_cache(maxsize=1)
def _bytes() -> tuple[str, ...]:
    """Return the 256 bytes as CLIP writes them, within and at the end of a word, in its order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda sign: (ord(sign) >= 256, ord(sign)))
    return (*letters, *(f"{letter}</w>" for letter in letters))


def _tokenizer(pieces: Iterable[str], merges: Iterable[tuple[str, str]]) -> CLIPTokenizer:
    # transformers declares strings, but passes them on to tokenizers, which expects pairs
    pairs: list[Any] = list(merges)
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs, model_max_length=CONTEXT
    )
