"""Writes the processor of a LLaVA with an unchanged tokenizer as text files, without importing transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.texts import read_json, read_text
from mgll_encoder.tower.preprocess import processor_settings
from mllm_adapters.checkpoints.side_files import TEMPLATES as SEVERAL
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.planning import IMAGE_TOKEN
from mllm_adapters.core.processing import has_tokenizer

IMAGES, PROCESSOR = "preprocessor_config.json", "processor_config.json"

TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Files of a processor's only chat template, since and before transformers 4.50."""


def processor_files(plan: Plan) -> dict[str, str] | None:
    """Return the files of the planned processor, name -> text, except the source's tokenizer files, which are copied.

    Returns:
        None if the source's processor is not an ordinary LlavaProcessor with one tokenizer.json:
        transformers must then read it.
    """
    images = processor_settings(plan.after)
    files = {IMAGES: as_json(images)}
    source = plan.source
    if not has_tokenizer(source):
        return files
    image_token = _plain_placeholder(source)
    if image_token is None or _token_id(source / "tokenizer.json", image_token) != plan.image_token_id:
        return None
    settings = {
        "image_processor": images,
        "image_token": image_token,
        "num_additional_image_tokens": plan.after.leading,  # a class token, which the strategy removes
        "patch_size": plan.after.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": plan.after.select_strategy,
    }
    templates = {name: (source / name) for name in TEMPLATES if (source / name).is_file()}
    texts = {name: read_text(file, "chat template") for name, file in templates.items()}
    return {**files, PROCESSOR: as_json(settings), **texts}


def as_json(settings: Mapping[str, Any]) -> str:
    """Format settings as transformers does."""
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def _plain_placeholder(folder: Path) -> str | None:
    """Return the image placeholder of a folder with an ordinary LlavaProcessor, else None."""
    if not (folder / "tokenizer.json").is_file() or (folder / SEVERAL).exists():
        return None
    if not any((folder / name).is_file() for name in (IMAGES, PROCESSOR)):
        return None
    settings = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    own = folder / "tokenizer_config.json"
    named_by_tokenizer = own.is_file() and "image_token" in read_json(own)
    kind = settings.get("processor_class", "LlavaProcessor")
    if kind != "LlavaProcessor" or "chat_template" in settings or named_by_tokenizer:
        return None
    return str(settings.get("image_token", IMAGE_TOKEN))


def _token_id(file: Path, token: str) -> int | None:
    """Return the id of a special token in a tokenizer.json; None if it is missing or the file is damaged."""
    added = read_json(file).get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return next((entry.get("id") for entry in entries if entry.get("content") == token), None)
