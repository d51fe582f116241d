"""Plain explanations for errors of transformers, tokenizers, PEFT and sentencepiece."""

import re

from mgll_encoder.common.errors import UserError

_SHAPES = "its tensors do not have the shapes that its config.json describes"
_TOKENIZER = "the files of its tokenizer are damaged, incomplete, or of a newer release"

PLAIN_WORDS: tuple[tuple[str, str], ...] = (
    (r"CONVERSION|ignore_mismatched_sizes|size mismatch for", _SHAPES),
    (r"Unrecognized processing class", "no processor class that transformers knows is named"),
    (r"Unrecognized image processor", "no image processor that transformers knows is named (image_processor_type)"),
    (r"Unrecognized model type for subconfig: (\S+?)\.", r"transformers knows no model_type '\1'"),
    (r"model type `(\S+?)` but Transformers does not recognize", r"transformers knows no model_type '\1'"),
    (r"Unrecognized (?:model in|configuration class)", "it has no model_type that transformers knows"),
    (r"untagged enum|Unknown tokenizer version|backend tokenizer|tiktoken|added_tokens", _TOKENIZER),
    (r"module 'torch' has no attribute '(\w+)'", r"'\1' is not a torch dtype"),
    (r"ZeroDivisionError", "a size or number in it is 0, which is invalid"),
    (r"KeyError\((.+)\)", r"\1 is missing from it, or is not known to transformers"),
    (r"unexpected keyword argument '(\w+)'", r"transformers knows no field '\1' of it"),
    (r"(?:Error|Exception)\([\"'](.+)[\"']\)$", r"transformers says: \1"),
)  # fmt: skip
"""Pattern over ``repr`` of an error -> what it means; the first match counts."""

_LONGEST = 200


def library_reason(error: Exception) -> str:
    """Explain a library's error in one line; the message of a `UserError` is returned as it is."""
    if isinstance(error, UserError):
        return str(error)
    said = repr(error)
    for pattern, meaning in PLAIN_WORDS:
        if found := re.search(pattern, said, re.DOTALL):
            return _one_line(found.expand(meaning))
    return _one_line(said)


def _one_line(text: str) -> str:
    return " ".join(text.replace("\\n", "\n").split())[:_LONGEST]
