"""Contact sheets: a look at the model's input before a long run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.cli import main
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.data.contact_sheet import RULE, seen, write_contact_sheet
from tests.builders import invoke, refused
from tests.mgll_encoder.radiographs import radiograph, ramp


def wide(path: Path, value: int = 0) -> Path:
    """A picture of 60 x 20 pixels, bright on its right."""
    pixels = np.full((20, 60, 3), (value, 40, 60), np.uint8)
    pixels[:, 40:] = 230
    Image.fromarray(pixels).save(path)
    return path


def test_a_page_shows_each_picture_before_and_after(tmp_path: Path) -> None:
    files = [wide(tmp_path / f"SECRET_{i}.png", 9 * i) for i in range(20)]
    assert write_contact_sheet([(f"#{i}", file) for i, file in enumerate(files)], tmp_path / "a.png") == 12
    page = Image.open(tmp_path / "a.png")
    assert (page.info, page.mode) == ({}, "RGB")
    write_contact_sheet([(f"#{i}", file) for i, file in enumerate(files)], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    left, right = (np.asarray(page)[56:280, start : start + 224].astype(int) for start in (16, 248))
    bright = [(tile.min(axis=2) > 220).mean() for tile in (left, right)]
    assert bright == pytest.approx([1 / 9, 1 / 3], abs=0.02), "whole in its shape; squashed to the square"


def test_the_right_half_is_what_the_tower_gets(tmp_path: Path) -> None:
    picture = Image.open(wide(tmp_path / "a.png"))
    squashed = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(seen(picture, RULE)).astype(int) - squashed).max() <= 1


def test_radiographs_and_questions_come_with_a_sheet(tmp_path: Path) -> None:
    for number in range(3):
        radiograph(tmp_path / "in" / f"SECRET_{number}.dcm", ramp(3000 + number))
    command = ["data", "xray", "--dicom", tmp_path / "in", "--out", tmp_path / "out"]
    assert "expected a name that ends in .png" in refused(main, *command, "--contact-sheet", "sheet.jpg")
    assert not (tmp_path / "out").exists()
    done = invoke(main, *command, "--contact-sheet", tmp_path / "x.png")
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "x.png").width > 400

    rows = ["file,labels"]
    for number in range(12):
        wide(tmp_path / f"{number}.png", 10 * number)
        rows.append(f"{number}.png,{'diabetic retinopathy' if number % 2 else 'glaucoma'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    done = invoke(
        eval_mcq, "build", "--labels", tmp_path / "labels.csv", "--images", tmp_path, "--out", tmp_path / "b.jsonl",
        "--diseases", "DR,Glaucoma", "--options", 2, "--contact-sheet", tmp_path / "b.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "12 of 12 images to look at" in done.out
    assert Image.open(tmp_path / "b.png").width > 1000


def test_no_picture_makes_no_page(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no picture"):
        write_contact_sheet([], tmp_path / "a.png")
