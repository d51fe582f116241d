import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mgll_encoder.cli.data import app
from mgll_encoder.common.errors import InvalidArgumentError, OutputTakenError, UnknownNameError
from mgll_encoder.data.manifest import read_header, read_rows
from mgll_encoder.data.phantom.dataset import GRADES, write_phantom
from mgll_encoder.data.phantom.findings import FINDINGS
from mgll_encoder.data.phantom.photographs import render


def pixels(*arguments, **settings) -> np.ndarray:
    return np.asarray(render(*arguments, **settings), dtype=np.float32)


def test_the_same_seed_draws_the_same_picture_and_another_seed_another():
    first = pixels(["glaucoma"], 3)
    assert np.array_equal(first, pixels(["glaucoma"], 3))
    assert np.abs(first - pixels(["glaucoma"], 4)).mean() > 3


def test_the_pictures_are_those_that_published_figures_were_made_with():
    """README's figures of the demo depend on every pixel; a little room for other processors' rounding."""
    colors = {
        "": (103.06, 45.77, 24.12),
        "diabetic retinopathy": (102.15, 46.23, 25.13),
        "retinitis": (91.92, 43.21, 24.29),
        "media haze": (109.74, 77.14, 62.61),
    }
    with Image.open(Path(__file__).parents[1] / "data" / "phantom.png") as strip:
        published = np.split(np.asarray(strip, dtype=np.float32), len(colors), axis=1)
    for (label, color), before in zip(colors.items(), published, strict=True):
        picture = pixels([label] if label else [], 3, left_eye=label == "diabetic retinopathy")
        assert picture.mean((0, 1)) == pytest.approx(color, abs=0.05)
        assert changed(picture, before) < 0.002
        assert changed(np.roll(picture, 1, axis=1), before) > 0.2, "a shift by a pixel is seen"


def changed(picture: np.ndarray, before: np.ndarray) -> float:
    """Share of the values that differ by more than one level."""
    return float((np.abs(picture - before) > 1).mean())


@pytest.mark.parametrize("label", FINDINGS)
def test_every_disease_is_visible_and_more_so_when_severe(label):
    healthy = [pixels([], seed) for seed in range(4)]
    changes = {
        severity: np.mean(
            [np.abs(pixels([label], s, severity=severity) - healthy[s]).mean() for s in range(4)]
        )
        for severity in (0.0, 1.0)
    }
    assert changes[0.0] > 0.3  # grey levels, mean over the whole picture
    assert changes[1.0] > changes[0.0]


def test_a_left_eye_has_its_disc_on_the_left():
    def bright_side(left: bool) -> float:
        brightness = np.mean([pixels(["glaucoma"], s, left_eye=left).sum(2) for s in range(6)], axis=0)
        return float(brightness[20:44, :32].max() - brightness[20:44, 32:].max())

    assert bright_side(True) > 0 > bright_side(False)


def test_the_picture_is_round_on_black_at_any_size():
    for size in (64, 200):
        picture = pixels([], 0, size=size)
        assert picture.shape == (size, size, 3)
        assert picture[:4, :4].mean() < 8 < 60 < picture[size // 2, size // 2].mean()


def test_an_unknown_disease_is_suggested():
    with pytest.raises(UnknownNameError, match="did you mean 'glaucoma'"):
        render(["glaucom"], 0)


def test_the_data_set_has_two_eyes_per_patient_and_equal_classes(tmp_path: Path):
    result = CliRunner().invoke(app, ["phantom", "--out", str(tmp_path / "set"), "--images-per-disease", "3"])
    assert result.exit_code == 0, result.output
    assert "Next: mgll-encoder data fundus" in result.output.replace("\n", " ")
    with (tmp_path / "set" / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 33
    for label in ("normal", *FINDINGS):
        mine = [row for row in rows if row["labels"] == label]
        assert len(mine) == 3
        assert len({row["patient_or_source_id"] for row in mine}) == 2
        words = {row["raw_label_or_keywords"].split()[0] for row in mine}
        assert words <= ({"normal"} if label == "normal" else set(GRADES))
    assert all((tmp_path / "set" / row["file"]).is_file() for row in rows)
    assert (tmp_path / "set" / "contact_sheet.png").is_file()


def test_a_general_tower_has_texts_to_learn_from_that_name_no_disease(tmp_path: Path):
    write_phantom(tmp_path / "set", 12)
    manifest = tmp_path / "set" / "views.jsonl"
    header, rows = read_header(manifest), [row for _, _, row in read_rows(manifest)]
    assert header.granularities == ["eye", "light", "color"]
    assert len(rows) == 12 * 11
    for row in rows:
        assert (tmp_path / "set" / row.image).is_file()
        side = "left" if row.image.endswith("left.png") else "right"
        assert row.texts["eye"] == [f"a photograph of a {side} eye, the optic disc on the {side}"]
    said = Counter(text for row in rows for texts in row.texts.values() for text in texts)
    assert not [text for text in said for disease in FINDINGS if disease in text]
    for words in ("a dark", "an evenly lit", "a bright"), ("a pale", "an orange", "a red"):
        counts = [sum(n for text, n in said.items() if text.startswith(f"{word} ")) for word in words]
        assert sum(counts) == len(rows)
        assert min(counts) > len(rows) / 6, "each word is true of many pictures"


def test_the_data_set_is_written_once_and_never_half(tmp_path: Path):
    write_phantom(tmp_path / "a", 1)
    write_phantom(tmp_path / "b", 1)
    for name in ("labels.csv", "images/phantom-00004_right.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(OutputTakenError, match="exists"):
        write_phantom(tmp_path / "a", 1)
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        write_phantom(tmp_path / "c", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
