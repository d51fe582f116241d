"""Descriptions of a photograph without medical content: side of the eye, brightness, color.

The general tower of the demo is trained on such texts; it plays the part of a CLIP trained on everyday pictures.
"""

import numpy as np
from PIL import Image

LIGHT = ((0.34, "a dark"), (0.40, "an evenly lit"), (1.0, "a bright"))
"""Upper bounds of the mean brightness within the field (about terciles of the phantom), and their words."""

COLOR = ((1.95, "a pale"), (2.2, "an orange"), (float("inf"), "a red"))
"""Upper bounds of red over green within the field, and their words."""

GRANULARITIES = ("eye", "light", "color")


def view_texts(picture: Image.Image, left: bool) -> dict[str, list[str]]:
    """Return the texts of a photograph by granularity.

    Args:
        picture: A square RGB photograph with a round field.
        left: Whether it shows a left eye.
    """
    rgb = np.asarray(picture, np.float32) / 255
    axis = (np.arange(len(rgb)) + 0.5) / len(rgb) * 2 - 1
    red, green, blue = rgb[np.hypot(axis[:, None], axis) < 0.85].mean(axis=0)
    side = "left" if left else "right"
    return {
        "eye": [f"a photograph of a {side} eye, the optic disc on the {side}"],
        "light": [f"{_word((red + green + blue) / 3, LIGHT)} photograph"],
        "color": [f"{_word(red / max(green, 1e-6), COLOR)} retina"],
    }


def _word(value: float, words: tuple[tuple[float, str], ...]) -> str:
    return next(word for bound, word in words if value <= bound)
