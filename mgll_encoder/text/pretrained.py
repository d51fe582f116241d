"""Loading foreign folders with transformers: their code never runs, without prompting, and errors are one line."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, MismatchError, UnsupportedCheckpointError, UserError
from mgll_encoder.common.library_bars import no_library_bars
from mgll_encoder.common.library_errors import library_reason
from mgll_encoder.common.progress import counter
from mgll_encoder.common.texts import read_json

CODE_FIELD = "auto_map"
"""The field with which a folder makes transformers run a Python file."""

CONFIGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
)
"""The configuration files of transformers, in the order in which it reads them."""

SENTENCEPIECE = "tokenizer.model"

_NEEDS_CODE = ("trust_remote_code", "Unrecognized processing class")
"""Parts of transformers' messages when it would have to run a folder's code."""

_LOADS_ANOTHER = "audio_tokenizer"
"""A field of processors that names another repository, which would be loaded silently."""


def load_pretrained(
    kind: Any,
    source: str | Path | None,
    what: str,
    *,
    advice: str = "",
    checked: bool = False,
    **options: Any,
) -> Any:
    """Call ``kind.from_pretrained(source, **options)`` without running code from the folder.

    Args:
        kind: A transformers class, including Auto classes.
        source: A folder or a hub id; None if the options contain everything.
        what: What is read and from where, such as ``the tokenizer in llava/``; begins the error message.
        advice: What was expected, or what to do; ends the error message.
        checked: Whether the folder has already passed `check_configs`.
        **options: Passed on.

    Raises:
        UserError: it cannot be read, or only by running its own code.
    """
    folder = Path(source) if source is not None and Path(source).is_dir() else None
    if folder is not None and not checked:
        check_configs(folder)
    try:
        with quiet(), nullcontext() if counter() else no_library_bars():
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except library_errors() as error:
        raise _unreadable(what, folder, error, advice) from error


def library_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of transformers, tokenizers and sentencepiece for damaged or foreign files.

    This is any exception: ``tokenizers`` raises bare exceptions, and few fields are checked before use.
    """
    return (Exception,)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs of transformers and sentencepiece; this project reports errors itself."""
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
    """Read a folder's configurations before transformers does, so that errors name the file and the field.

    Args:
        folder: The folder.
        config: The contents of its config.json, if already read.

    Raises:
        UserError: a file cannot be read, or names something to load or to run.
    """
    for name in CONFIGS:
        if not (folder / name).is_file():
            continue
        settings = config if config and name == CONFIGS[0] else read_json(folder / name)
        if settings.get(_LOADS_ANOTHER) is not None:
            raise UnsupportedCheckpointError(
                f"{folder / name}: field '{_LOADS_ANOTHER}' names another model to load; nothing was loaded: remove "
                "the field, audio is not supported"
            )
        code = settings.get(CODE_FIELD)
        if code is not None and not isinstance(code, dict | list):
            raise BadDataError(
                f"{folder / name}: field '{CODE_FIELD}' is {code!r}: expected an object; remove it"
            )


def _unreadable(what: str, folder: Path | None, error: Exception, advice: str) -> UserError:
    needs_code = any(sign in str(error) for sign in _NEEDS_CODE)
    asking = asks_for_code(folder) if folder and needs_code else None
    if asking is not None:
        file, code = asking
        return UnsupportedCheckpointError(
            f"{what} cannot be read without running Python code of its folder; none of it was run: {file} names it "
            f"in field '{CODE_FIELD}' ({code!s:.120}), and no transformers class instead: expected files that "
            "transformers can read itself"
        )
    if needs_code and "trust_remote_code" in str(error):
        return UnsupportedCheckpointError(
            f"{what} cannot be read without running Python code of its repository (field '{CODE_FIELD}'); none of "
            "it was run: expected a model that transformers can read itself"
        )
    reason = (folder and _damaged(folder)) or library_reason(error)
    return BadDataError(f"{what} cannot be read: {reason}{advice and f'; {advice}'}")


def _damaged(folder: Path) -> str | None:
    """Describe the first damaged file next to the weights; None if no damage is found."""
    for file in sorted(folder.glob("*.json")):
        try:
            read_json(file)
        except UserError as error:
            return str(error)
    model = folder / SENTENCEPIECE
    return None if not model.is_file() or is_sentencepiece(model) else f"{model} is not a SentencePiece model"


def is_sentencepiece(model: Path) -> bool:
    """Return whether a file is a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    with quiet():
        try:
            return bool(SentencePieceProcessor(model_file=str(model)).get_piece_size())
        except RuntimeError:
            return False


def check_loading_report(
    report: Mapping[str, Any],
    folder: Path,
    refused: Sequence[str] = ("missing_keys", "unexpected_keys", "mismatched_keys"),
) -> None:
    """Refuse a loading report of transformers (``output_loading_info=True``) that is not empty.

    Args:
        report: The report.
        folder: The folder that was loaded, for messages.
        refused: Which of its lists must be empty.

    Raises:
        MismatchError: a tensor is missing, unexpected, or of another shape than in the model.
    """
    for kind in refused:
        if keys := sorted(report[kind], key=str):
            raise MismatchError(
                f"{folder}: {len(keys)} {kind.removesuffix('_keys')} tensors, first {_with_shapes(keys[0])}: "
                "config.json and weights do not belong together, and loading would leave random weights"
            )


def _with_shapes(key: str | tuple[str, Any, Any]) -> str:
    """Describe a tensor of a loading report; a mismatched one with its found and expected shapes."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} of shape {list(found)} (expected {list(expected)})"


def asks_for_code(folder: Path) -> tuple[Path, Any] | None:
    """Return the first configuration of a folder that names code, and what it names."""
    for name in CONFIGS:
        file = folder / name
        if file.is_file() and (code := read_json(file).get(CODE_FIELD)):
            return file, code
    return None
