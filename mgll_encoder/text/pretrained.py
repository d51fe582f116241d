"""Other people's folders read through transformers: their code never runs, nobody is asked, errors are one line."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.library_errors import library_reason
from mgll_encoder.common.texts import read_json

CODE_FIELD = "auto_map"
"""The field with which a folder asks transformers to run a Python file."""

CONFIGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
)
"""The files that transformers goes by, in the order in which it reads them."""

SENTENCEPIECE = "tokenizer.model"

_NEEDS_CODE = ("trust_remote_code", "Unrecognized processing class")
"""What transformers says where it would have to run a folder's code."""

_LOADS_ANOTHER = "audio_tokenizer"
"""A field of processors that names another repository, which would be loaded without a word."""


def load_pretrained(
    kind: Any,
    source: str | Path | None,
    what: str,
    *,
    advice: str = "",
    checked: bool = False,
    **options: Any,
) -> Any:
    """What ``kind.from_pretrained(source, **options)`` gives, without running code of the folder.

    Args:
        kind: A class of transformers, an Auto class too.
        source: A folder or a hub id; None where the options hold everything.
        what: What is read and where it lies, such as ``the tokenizer in llava/``; begins the error message.
        advice: What was expected, or what to do; ends the error message.
        checked: The folder has passed `check_configs` already.
        **options: Passed on.

    Raises:
        UserError: it cannot be read, or only with code of its own.
    """
    folder = Path(source) if source is not None and Path(source).is_dir() else None
    if folder is not None and not checked:
        check_configs(folder)
    try:
        with quiet():
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except library_errors() as error:
        raise _unreadable(what, folder, error, advice) from error


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers, tokenizers and sentencepiece raise on damaged or foreign files.

    That is anything at all: ``tokenizers`` raises bare exceptions, and few fields are checked before they are used.
    """
    return (Exception,)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the reports of transformers and sentencepiece off the screen; what is wrong is told by our own errors."""
    import sentencepiece

    sentencepiece.set_min_log_level(3)
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def check_configs(folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Read a folder's configurations once before transformers does, so that errors name the file and the field.

    Args:
        folder: The folder.
        config: The contents of its config.json, where they have been read already.

    Raises:
        UserError: one of them cannot be read, or names something to load or to run.
    """
    for name in CONFIGS:
        if not (folder / name).is_file():
            continue
        settings = config if config and name == CONFIGS[0] else read_json(folder / name)
        if settings.get(_LOADS_ANOTHER) is not None:
            raise UserError(
                f"{folder / name}: field '{_LOADS_ANOTHER}' names another model to load; nothing was loaded: remove "
                "the field, models here take no sound"
            )
        code = settings.get(CODE_FIELD)
        if code is not None and not isinstance(code, dict | list):
            raise UserError(
                f"{folder / name}: field '{CODE_FIELD}' is {code!r}: expected an object; remove it"
            )


def _unreadable(what: str, folder: Path | None, error: Exception, advice: str) -> UserError:
    needs_code = any(sign in str(error) for sign in _NEEDS_CODE)
    asking = _asks_for_code(folder) if folder and needs_code else None
    if asking is not None:
        file, code = asking
        return UserError(
            f"{what} cannot be read without running Python code of its folder; nothing of it was run: {file} names it "
            f"in field '{CODE_FIELD}' ({code!s:.120}), and no class of transformers in its place: expected files that "
            "transformers reads by itself"
        )
    if needs_code and "trust_remote_code" in str(error):
        return UserError(
            f"{what} cannot be read without running Python code of its repository (field '{CODE_FIELD}'); nothing of "
            "it was run: expected a model that transformers reads by itself"
        )
    reason = (folder and _damaged(folder)) or library_reason(error)
    return UserError(f"{what} cannot be read: {reason}{advice and f'; {advice}'}")


def _damaged(folder: Path) -> str | None:
    """What is wrong with the first damaged file beside the weights, so that it is named; None if none is seen to be."""
    for file in sorted(folder.glob("*.json")):
        try:
            read_json(file)
        except UserError as error:
            return str(error)
    model = folder / SENTENCEPIECE
    return None if not model.is_file() or is_sentencepiece(model) else f"{model} is no SentencePiece model"


def is_sentencepiece(model: Path) -> bool:
    """Whether a file is a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    with quiet():
        try:
            return bool(SentencePieceProcessor(model_file=str(model)).get_piece_size())
        except RuntimeError:
            return False


def _asks_for_code(folder: Path) -> tuple[Path, Any] | None:
    """The first configuration of a folder that names code, and what it names."""
    for name in CONFIGS:
        file = folder / name
        if file.is_file() and (code := read_json(file).get(CODE_FIELD)):
            return file, code
    return None
