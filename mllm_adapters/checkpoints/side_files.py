"""Copies the files next to the weights that the libraries use, without local paths.

A working model folder collects label tables, logs, tokens and training states. They are not copied to
outputs: only listed files are copied, and the others are named once.
"""

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.local_paths import without_local
from mgll_encoder.common.texts import read_json
from mgll_encoder.common.trained_on import TRAINED_ON

PUBLISHED = (
    # the model
    "config.json",
    "generation_config.json",
    # images
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    # text
    "*.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    # terms
    "readme.md",
    "licen[cs]e",
    "licen[cs]e.*",
    "licen[cs]e-*",
    "notice",
    "notice.*",
    "copying",
    "use_policy.*",
    # records of this project
    "mgll_swap.json",
    TRAINED_ON,
)
"""Names of files that are copied, as patterns for `fnmatch` in lower case."""

RECORDS: Mapping[str, tuple[str, ...]] = {"training.json": ("command", "data_sha256", "losses")}
"""Files copied only if their fields show that they are records of this project: others use the same names for data."""

WITHOUT_PATHS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "training.json",
)
"""Files that may contain local paths, which are removed."""

TEMPLATES = "additional_chat_templates"
"""Folder of a processor with several chat templates."""


def published(folder: Path) -> list[Path]:
    """Return the files of a model folder and its tokenizer folders that may be copied to an output."""
    return sorted(file for file in folder.iterdir() if file.is_file() and is_published(file))


def left_behind(folder: Path, known: Collection[Path]) -> list[str]:
    """Return names in a model folder that are neither copied nor known, without hidden ones.

    Args:
        folder: The folder.
        known: Files and folders in it that are used otherwise: weights, tokenizers, parts.
    """
    resolved = {path.absolute() for path in (*published(folder), *known)}
    around = {parent for path in resolved for parent in path.parents}
    left = (
        path for path in folder.absolute().iterdir() if path not in resolved | around and path.name[0] != "."
    )
    return sorted(path.name + ("/" if path.is_dir() else "") for path in left)


def remove_paths(folder: Path) -> None:
    """Rewrite the configurations in and below a folder that contain a local path."""
    for file in folder.rglob("*.json"):
        if file.name not in WITHOUT_PATHS:
            continue
        content = read_json(file)
        if (cleaned := without_local(content)) != content:
            file.write_bytes(json_bytes(cleaned))


def json_bytes(content: Any) -> bytes:
    """Format a configuration as in a file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def is_published(file: Path) -> bool:
    """Whether a file is used by the libraries next to weights, or is a record of this project."""
    name = file.name.lower()
    if any(fnmatch(name, pattern) for pattern in PUBLISHED):
        return True
    return name in RECORDS and _has_fields(file, RECORDS[name])


def _has_fields(file: Path, fields: Collection[str]) -> bool:
    try:
        return read_json(file).keys() >= set(fields)
    except UserError:
        return False
