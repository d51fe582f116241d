"""A tokenizer of transformers as the fields of a GGUF file.

llama.cpp has two of the kinds that these language models use: SentencePiece's merges by score (``llama``), and merges
of bytes by rank (``gpt2``) after a pre-tokenizer that it knows by name (src/llama-vocab.cpp, release b11549).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters.export.gguf_file import Field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""

_LONG_NAMES = {"unk": "unknown", "pad": "padding"}
"""Special tokens with another name in the fields of GGUF."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

PRE_TOKENIZERS: Mapping[tuple[tuple[object, ...], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _QWEN2), ("ByteLevel", False)): "qwen2",
    (("Split", _LLAMA3), ("ByteLevel", False)): "llama-bpe",
}
"""Steps of a tokenizer's pre-tokenization -> llama.cpp's name of them."""


class Vocabulary:
    """A tokenizer as llama.cpp takes it.

    Args:
        tokenizer: A fast tokenizer.
        rows: Rows of the embedding; those without a token get a name.
        where: The folder, for messages.

    Raises:
        UnsupportedCheckpointError: llama.cpp would tokenize otherwise.
    """

    def __init__(self, tokenizer: Any, rows: int, where: str) -> None:
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UnsupportedCheckpointError(f"{where}: {type(tokenizer).__name__} has no tokenizer.json")
        self._tokenizer, self._rows, self._where = tokenizer, rows, where
        self._parts = json.loads(tokenizer.backend_tokenizer.to_str())
        self._model = self._parts["model"]
        if self._model["type"] != "BPE":
            raise self._refused(f"its model is {self._model['type']}, expected BPE")
        if not self._model["merges"]:
            raise self._refused("it has no merges")
        self._merges = [
            tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in self._model["merges"]
        ]

    def space_before(self, prompt: str) -> str:
        """Return the space that this tokenizer puts before a whole prompt, but not after special tokens.

        llama.cpp puts it before both or neither, so that it must stand in the prompt.
        """
        if self._space_scheme != "first" or prompt.startswith((" ", *self._tokenizer.all_special_tokens)):
            return ""
        return " "

    def fields(self) -> dict[str, Field]:
        """Return the fields, without the chat template."""
        tokens, types = self._tokens()
        kind = self._sentencepiece(tokens) if self._model.get("byte_fallback") else self._bytes()
        ids = self._tokenizer("a").input_ids
        known = {name: getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        return {
            **kind,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            **{
                f"tokenizer.ggml.{_LONG_NAMES.get(name, name)}_token_id": number
                for name, number in known.items()
                if number is not None
            },
            "tokenizer.ggml.add_bos_token": ids[0] == known["bos"],
            "tokenizer.ggml.add_eos_token": ids[-1] == known["eos"],
        }

    def _tokens(self) -> tuple[list[str], list[int]]:
        tokens = [f"[PAD{number}]" for number in range(self._rows)]
        types = [UNUSED] * self._rows
        for token, number in self._model["vocab"].items():
            is_byte = self._model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
            self._set(tokens, types, number, token, BYTE if is_byte else NORMAL)
        for added in self._parts["added_tokens"]:
            if stripping := [flag for flag in ("lstrip", "rstrip", "single_word") if added[flag]]:
                raise self._refused(f"token {added['content']!r} has {stripping[0]}")
            kind = CONTROL if added["special"] else USER_DEFINED
            self._set(tokens, types, added["id"], added["content"], kind)
        if self._model.get("byte_fallback") and self._tokenizer.unk_token_id is not None:
            types[self._tokenizer.unk_token_id] = UNKNOWN
        return tokens, types

    def _set(self, tokens: list[str], types: list[int], number: int, token: str, kind: int) -> None:
        if number >= self._rows:
            raise self._refused(
                f"token {token!r} has the id {number}, but the embedding has {self._rows} rows"
            )
        tokens[number], types[number] = token, kind

    def _sentencepiece(self, tokens: Sequence[str]) -> dict[str, Field]:
        """Return the fields of a SentencePiece model, which merges the pair whose result has the highest score."""
        ranks: dict[str, int] = {}
        previous = None
        for left, right in self._merges:
            whole = left + right
            if whole != previous and whole in ranks:
                raise self._refused(f"its merges to {whole!r} do not follow each other")
            ranks.setdefault(whole, len(ranks))
            previous = whole
        scores = [float(-ranks.get(token, len(ranks))) for token in tokens]
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": self._space_scheme == "always",
        }

    @property
    def _space_scheme(self) -> str:
        """Where a space is put before text: ``always`` (also after special tokens), ``first`` or ``never``."""
        if not self._model.get("byte_fallback"):
            return "never"
        steps = [*_steps(self._parts["normalizer"]), *_steps(self._parts["pre_tokenizer"])]
        if any(step["type"] == "Prepend" for step in steps):
            return "always"
        return next((str(step["prepend_scheme"]) for step in steps if step["type"] == "Metaspace"), "never")

    def _bytes(self) -> dict[str, Field]:
        steps = tuple(_described(step) for step in _steps(self._parts["pre_tokenizer"]))
        if (name := PRE_TOKENIZERS.get(steps)) is None:
            raise self._refused(f"llama.cpp has no name for its pre-tokenizer {steps!r:.200}")
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in self._merges],
        }

    def _refused(self, why: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(f"{self._where}: llama.cpp cannot use this tokenizer: {why}")


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part.get("pretokenizers") or part.get("normalizers") or [part])


def _described(step: Mapping[str, Any]) -> tuple[object, ...]:
    match step["type"]:
        case "ByteLevel":
            return "ByteLevel", step["use_regex"]
        case "Digits":
            return "Digits", step["individual_digits"]
        case "Split":
            return "Split", step["pattern"].get("Regex")
    return (step["type"],)
