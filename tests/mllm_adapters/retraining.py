"""Small data and a small model that can learn, for the tests of the training commands."""

import json
import shutil
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from tests import builders

COLORS = {"red": (250, 0, 0), "blue": (0, 0, 250)}


def turns(*texts: str) -> list[dict[str, str]]:
    """LLaVA-format turns, the human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def color_rows(images: Path, n: int = 8) -> list[dict]:
    """Pictures of two colors, with the color's name as the answer; answers differ in length."""
    rows = []
    for i in range(n):
        name, color = list(COLORS.items())[i % 2]
        builders.picture(images, f"{i}.png", color)
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns("<image>\nWhich?", name)})
    return rows


def uneven_rows(images: Path, n: int = 8) -> list[dict]:
    """As `color_rows`, with answers of one to ``n`` words: batches of them differ in their number of tokens."""
    rows = color_rows(images, n)
    for i, row in enumerate(rows):
        row["conversations"][1]["value"] = " ".join(["of", "the", "sea", "and", "more"][: 1 + i % 5])
    return rows


def write_json(path: Path, value: object) -> Path:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def loud_llava(tiny: Path, folder: Path) -> Path:
    """A copy of the tiny LLaVA whose frozen language model is loud enough for the projector to steer it."""
    shutil.copytree(tiny, folder)
    model = LlavaForConditionalGeneration.from_pretrained(tiny)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name and parameter.ndim == 2:
                parameter.mul_(8)
        model.lm_head.weight.mul_(10)
    model.save_pretrained(folder)
    return folder
