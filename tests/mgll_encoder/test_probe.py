"""A user probes a tower's frozen features on labeled images."""

import csv
import json
import os
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.dummy import DummyClassifier
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import CLIPVisionModel

from mgll_encoder import Tower, TowerSpec, load_tower, save_tower
from mgll_encoder.cli import main
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.data.label_rows import Columns
from mgll_encoder.data.label_table import LabeledImages, read_labels
from mgll_encoder.probing import options
from mgll_encoder.probing.features import cached_features, pooled_features, workers_for
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.probing.linear import METRICS, evaluate, linear_scores, majority_rates, metrics
from tests import builders
from tests.builders import invoke, refused


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = TowerSpec(
        width=32, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=28, activation="gelu"
    )  # fmt: skip
    model = CLIPVisionModel(builders.tower_config())
    return save_tower(Tower.from_model(model, spec), tmp_path_factory.mktemp("towers") / "tower")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pictures of 40 patients: red ones are ``red``, dark ones ``dark``; one patient is unlabelled."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        red, dark = bool(rng.random() < 0.5), bool(rng.random() < 0.4)
        color = np.array([200, 60, 60] if red else [60, 60, 200]) // (3 if dark else 1)
        noise = rng.integers(0, 30, (28, 28, 3))
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        labels = ";".join(name for name, true in (("red", red), ("Dark", dark)) if true)
        rows.append({"file": f"{i}.png", "labels": labels or "plain", "patient": f"p{i // 2}",
                     "side": "test" if i % 10 < 4 else "train", "red": int(red), "dark": int(dark),
                     "color": "red" if red else "blue"})  # fmt: skip
    rows.append({**rows[-1], "labels": ""})
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize(
    ("keywords", "kind"),
    [
        (options.TowerKeywords, options.TowerOptions),
        (options.EvaluationKeywords, options.EvaluationOptions),
        (options.ProbeKeywords, options.ProbeOptions),
        (options.LabelKeywords, LabeledSet),
    ],
)
def test_the_typed_keywords_are_the_fields_with_a_default(keywords: type, kind: type) -> None:
    optional = {f.name: f.type for f in fields(kind) if not f.default is f.default_factory is MISSING}
    assert set(keywords.__annotations__) == set(optional)


def probe(place: Path, tower: Path, *arguments: object) -> tuple[object, ...]:
    return (
        main, "probe", "--encoder", tower, "--labels", place / "labels.csv", "--images", place / "images", *arguments,
    )  # fmt: skip


def test_it_finds_what_is_in_the_pictures(
    place: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "probe.json"
    done = invoke(*probe(place, tower, "--patient-column", "patient", "--out", out))
    assert done.code == 0, done.err
    result = json.loads(out.read_text())
    assert result["labels"]["red"]["AUC"] > 95
    assert result["macro"]["AUC"]["low"] <= result["macro"]["AUC"]["value"] <= result["macro"]["AUC"]["high"]
    assert result["train"] + result["test"] == 80, "the row without a label is unknown, not negative"
    assert "macro average" in done.out
    assert "majority" in done.out
    assert all(len(line) <= 80 and "…" not in line for line in done.out.splitlines() if "100.0" in line)
    *_, red = (line for line in done.out.splitlines() if line.split()[:1] == ["red"])  # a wide table folds
    assert red.split()[-1] == f"{result['majority']['red']:.1f}"
    assert result["macro"]["ACC"]["value"] > result["majority_macro"]
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 1


def test_rare_labels_are_left_out(
    place: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path))
    done = invoke(*probe(place, tower, "--patient-column", "patient", "--min-positives", 9))
    assert done.code == 0, done.err
    assert "skipped, too few positive" in done.err
    assert "--min-positives" in refused(*probe(place, tower, "--min-positives", 70))


def test_random_labels_are_not_found() -> None:
    """Negative control: features that are independent of the labels."""
    rng = np.random.default_rng(1)
    names, test = ("a", "b"), np.arange(400) % 2 == 0
    data = LabeledImages((), names, rng.random((400, 2)) < 0.5, tuple(map(str, range(400))), test)
    result = evaluate(*linear_scores(rng.normal(size=(400, 6)), data), data, replicates=50)
    assert 40 < result.macro["AUC"].value < 60


def test_the_figures_are_scikit_learns_and_the_interval_covers_patients() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((90, 3)) < 0.4
    scores = np.clip(truth * 0.3 + rng.random((90, 3)) * 0.7, 0, 1)
    whole = LabeledImages(
        (), ("a", "b", "c"), truth, tuple(str(i // 3) for i in range(90)), np.ones(90, bool)
    )
    result = evaluate(scores, [0, 1, 2], whole, replicates=200)
    assert result.macro["AUC"].value == pytest.approx(100 * roc_auc_score(truth, scores, average="macro"))
    assert result.macro["mAP"].value == pytest.approx(100 * average_precision_score(truth, scores))
    assert result.macro["ACC"].value == pytest.approx(100 * ((scores >= 0.5) == truth).mean())
    apart = LabeledImages((), whole.names, truth, tuple(map(str, range(90))), whole.test)
    single = LabeledImages((), whole.names, truth, ("one",) * 90, whole.test)
    assert evaluate(scores, [0, 1, 2], apart, replicates=200).macro["AUC"] != result.macro["AUC"]
    lone = evaluate(scores, [0, 1, 2], single, replicates=20).macro["AUC"]
    assert lone.low == lone.high, "one patient, drawn again and again, has no spread"


def test_accuracy_among_classes_is_that_of_the_likeliest() -> None:
    truth = np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2]]
    scores = np.array([[.4, .3, .3], [.4, .3, .3], [.1, .2, .3], [.2, .1, .1], [.1, .4, .2], [.3, .2, .1]])  # fmt: skip
    data = LabeledImages((), ("a", "b", "c"), truth, tuple("123456"), np.ones(6, bool))
    assert evaluate(scores, [0, 1, 2], data, replicates=5).macro["ACC"].value == pytest.approx(100 * 4 / 6)


def test_the_majority_rate_is_what_accuracy_has_to_exceed() -> None:
    """Against scikit-learn's constant guesser; unknown cells do not count."""
    rng = np.random.default_rng(3)
    truth = rng.random((60, 3)) < (0.1, 0.5, 0.85)
    labels = LabeledImages((), ("a", "b", "c"), truth, tuple(map(str, range(60))), np.ones(60, bool))
    result = evaluate(rng.random((60, 3)), [0, 1, 2], labels, replicates=5)
    for place, name in enumerate(labels.names):
        guesser = DummyClassifier(strategy="most_frequent").fit(truth, truth[:, place])
        assert result.majority[name] == pytest.approx(100 * guesser.score(truth, truth[:, place]))
    assert result.majority_macro == pytest.approx(np.mean(list(result.majority.values())))
    known = np.arange(60)[:, None] < 40
    some = majority_rates(truth, False, np.broadcast_to(known, truth.shape))
    assert some == pytest.approx(majority_rates(truth[:40], False))
    classes = np.eye(3, dtype=bool)[[0, 0, 0, 1, 2, 1]]
    assert majority_rates(classes, True).tolist() == [50.0, 50.0, 50.0]


def test_patients_are_not_divided_and_a_split_column_is_obeyed(place: Path) -> None:
    table, images = place / "labels.csv", place / "images"
    drawn = read_labels(table, images, Columns(patient="patient"), skipped=Skipped())
    sides = set(zip(drawn.patients, drawn.test.tolist(), strict=True))
    assert len(sides) == len(set(drawn.patients))
    told = read_labels(table, images, Columns(patient="patient", split="side"), skipped=Skipped())
    assert told.test.tolist() == [i % 10 < 4 for i in range(80)]
    binary = read_labels(
        table, images, Columns("{file}", None, ("red", "dark"), "patient"), skipped=Skipped()
    )
    assert (binary.names, len(binary.images)) == (("dark", "red"), 80), "the repeated row counts once"
    assert read_labels(table, images, Columns(labels="color"), skipped=Skipped()).exclusive


def test_features_are_those_of_any_batch_size_and_are_computed_once(
    place: Path, tower: Path, tmp_path: Path
) -> None:
    eyes = load_tower(tower)
    images = sorted((place / "images").iterdir())[:5]
    together, apart = pooled_features(eyes, images), pooled_features(eyes, images, batch_size=2)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    first = cached_features(eyes, images, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    np.testing.assert_array_equal(first, cached_features(eyes, images, tmp_path))
    assert file.stat().st_mtime_ns == before
    with torch.no_grad():
        eyes.model.embeddings.class_embedding += 1
    assert not np.array_equal(first, cached_features(eyes, images, tmp_path)), "another tower, other features"


def test_metrics_are_scikit_learns_under_any_weights_and_ties() -> None:
    """The bootstrap sorts once for all replicates; scikit-learn, one replicate at a time, is the reference."""
    rng = np.random.default_rng(0)
    truth = rng.random((80, 3)) < 0.4
    scores = np.round(np.clip(truth * 0.2 + rng.random((80, 3)) * 0.8, 0, 1), 1)  # many ties
    weights = rng.integers(0, 4, (5, 80)).astype(float)
    found = metrics(scores, truth, False, weights)
    for draw, weight in zip(found, weights, strict=True):
        for label in range(3):
            expected = (
                roc_auc_score(truth[:, label], scores[:, label], sample_weight=weight),
                average_precision_score(truth[:, label], scores[:, label], sample_weight=weight),
                np.average((scores[:, label] >= 0.5) == truth[:, label], weights=weight),
            )
            np.testing.assert_allclose(draw[label], 100 * np.array(expected), atol=1e-9)
    truth[:, 1] = True
    assert np.isnan(metrics(scores, truth, False, weights)[:, 1]).all()


def test_several_trainings_give_means() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((60, 2)) < 0.5
    runs = np.stack([np.clip(truth * part + rng.random((60, 2)), 0, 1) for part in (0.1, 0.5)])
    data = LabeledImages((), ("a", "b"), truth, tuple(map(str, range(60))), np.ones(60, bool))
    both = evaluate(runs, [0, 1], data, replicates=50)
    apart = [evaluate(run, [0, 1], data, replicates=50) for run in runs]
    for metric in METRICS:
        values = [one.macro[metric].value for one in apart]
        assert both.macro[metric].value == pytest.approx(np.mean(values))
        assert [run[metric] for run in both.runs] == pytest.approx(values)


def test_features_read_in_workers_are_the_same(place: Path, tower: Path) -> None:
    eyes, images = load_tower(tower), sorted((place / "images").iterdir())[:9]
    np.testing.assert_allclose(
        pooled_features(eyes, images, batch_size=4, workers=2),
        pooled_features(eyes, images, workers=0),
        atol=1e-5,
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_a_job_with_one_core_of_many_starts_one_worker() -> None:
    given = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(given)})
    try:
        assert workers_for(1000, None) == 1
    finally:
        os.sched_setaffinity(0, given)
    assert workers_for(1000, 3) == 3
    assert workers_for(10, None) == 0


def test_what_cannot_be_used_is_counted_with_its_row_and_strict_stops(
    place: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    rows = (place / "labels.csv").read_text().splitlines()
    file, _, *rest = rows[1].split(",")
    bad = [
        "gone.png,red,p90,train,1,0,red",
        "broken.png,red,p91,train,1,0,red",
        ",".join([file, "something else", *rest]),
        rows[5],
        ",red,p92,train,1,0,red",
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join([*rows, *bad]) + "\n")
    (place / "images" / "broken.png").write_bytes((place / "images" / "1.png").read_bytes()[:60])
    command = (
        main, "probe", "--encoder", tower, "--labels", table, "--images", place / "images", "--patient-column",
        "patient",
    )  # fmt: skip
    done = invoke(*command)
    assert done.code == 0, done.err
    firsts = (f"no image file, for example: label file {table} row {len(rows) + 1}: column 'file' names no file",
              f"image unreadable, for example: label file {table} row {len(rows) + 2}: the image")  # fmt: skip
    for said in (*firsts, "Computing the features of images (80) ..."):
        assert said in done.err
    summary = done.err.splitlines()[-1]
    assert summary == (
        f"left out 7 of {len(rows) + len(bad) - 1} rows: 2 rows of one image disagree, 1 no label, 1 no image named, "
        "1 no image file, 1 image listed twice, 1 image unreadable"
    )
    told = [
        line for line in done.err.splitlines() if ", for example: " in line or line.startswith("left out")
    ]
    assert not [line for line in told for name in ("gone", "broken", "p90", file) if name in line]
    assert f"row {len(rows)}: column 'labels' is blank" in refused(*command, "--strict")
    table.write_text("\n".join([*rows[:-1], *bad]) + "\n")
    assert f"row {len(rows) + 4}: column 'file' is blank" in refused(*command, "--strict")
    table.write_text("\n".join([*rows[:-1], *bad[:4]]) + "\n")
    assert f"row {len(rows)}: column 'file' names no file" in refused(*command, "--strict")
    table.write_text("\n".join([*rows[:-1], bad[1]]) + "\n")
    assert f"row {len(rows)}: the image cannot be decoded" in refused(*command, "--strict")
    cells = rows[3].split(",")
    cells[4] = "maybe"
    table.write_text("\n".join([*rows[:3], ",".join(cells), *rows[4:]]) + "\n")
    done = invoke(*command, "--binary-columns", "red,dark")
    assert "cell that cannot be read, for example: label file" in done.err
    assert "row 4: column 'red' is 'maybe': expected 1, 0, yes, no" in done.err
    (place / "images" / "broken.png").unlink()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--labels-column", "label"], "has no column 'label' (--labels-column)"),
        (["--images", "nowhere"], "does not exist: check --images"),
        (["--labels", "nowhere.csv"], "check --labels"),
        (["--only", "rde"], "did you mean 'red'"),
        (["--dataset", "rfmdi"], "did you mean 'rfmid'"),
        (["--compare", "paper"], "--compare paper needs --dataset"),
        (["--binary-columns", "patient"], "expected 1, 0, yes, no"),
        (["--test-share", "1.5"], "--test-share is 1.5"),
    ],
)
def test_bad_input_is_one_line(place: Path, tower: Path, arguments: list[str], complaint: str) -> None:
    assert complaint in refused(*probe(place, tower, *arguments))
