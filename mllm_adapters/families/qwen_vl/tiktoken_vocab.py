"""Tokenizers published as a rank file (``*.tiktoken``): one line per token, base64 of its bytes and its rank.

The format is that of openai/tiktoken (tiktoken/load.py). Its encoder first looks up the whole piece, then
repeatedly joins the two neighbors whose union has the lowest rank, the leftmost first.
"""

import binascii
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mgll_encoder.common.errors import BadDataError


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read tokens and ranks of a rank file; ranks must be 0, 1, 2, ..., and every single byte must be a token.

    Raises:
        UserError: a line is damaged, a rank is missing or duplicate, or a byte is not a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadDataError(
                f"{path}: line {number} is {line[:40]!r}, expected a token in base64 and its rank: download it again"
            ) from None
        if int(rank) != number - 1 or len(ranks) != number:
            raise BadDataError(
                f"{path}: line {number} has rank {int(rank)} or a token of an earlier line, expected a new token of "
                f"rank {number - 1}: download it again"
            )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise BadDataError(
            f"{path}: byte {missing[0]} is not a token, so some text could not be encoded: is the file "
            "complete?"
        )
    return ranks


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pairs that encoding by rank can join, in the order of their unions' ranks.

    Joins within the span of a token are those of encoding that token alone, so it is always joined from the
    same two parts, or never.
    """
    by_rank = sorted(ranks, key=ranks.__getitem__)
    parts = (_last_parts(token, ranks) for token in by_rank if len(token) > 1)
    return [(pair[0], pair[1]) for pair in parts if len(pair) == 2]


def rank_tokenizer(ranks: Mapping[bytes, int], pattern: str, specials: Sequence[str]) -> Tokenizer:
    """Build a fast tokenizer that is equivalent to the rank file.

    Args:
        ranks: Token bytes -> rank, which is its id.
        pattern: Regular expression of the pieces that text is first split into.
        specials: Special tokens; their ids follow the ranks.
    """
    names = bytes_to_unicode()
    vocabulary = {_written(token, names): rank for token, rank in ranks.items()}
    merges = [(_written(left, names), _written(right, names)) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return tokenizer


def _last_parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Join the bytes of a token by rank until two parts remain or none can be joined, and return the parts."""
    parts = [token[i : i + 1] for i in range(len(token))]
    never = len(ranks)
    while len(parts) > 2:
        unions = [ranks.get(left + right, never) for left, right in pairwise(parts)]
        lowest = min(unions)
        if lowest == never:
            break
        at = unions.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _written(token: Iterable[int], names: Mapping[int, str]) -> str:
    return "".join(map(names.__getitem__, token))
