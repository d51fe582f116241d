"""Plain explanations for errors of transformers, tokenizers, PEFT and sentencepiece."""

import re
from collections.abc import Iterator
from importlib import metadata

from mgll_encoder.common.errors import MissingPackageError, UserError

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
    """Explain a library's error in one line; the message of a `UserError` is returned as it is.

    Raises:
        UserError: the library could not be imported, so that no file is at fault; see `broken_installation`.
    """
    if isinstance(error, UserError):
        return str(error)
    if (broken := broken_installation(error)) is not None:
        raise broken from error
    said = repr(error)
    for pattern, meaning in PLAIN_WORDS:
        if found := re.search(pattern, said, re.DOTALL):
            return _one_line(found.expand(meaning))
    return _one_line(said)


def broken_installation(error: BaseException) -> MissingPackageError | None:
    """Return an error that names the packages at fault if a library's module could not be imported; None otherwise.

    transformers imports its modules when they are first used, wherever that is, and raises
    ``Could not import module 'LlamaConfig'`` from the cause.
    """
    chain = list(_chain(error))
    if any("torchvision::" in str(one) for one in chain):
        return MissingPackageError(
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not fit each other "
            f"({_one_line(str(chain[-1]))}): install both from one index, pip install "
            "--force-reinstall torch torchvision (for CPUs with --index-url https://download.pytorch.org/whl/cpu)"
        )
    if any(isinstance(one, ImportError) and "Could not import module" in str(one) for one in chain):
        cause = f"{type(chain[-1]).__name__}: {chain[-1]}"
        return MissingPackageError(
            f"a package that transformers needs cannot be imported ({_one_line(cause)}): install it again"
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _one_line(text: str) -> str:
    return " ".join(text.replace("\\n", "\n").split())[:_LONGEST]
