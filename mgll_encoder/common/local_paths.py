"""Removal of local paths from published settings: they may reveal people, projects and sites."""

import re
from collections.abc import Mapping
from typing import Any

_PATH = re.compile(r"(?:/|~[/\\]|[A-Za-z]:[/\\])[^\n<>{}|]*[/\\][^\n<>{}|]*")
_IN_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+")
_CODE = "auto_map"
_TEXTS = (
    "chat_template",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
"""Fields with texts that may look like paths but are not."""


def without_local(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without local paths (the last component or hub id is kept) and without names of code."""
    return {
        key: value if key in _TEXTS else _cleaned(value) for key, value in settings.items() if key != _CODE
    }


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_local(value)
    if isinstance(value, list):
        return [_cleaned(entry) for entry in value]
    if not (isinstance(value, str) and _PATH.fullmatch(value)):
        return value
    if cached := _IN_CACHE.search(value):
        return "/".join(cached.groups())
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
