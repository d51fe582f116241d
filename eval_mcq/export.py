"""Questions as training conversations in LLaVA's format."""

import json
import os
from pathlib import Path

from eval_mcq.prompt import render
from eval_mcq.schema import Bench, MCQItem
from mgll_encoder.common.errors import UserError


def llava_conversations(bench: Bench, images: Path) -> str:
    """The bench as LLaVA conversations JSON: the prompt that the scorer uses, answered by the true letter.

    Args:
        bench: The questions.
        images: Folder that image paths are written relative to.

    Raises:
        UserError: a question has more than one image, which this format does not express.
    """
    return json.dumps([_conversation(bench, item, images.resolve()) for item in bench.items], indent=1) + "\n"


def _conversation(bench: Bench, item: MCQItem, images: Path) -> dict[str, object]:
    if len(item.images) != 1:
        raise UserError(
            f"bench {bench.path}: question '{item.id}' has {len(item.images)} images, LLaVA's format holds one"
        )
    path = Path(os.path.relpath(bench.image_paths(item)[0].resolve(), images))
    return {
        "id": item.id,
        "image": path.as_posix(),
        "conversations": [
            {"from": "human", "value": f"<image>\n{render(item)}"},
            {"from": "gpt", "value": item.letter},
        ],
    }
