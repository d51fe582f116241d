"""A user looks at attention and attribution maps of a tower."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mgll_encoder
from mgll_encoder import InvalidArgumentError, NotFoundError, Tower, TowerSpec, build_model, save_tower
from mgll_encoder.cli import main
from mgll_encoder.probing import explain as explaining
from mgll_encoder.probing.explain import (
    ATTENTION,
    ROLLOUT,
    Target,
    attention_maps,
    class_target,
    stretched,
    target_maps,
)
from mgll_encoder.probing.linear import fit_linear
from tests.builders import invoke, refused

SPEC = TowerSpec(
    width=8, depth=2, heads=2, mlp_width=8, patch_size=8, image_size=40, activation="gelu",
    mean=(0, 0, 0), std=(1, 1, 1),
)  # fmt: skip
CHANNEL = Target("brightness", "value", lambda pooled: pooled[:, 0])


def planted(attends: bool = True) -> Tower:
    """A tower whose class token attends to bright patches, and copies their brightness to channel 0."""
    model = build_model(SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]:
            norm.weight.fill_(1)
        patch = model.embeddings.patch_embedding.weight
        patch[0], patch[1] = 3 / patch[0].numel(), -3 / patch[0].numel()
        model.embeddings.class_embedding[2:4] = torch.tensor([1.0, -1.0])
        model.embeddings.position_embedding.weight[1:, 2:4] = torch.tensor([1.0, -1.0])
        for layer in model.encoder.layers:
            attention = layer.self_attn
            for head in (0, 4):
                attention.q_proj.bias[head] = 8
                attention.k_proj.weight[head, 0] = float(attends)
            attention.v_proj.weight[0, 0] = attention.out_proj.weight[0, 0] = 1
    return Tower.from_model(model, SPEC)


def photographs(count: int = 12) -> tuple[torch.Tensor, np.ndarray]:
    """Gray noise with one bright patch each, and the index of that patch."""
    rng = np.random.default_rng(0)
    places = rng.integers(25, size=count)
    pixels = rng.uniform(0, 0.2, (count, 3, 40, 40)).astype(np.float32)
    for picture, place in zip(pixels, places, strict=True):
        row, column = 8 * (place // 5), 8 * (place % 5)
        picture[:, row : row + 8, column : column + 8] = 1
    return torch.from_numpy(pixels), places


def peaks(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(len(maps), -1).argmax(axis=1)


def test_every_map_peaks_on_the_planted_patch() -> None:
    pixels, places = photographs()
    maps = attention_maps(planted(), pixels)
    maps["target"], scores = target_maps(planted(), pixels, CHANNEL)
    for name, found in maps.items():
        assert found.shape == (12, 5, 5), name
        assert peaks(found).tolist() == places.tolist(), name
    assert (scores > target_maps(planted(), torch.full_like(pixels, 0.1), CHANNEL)[1] + 0.1).all()


def test_a_tower_that_does_not_look_there_shows_no_peak_there() -> None:
    """Negative controls: uniform attention, a different target, random weights."""
    pixels, places = photographs()
    even = attention_maps(planted(attends=False), pixels)
    np.testing.assert_allclose(even[ATTENTION], 1 / 26, atol=1e-6)
    assert np.ptp(even[ROLLOUT]) < 1e-6
    elsewhere = Target("a channel without brightness", "value", lambda pooled: pooled[:, 5])
    assert not target_maps(planted(), torch.full_like(pixels, 0.1), elsewhere)[0].any()
    torch.manual_seed(0)
    blind = Tower.from_model(build_model(SPEC), SPEC)
    maps = attention_maps(blind, pixels)
    maps["target"] = target_maps(blind, pixels, CHANNEL)[0]
    for name, found in maps.items():
        assert (peaks(found) == places).mean() < 0.5, name


def test_rollout_is_the_product_of_the_halved_attentions() -> None:
    pixels, _ = photographs(2)
    torch.manual_seed(0)
    tower = Tower.from_model(build_model(SPEC), SPEC)
    tower.model.set_attn_implementation("eager")
    with torch.no_grad():
        first, second = (a.mean(dim=1) for a in tower.model(pixels, output_attentions=True).attentions)
    whole = (second + torch.eye(26)) / 2 @ ((first + torch.eye(26)) / 2)
    np.testing.assert_allclose(
        attention_maps(tower, pixels)[ROLLOUT].reshape(2, 25), whole[:, 0, 1:].numpy(), atol=1e-6
    )


def test_asking_for_attention_leaves_the_tower_as_it_was() -> None:
    pixels, _ = photographs(2)
    tower = planted()
    before = tower.model.config._attn_implementation
    first = tower.model(pixels).pooler_output
    attention_maps(tower, pixels)
    assert tower.model.config._attn_implementation == before
    torch.testing.assert_close(tower.model(pixels).pooler_output, first)


def test_a_class_of_a_linear_probe_is_asked_as_the_probe_does() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(2, 3, (80, 8)).astype(np.float32)
    probe = fit_linear(features, features[:, 0] > 2)
    target = class_target("large", probe)
    np.testing.assert_allclose(
        target.score(torch.from_numpy(features)).numpy(), probe.decision_function(features), atol=1e-4
    )


def test_a_flat_map_stays_flat() -> None:
    assert not stretched(np.full((5, 5), 0.3), 40).any()
    assert stretched(np.eye(5), 40).max() == pytest.approx(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with and without a bright patch, their table, a broken picture, and a tower attending to the patch."""
    folder = tmp_path_factory.mktemp("explain")
    save_tower(planted(), folder / "tower")
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for i in range(30):
        pixels = rng.integers(0, 50, (40, 40, 3)).astype(np.uint8)
        if i % 2:
            pixels[8:16, 8:16] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{i:02}.png")
        rows.append({"file": f"{i:02}.png", "labels": "lesion" if i % 2 else "plain", "patient": f"p{i}"})
    (folder / "images" / "00broken.png").write_bytes(b"no picture")
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def explain(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, ...]]:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))

    def arguments(*more: object) -> tuple[object, ...]:
        return (main, "explain", "--encoder", place / "tower", "--out", tmp_path / "look.png", *more)

    return arguments


def test_captions_hold_no_file_names(place: Path, explain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sheet may be shown to others, and a file may be named after a patient."""
    seen: list[str] = []
    original = explaining.contact_sheet
    monkeypatch.setattr(
        explaining,
        "contact_sheet",
        lambda images, captions, *rest: seen.extend(captions) or original(images, captions, *rest),
    )
    assert invoke(*explain("--images", place / "images", "--limit", 2)).code == 0
    assert seen == ["image 1", "image 3"]  # the second is broken
    seen.clear()
    table = ("--labels", place / "labels.csv", "--images", place / "images", "--patient-column", "patient")
    assert invoke(*explain(*table, "--target", "lesion", "--limit", 2, "--force")).code == 0
    assert [caption.split("\n")[1] for caption in seen] == ["true: lesion", "true: lesion"]
    seen.clear()
    assert invoke(*explain(*table, "--force", "--limit", 40)).code == 0  # attention maps alone
    truth = {f"row {i + 2}": f"true: {'lesion' if i % 2 else 'plain'}" for i in range(30)}
    assert 3 < len(seen) < 30
    assert all(truth[caption.split("\n")[0]] == caption.split("\n")[1] for caption in seen)
    assert all(re.fullmatch(r"row \d+", caption.split("\n")[0]) for caption in seen)


def test_a_contact_sheet_is_drawn_from_a_folder(place: Path, tmp_path: Path, explain) -> None:
    done = invoke(*explain("--images", place / "images", "--limit", 3))
    assert done.code == 0, done.err
    assert "left out 1 of 4 images: 1 image unreadable" in done.err
    sheet = np.asarray(Image.open(tmp_path / "look.png").convert("RGB"), float)
    assert sheet.shape[0] > 600
    assert sheet.std() > 20
    below = sheet[-60:]  # the bar of colors: from black to the palest yellow
    dark, bright = (np.abs(below - color).max(axis=-1).min() for color in ((0, 0, 3), (252, 255, 164)))
    assert max(dark, bright) <= 12
    assert "exists" in refused(*explain("--images", place / "images"))
    assert "image 2 (sorted by name)" in refused(
        *explain("--images", place / "images", "--strict", "--force")
    )


def test_a_class_is_shown_on_test_images_that_have_it(place: Path, tmp_path: Path, explain) -> None:
    given = ("--images", place / "images", "--labels", place / "labels.csv", "--patient-column", "patient")
    done = invoke(*explain(*given, "--target", "Lesion", "--limit", 2))
    assert done.code == 0, done.err
    assert (tmp_path / "look.png").is_file()
    assert "did you mean 'lesion'" in refused(*explain(*given, "--force", "--target", "leson"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--images", "nowhere"], "nowhere, which does not exist"),
        (["--images", ".", "--target", "x"], "--target needs --labels"),
        (["--images", ".", "--labels", "nowhere.csv"], "nowhere.csv"),
        (["--images", ".", "--text", "glaucoma"], "has no projection"),
        (["--images", ".", "--text", " "], "expected some words"),
    ],
)
def test_bad_input_is_one_line(explain, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    assert complaint in refused(*explain(*arguments))
    assert not (tmp_path / "look.png").exists()


def test_from_python(place: Path, explain, tmp_path: Path) -> None:
    table = ("--labels", place / "labels.csv", "--images", place / "images", "--patient-column", "patient")
    assert invoke(*explain(*table, "--target", "lesion", "--limit", 2)).code == 0
    sheet = mgll_encoder.explain(
        place / "tower", place / "images", tmp_path / "again.png", targets=["lesion"], labels=place / "labels.csv",
        patient_column="patient", limit=2,
    )  # fmt: skip
    assert sheet.images == 2
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "look.png").read_bytes()
    with pytest.raises(InvalidArgumentError) as refused_:
        mgll_encoder.explain(place / "tower", place / "images", tmp_path / "b.png", targets=["lesion"])
    assert set(refused_.value.arguments) == {"targets", "labels"}
    with pytest.raises(NotFoundError):
        mgll_encoder.explain(place / "tower", place / "nowhere", tmp_path / "b.png")
