"""Image-caption manifests as training rows: a question from a frozen list, and the caption as its answer."""

import random
from collections.abc import Mapping, Sequence

CAPTION_PROMPTS_VERSION = "captions-1"
"""Changes with the list below: other questions make another training set."""

CAPTION_PROMPTS: tuple[str, ...] = (
    "What does this image show?",
    "Describe the image.",
    "Summarize the findings in this image.",
    "What can be seen in this image?",
    "Write a short report on this image.",
    "State what is visible in the image.",
    "Give a brief description of this image.",
    "Which findings does the image have?",
)

ALL = "all"
"""Selects the texts of every granularity, coarse to fine, instead of one granularity."""


def caption(
    texts: Mapping[str, Sequence[str]], granularities: Sequence[str], chosen: str = ALL
) -> str | None:
    """Make a caption from a manifest's row, one sentence per granularity.

    Args:
        texts: Granularity -> texts that are true for the image.
        granularities: All of them, coarse to fine.
        chosen: The granularity to take, or `ALL`.

    Returns:
        The caption, or None if the row has no text at the chosen granularity.
    """
    taken = granularities if chosen == ALL else (chosen,)
    sentences = [", ".join(texts.get(name, ())).rstrip(" .") for name in taken]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences if text) or None


def caption_prompt(image: str, seed: int) -> str:
    """Choose the question for an image; it depends only on seed and image, so adding rows changes no other row."""
    return random.Random(f"{seed}:{image}").choice(CAPTION_PROMPTS)
