"""A picture is mirrored only on request, and only if none of its texts becomes wrong."""

from pathlib import Path

import pytest
from PIL import Image

from mgll_encoder.common.skipped import Skipped
from mgll_encoder.data.batches import ManifestImages, plan_rows
from mgll_encoder.data.fundus import read_explanations
from mgll_encoder.data.laterality import names_side
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES


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


def test_pretraining_mirrors_only_when_asked_and_never_where_a_text_names_a_side(tmp_path: Path) -> None:
    marked = Image.new("RGB", (32, 32))
    marked.paste((255, 255, 255), (0, 0, 12, 32))
    marked.save(tmp_path / "a.png")
    texts = {"a.png": "glaucoma", "b.png": "glaucoma of the left eye"}
    marked.save(tmp_path / "b.png")
    path = tmp_path / "m.jsonl"
    rows = [
        ManifestRow(image=name, texts={"view": [text], "disease": ["glaucoma"]})
        for name, text in texts.items()
    ]
    write_manifest(path, tmp_path, ManifestHeader(granularities=["view", "disease"]), rows)
    plan = plan_rows(path, None, ("disease",), "train", False, Skipped())
    spec = TOWER_SIZES["tiny"].spec.model_copy(update={"image_size": 32})

    def mirrored(index: int, flip: bool) -> list[bool]:
        data, found = ManifestImages(plan, spec, seed=0, flip=flip), []
        for epoch in range(20):
            data.set_epoch(epoch)
            pixels = data[index]["pixels"].mean(dim=(0, 1))
            found.append(bool(pixels[16:].sum() > pixels[:16].sum()))
        return found

    assert not any(mirrored(0, flip=False))
    assert 4 < sum(mirrored(0, flip=True)) < 16
    assert not any(mirrored(1, flip=True)), "the text names a side, at a granularity that is not even in use"


def test_no_explanation_of_ours_names_a_side() -> None:
    assert not [text for text in read_explanations().explanations.values() if names_side([text])]
