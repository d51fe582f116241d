"""A picture is mirrored only where somebody asks for it and no text becomes untrue by it."""

import pytest

from mgll_encoder.data.fundus import read_explanations
from mgll_encoder.data.laterality import names_side


@pytest.mark.parametrize(
    "text",
    [
        "glaucoma of the left eye", "OD", "OS: cataract", "Chest LAT", "XR CHEST 2 VIEWS PA AND LATERAL", "R hip",
        "RT foot", "RAO view", "l decubitus", "XR_LEFT_KNEE",
    ],
)  # fmt: skip
def test_sides_are_found(text: str) -> None:
    assert names_side(["normal", text])


@pytest.mark.parametrize(
    "text",
    [
        "glaucoma",
        "PA",
        "normal fundus",
        "bright drusen",
        "temporal pallor",
        "XR CHEST 1 VIEW AP",
        "collateral",
    ],
)
def test_other_words_are_no_sides(text: str) -> None:
    assert not names_side([text])


def test_no_explanation_of_ours_names_a_side() -> None:
    assert not [text for text in read_explanations().explanations.values() if names_side([text])]
