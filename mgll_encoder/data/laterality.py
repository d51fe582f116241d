"""Detection of texts that name a side of the body, which a mirrored image would make wrong."""

import re
from collections.abc import Iterable

_SIDE = re.compile(
    r"\b(left|right|lt|rt|l|r|od|os|oculus|dexter|dextra|sinister|sinistra|lat|lateral|ll|rl|lao|rao|lpo|rpo|decub\w*|"
    r"oblique)\b",
    re.IGNORECASE,
)
"""Words for left and right, for the right and left eye (OD, OS), and for views from one side (DICOM PS3.3 C.8.11.7:
LL, RL, LAO ...). "lateral" counts: in a mirrored lateral view the patient faces the other way."""


def names_side(texts: Iterable[str]) -> bool:
    """Return whether one of the texts names a side of the body, or a view from one side.

    "Nasal" and "temporal" do not count: a mirrored right eye is a left eye, and its nasal side is still nasal.
    """
    return any(_SIDE.search(text.replace("_", " ")) for text in texts)
