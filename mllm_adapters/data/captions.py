"""Image-caption manifests as training rows: a question from a frozen list, and the caption as its answer."""

import random
from collections.abc import Mapping, Sequence

CAPTION_PROMPTS_VERSION = "captions-1"
"""Changes when the list below does: other questions make another training set."""

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
"""In place of a granularity's name: the texts of every granularity, coarse to fine."""


def caption(
    texts: Mapping[str, Sequence[str]], granularities: Sequence[str], chosen: str = ALL
) -> str | None:
    """What a manifest's row says of its image, one sentence per granularity.

    Args:
        texts: Granularity -> texts that are true of the image.
        granularities: All of them, coarse to fine.
        chosen: The granularity to take, or `ALL`.

    Returns:
        The caption, or None where the row has no text at the chosen granularity.
    """
    taken = granularities if chosen == ALL else (chosen,)
    sentences = [", ".join(texts.get(name, ())).rstrip(" .") for name in taken]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences if text) or None


def caption_prompt(image: str, seed: int) -> str:
    """The question that an image is asked; it depends on seed and image only, so new rows change no old one's."""
    return random.Random(f"{seed}:{image}").choice(CAPTION_PROMPTS)
