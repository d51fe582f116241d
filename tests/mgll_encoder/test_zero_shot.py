"""A user classifies without training, and searches images by text."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from transformers import CLIPConfig, CLIPModel

from mgll_encoder import load_tower, retrieval, save_tower
from mgll_encoder.cli import main
from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.common.splits import assign_split
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES, TowerSize
from mgll_encoder.pretraining.options import PretrainOptions
from mgll_encoder.pretraining.pretrain import pretrain
from mgll_encoder.probing.benchmarks import benchmarks
from mgll_encoder.probing.features import pooled_features
from mgll_encoder.probing.zero_shot import (
    class_directions,
    projected,
    prompt_sets,
    read_prompts,
    zero_shot_scores,
)
from mgll_encoder.text.clip_tokenizer import clip_tokenizer
from mgll_encoder.text.text_tower import load_text_tower
from tests.builders import invoke, refused, tower_config
from tests.mgll_encoder.towers import TEXT, clip_model

NANO = TowerSize(
    TOWER_SIZES["tiny"].spec.model_copy(
        update={"width": 32, "depth": 1, "heads": 2, "mlp_width": 64, "image_size": 16, "projection_dim": 16}
    ),
    text_width=32,
    text_depth=1,
)
COLORS = {"crimson": (200, 30, 40), "navy": (30, 40, 160), "olive": (120, 130, 30)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colored pictures of 60 patients, their manifest and table, and a tower pretrained on the training split."""
    folder = tmp_path_factory.mktemp("zero-shot")
    (folder / "images").mkdir()
    rng, rows, table = np.random.default_rng(0), [], []
    for i in range(120):
        name = list(COLORS)[rng.integers(3)]
        bright = bool(rng.random() < 0.5)
        pixels = np.array(COLORS[name]) + 50 * bright + rng.integers(-20, 20, (16, 16, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        patient = f"p{i // 2}"
        texts = {"shade": ["pale" if bright else "dark"], "color": [name, "one color"]}
        rows.append(ManifestRow(image=f"{i}.png", texts=texts, patient=patient, split=assign_split(patient)))
        table.append(
            {
                "file": f"{i}.png",
                "color": name,
                "labels": name + (";pale" if bright else ""),
                "patient": patient,
            }
        )
    path = folder / "manifest.jsonl"
    write_manifest(path, folder / "images", ManifestHeader(granularities=["shade", "color"]), rows)
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    with mock.patch.dict(TOWER_SIZES, {"nano": NANO}):
        options = PretrainOptions(tower_size="nano", epochs=12, batch_size=16, learning_rate=3e-3)
        pretrain(path, folder / "tower", options, workers=0)
        pretrain(
            path,
            folder / "blind",
            PretrainOptions(tower_size="nano", epochs=1, learning_rate=1e-12),
            workers=0,
        )
    return folder


@pytest.fixture
def asked(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[object, ...]]:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))

    def command(*more: object, encoder: str = "tower") -> tuple[object, ...]:
        return (
            main, "zero-shot", "--encoder", place / encoder, "--labels", place / "labels.csv", "--images",
            place / "images", "--patient-column", "patient", "--min-positives", 3, *more,
        )  # fmt: skip

    return command


def test_classes_are_told_apart_by_their_names_alone(place: Path, asked, tmp_path: Path) -> None:
    done = invoke(*asked("--labels-column", "color", "--out", tmp_path / "r.json"))
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["macro"]["AUC"]["value"] > 95
    assert result["test"] == sum(assign_split(f"p{i // 2}") == "test" for i in range(120)), (
        "the test side alone"
    )
    assert result["prompts"]["navy"] == {"positive": ["navy"]}
    blind = invoke(*asked("--labels-column", "color", "--out", tmp_path / "b.json", "--all", encoder="blind"))
    assert blind.code == 0, blind.err
    worse = json.loads((tmp_path / "b.json").read_text())
    assert worse["test"] == 120
    assert worse["macro"]["ACC"]["value"] < 75, "negative control: towers that learnt nothing"


def test_findings_are_weighed_against_their_absence(asked, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(
        '{"templates": ["{label}"], "negatives": ["dark"], "labels": {"pale": {"names": ["pale"]}}}'
    )
    done = invoke(*asked("--prompts", own, "--only", "pale", "--out", tmp_path / "r.json"))
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["labels"]["pale"]["AUC"] > 95
    assert result["labels"]["pale"]["ACC"] > 85
    assert result["prompts"]["pale"] == {"positive": ["pale"], "negative": ["dark"]}
    generic = invoke(*asked("--only", "pale"))
    assert "prompt 'no pale': the text tower has no embedding for" in generic.err


def test_scores_are_those_of_the_formula(place: Path) -> None:
    tower, text = load_tower(place / "tower"), load_text_tower(place / "tower")
    images = sorted((place / "images").iterdir())[:4]
    seen = projected(tower, pooled_features(tower, images))
    groups = [["navy", "dark"], ["olive"]]
    directions = class_directions(text, groups)
    with torch.no_grad():
        one = [[text.features([prompt])[0].numpy() for prompt in group] for group in groups]
    for direction, features in zip(directions, one, strict=True):
        mean = np.mean([feature / np.linalg.norm(feature) for feature in features], axis=0)
        np.testing.assert_allclose(direction, mean / np.linalg.norm(mean), atol=1e-5)
    cosine = np.array([[image @ direction for direction in directions] for image in seen.astype(float)])
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    classes = zero_shot_scores(seen, directions, directions, 0.1, exclusive=True)
    np.testing.assert_allclose(classes, softmax(cosine / 0.1, axis=1), atol=1e-6)
    against = zero_shot_scores(seen, directions[:1], directions[1:], 0.1, exclusive=False)
    np.testing.assert_allclose(against[:, 0], classes[:, 0], atol=1e-6, err_msg="of two, the softmax")


def test_retrieval_finds_the_texts_of_pictures_and_the_pictures_of_texts(
    place: Path, asked, tmp_path: Path
) -> None:
    command = (main, "retrieval", "--manifest", place / "manifest.jsonl")
    done = invoke(*command, "--encoder", place / "tower", "--out", tmp_path / "r.json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "r.json").read_text())["granularities"]
    assert set(found) == {"shade", "color", "all"}
    to_text, to_image = found["shade"]
    assert to_text["recall"]["1"]["value"] > 80
    assert (to_text["candidates"], to_text["chance"]["1"]) == (2, pytest.approx(50))
    assert to_image["recall"]["1"]["value"] == 100
    again = retrieval(place / "tower", place / "manifest.jsonl")
    assert {level: [asdict(way)["queries"] for way in both] for level, both in again.levels.items()} == {
        level: [way["queries"] for way in both] for level, both in found.items()
    }
    assert again.levels["shade"][0].recall[1].value == to_text["recall"]["1"]["value"]
    assert "does not exist: give it with --images" in refused(
        *command, "--encoder", place / "tower", "--images", "nowhere"
    )
    assert "did you mean 'color'" in refused(
        *command, "--encoder", place / "tower", "--granularities", "colour"
    )


def test_a_damaged_line_of_a_manifest_is_counted_or_stops_a_strict_run(
    place: Path, asked, tmp_path: Path
) -> None:
    head, *rows = (place / "manifest.jsonl").read_text().splitlines()
    head = json.dumps({**json.loads(head), "images": str(place / "images")})
    (place / "images" / "broken.png").write_bytes(b"no picture")
    tests = [json.loads(row) for row in rows if '"test"' in row]
    bad = [
        {**tests[0], "image": "new.png", "texts": {"shade": [" "]}},
        {**tests[0], "image": "new.png", "texts": {"shades": ["pale"]}},
        {**tests[0], "image": "gone.png"},
        {**tests[0], "image": "broken.png"},
        {**tests[1], "texts": {"shade": ["something else"]}},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([head, *map(json.dumps, [*tests, *bad])]) + "\n")
    command = (main, "retrieval", "--manifest", path, "--encoder", place / "tower")
    done = invoke(*command)
    assert done.code == 0, done.err
    summary = done.err.splitlines()[-1]
    assert summary.startswith("left out 5 of ")
    for said in (
        "2 line is not a row",
        "1 no image file",
        "1 image unreadable",
        "1 rows of one image disagree",
    ):
        assert said in summary
    line = refused(*command, "--strict")
    assert f"line {len(tests) + 2}: 'texts.shade.0'" in line
    (place / "images" / "broken.png").unlink()


def test_a_whole_clip_folder_brings_its_own_text_tower(place: Path, tmp_path: Path, asked) -> None:
    words = {**TEXT, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    torch.manual_seed(0)
    whole = CLIPModel(
        CLIPConfig(vision_config=tower_config().to_dict(), text_config=words, projection_dim=16)
    ).eval()
    whole.save_pretrained(tmp_path / "clip")
    clip_tokenizer().save_pretrained(tmp_path / "clip")
    tower = load_tower(tmp_path / "clip")
    found = text_tower_of(tmp_path / "clip", tower).features(["navy", "olive green"])
    with torch.no_grad():
        tokens = clip_tokenizer()(["navy", "olive green"], padding=True, return_tensors="pt")
        expected = whole.get_text_features(**tokens)
    torch.testing.assert_close(
        found.detach(), getattr(expected, "pooler_output", expected), atol=1e-5, rtol=0
    )
    done = invoke(
        main, "zero-shot", "--encoder", tmp_path / "clip", "--labels", place / "labels.csv", "--images",
        place / "images", "--labels-column", "color", "--min-positives", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    clip_model().save_pretrained(tmp_path / "other")
    clip_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="take both from the same folder"):
        text_tower_of(tmp_path / "other", load_tower(tmp_path / "other"))


def test_every_packaged_prompt_can_be_filled_for_every_benchmark() -> None:
    sets = prompt_sets()
    for row in benchmarks().values():
        words = row.in_words
        for label in {*words, *row.binary, *row.only, *row.folders.values()}:
            assert sets[row.prompts].positive(label, words)
            assert sets[row.prompts].negative(label, words)
    fundus = sets["fundus"]
    assert fundus.positive("DR", {"DR": "diabetic retinopathy"})[0] == "diabetic retinopathy"
    assert "microaneurysms" in fundus.positive("diabetic retinopathy", {})[1]
    assert fundus.negative("normal", {}) == ["abnormal fundus"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"templates": []}', "'templates'"),
        ('{"templates": ["{lable}"], "negatives": ["no {label}"]}', "'lable'"),
        ('{"templates": ["{label}"], "negatives": ["no"], "about": 1}', "'about'"),
    ],
)
def test_a_file_of_prompts_is_checked(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(BadDataError, match=complaint):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompts", "fundis"], "did you mean 'fundus'"),
        (["--prompts", "none.json"], "none.json does not exist"),
        (["--only", "navi"], "did you mean 'navy'"),
        (["--test-images", "x"], "--test-images is given without --test-labels"),
    ],
)
def test_bad_input_is_one_line(asked, arguments: list[str], complaint: str) -> None:
    assert complaint in refused(*asked(*arguments))


def test_a_tower_without_texts_says_what_is_needed(place: Path, asked, tmp_path: Path) -> None:
    save_tower(load_tower(place / "tower"), place / "mute", force=True)
    assert "has no text tower" in refused(*asked("--labels-column", "color", encoder="mute"))
