"""Files of a model folder in the form that transformers 4 reads as well as transformers 5.

transformers 5 writes names and fields that earlier releases do not know: they refuse the tokenizer, or ignore what
they should read (checked with 4.49 and 4.57, ``make test-clients``).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.texts import read_json
from mllm_adapters.checkpoints.side_files import TEMPLATES, json_bytes

_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_JINJA, _JSON = "chat_template.jinja", "chat_template.json"


def rewrite_for_older_releases(folder: Path) -> None:
    """Rewrite tokenizer and processor files of a folder that holds image preprocessing in a file of its own.

    Raises:
        UserError: a file cannot be read.
    """
    _rewrite(folder / "tokenizer_config.json", older_tokenizer)
    if (folder / "preprocessor_config.json").is_file():
        _rewrite(folder / "processor_config.json", older_processor)
    if (folder / _JINJA).is_file() and not (folder / TEMPLATES).exists():
        template = (folder / _JINJA).read_text(encoding="utf-8")
        (folder / _JSON).write_bytes(json_bytes({"chat_template": template}))


def older_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` with the class, the special tokens and the inputs as transformers 4 spells them."""
    older = {key: value for key, value in settings.items() if key != "backend"}
    if older.get("tokenizer_class") == _NEW_CLASS:
        # The older class would also give token_type_ids, which no language model here takes.
        inputs = older.get("model_input_names", ["input_ids", "attention_mask"])
        older |= {"tokenizer_class": _OLD_CLASS, "model_input_names": inputs}
    if isinstance(extra := older.get("extra_special_tokens"), list):
        del older["extra_special_tokens"]
        older["additional_special_tokens"] = [*older.get("additional_special_tokens", []), *extra]
    return older


def older_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``processor_config.json`` without image preprocessing, which releases before 4.57 read from its own file only."""
    return {key: value for key, value in settings.items() if key != "image_processor"}


def with_rope_theta(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with ``rope_theta`` next to ``rope_parameters``; transformers 4 reads the first, else 10000."""
    own = {
        key: with_rope_theta(value) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        return {"rope_theta": rope["rope_theta"], **own}
    return own


def _rewrite(file: Path, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    if file.is_file() and (changed := change(content := read_json(file))) != content:
        file.write_bytes(json_bytes(changed))
