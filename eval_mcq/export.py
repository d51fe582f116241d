"""Questions as training conversations in LLaVA's format."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from eval_mcq.prompt import render
from eval_mcq.schema import Bench, MCQItem


def llava_conversations(bench: Bench, images: Path) -> str:
    """The bench as LLaVA conversations JSON: the prompt that the scorer uses, answered by the true letter.

    Args:
        bench: The questions.
        images: Folder that image paths are written relative to.
    """
    return json.dumps([_conversation(bench, item, images.resolve()) for item in bench.items], indent=1) + "\n"


def _conversation(bench: Bench, item: MCQItem, images: Path) -> dict[str, object]:
    paths = [Path(os.path.relpath(path.resolve(), images)).as_posix() for path in bench.image_paths(item)]
    return {
        "id": item.id,
        "image": paths[0] if len(paths) == 1 else paths,
        "conversations": [
            {"from": "human", "value": "<image>\n" * len(paths) + render(item)},
            {"from": "gpt", "value": item.letter},
        ],
    }


EXPORTERS: Mapping[str, Callable[[Bench, Path], str]] = {"llava": llava_conversations}
"""Format name to a function from the bench and the image folder to the text of the file."""
