"""A user fine-tunes a whole tower on labels, and evaluates it on a test split that was not used in training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mgll_encoder import Tower, TowerSpec, build_model, finetune_probe, load_tower, save_tower
from mgll_encoder.cli import main
from mgll_encoder.common.errors import BadDataError, OutputTakenError
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.data.phantom.photographs import render
from mgll_encoder.probing.features import pooled_features
from mgll_encoder.probing.finetune import FinetuneOptions, finetune, validation_part
from mgll_encoder.probing.linear import evaluate, linear_scores
from tests.builders import invoke, refused

COUNT = 240
QUICK = FinetuneOptions(epochs=12, batch_size=16, learning_rate=2e-3, augment=False)


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    spec = TowerSpec(width=32, depth=2, heads=2, mlp_width=64, patch_size=8, image_size=32, activation="gelu")
    return Tower.from_model(build_model(spec), spec)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> LabeledImages:
    """Phantom eyes with and without glaucoma, two of each patient."""
    folder = tmp_path_factory.mktemp("eyes")
    sick = np.random.default_rng(0).random(COUNT) < 0.5
    paths = [folder / f"{i}.png" for i in range(COUNT)]
    for i, path in enumerate(paths):
        render(["glaucoma"] if sick[i] else [], [i], 32, severity=0.8).save(path)
    patients = tuple(f"p{i // 2}" for i in range(COUNT))
    return LabeledImages(
        tuple(paths),
        ("glaucoma", "normal"),
        np.stack([sick, ~sick], axis=1),
        patients,
        np.arange(COUNT) // 2 % 3 == 0,
    )


def test_it_learns_what_frozen_random_features_do_not_show(
    tower: Tower, eyes: LabeledImages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: value.clone() for name, value in tower.model.state_dict().items()}
    linear = evaluate(*linear_scores(pooled_features(tower, eyes.images), eyes), eyes, replicates=300)
    run = finetune(tower, eyes, QUICK, tmp_path, workers=0)
    learnt = evaluate(run.scores, run.kept, eyes, replicates=300)
    assert learnt.macro["AUC"].value > linear.macro["AUC"].value + 5
    assert learnt.macro["AUC"].low > linear.macro["AUC"].value
    np.testing.assert_allclose(run.scores.sum(axis=1), 1, atol=1e-6, err_msg="classes: a softmax")
    for name, value in tower.model.state_dict().items():
        assert torch.equal(value, before[name]), "the tower that was given is left as it is"
    assert not torch.equal(
        run.tower.model.state_dict()["post_layernorm.weight"], before["post_layernorm.weight"]
    )
    assert list(tmp_path.glob("*/")) == [], "no checkpoint is left behind"
    said = [line for line in "\n".join(caplog.messages).splitlines() if "validation AUC" in line]
    assert len(said) == QUICK.epochs
    assert run.validation == pytest.approx(max(float(line.rpartition(" ")[2]) for line in said), abs=0.06)


def test_labels_that_mean_nothing_stay_at_chance(tower: Tower, eyes: LabeledImages, tmp_path: Path) -> None:
    """Negative control: the same images, with labels permuted between patients."""
    dealt = np.random.default_rng(5).permutation(COUNT // 2)
    truth = eyes.truth.reshape(COUNT // 2, 2, 2)[dealt].reshape(COUNT, 2)
    shuffled = replace(eyes, truth=truth)
    run = finetune(tower, shuffled, replace(QUICK, epochs=3), tmp_path, workers=0)
    auc = evaluate(run.scores, run.kept, shuffled, replicates=300).macro["AUC"]
    assert auc.low <= 50 <= auc.high


@pytest.mark.slow
def test_a_killed_fine_tuning_goes_on_and_ends_the_same(
    tower: Tower, eyes: LabeledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dying(self, args, state, control, **_):
        if state.epoch >= 2:
            raise Killed

    few = eyes.subset(np.arange(COUNT) < 60)
    options = replace(QUICK, epochs=3, augment=True)
    whole = finetune(tower, few, options, tmp_path / "a", workers=0)
    with monkeypatch.context() as patch:
        patch.setattr("mgll_encoder.probing.finetune._LogEpoch.on_save", dying, raising=False)
        with pytest.raises(Killed):
            finetune(tower, few, options, tmp_path / "b", workers=0)
    assert len(list(tmp_path.glob("b/*/checkpoint-*"))) > 0
    resumed = finetune(tower, few, options, tmp_path / "b", workers=0)
    np.testing.assert_allclose(resumed.scores, whole.scores, atol=1e-6)


def test_the_validation_part_is_made_of_training_patients(eyes: LabeledImages) -> None:
    part = validation_part(eyes, 0.2, seed=0)
    owners = np.array(eyes.patients)
    assert 0.1 < part.sum() / (~eyes.test).sum() < 0.35
    assert not (part & eyes.test).any()
    assert not set(owners[part]) & set(owners[~part])
    told = replace(eyes, val=np.arange(COUNT) % 3 == 1)
    assert np.array_equal(validation_part(told, 0.2, 0), told.val & ~told.test)


def test_too_few_patients_to_choose_by_is_said(tower: Tower, eyes: LabeledImages, tmp_path: Path) -> None:
    few = eyes.subset(np.arange(COUNT) < 24)
    with pytest.raises(BadDataError, match=r"validation part .* give a larger `val_share`"):
        finetune(tower, few, replace(QUICK, val_share=0.001), tmp_path)


def test_the_command_writes_the_table_and_the_tower(
    tower: Tower, eyes: LabeledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    images = eyes.images[0].parent
    lines = [
        f"{path.name},{'glaucoma' if truth[0] else 'cataract' if i % 3 else ''}{';drusen' if i % 4 else ''},{owner}"
        for i, (path, truth, owner) in enumerate(
            zip(eyes.images[:90], eyes.truth, eyes.patients, strict=False)
        )
    ]
    (images / "broken.png").write_bytes(b"no picture")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,labels,patient", *lines, "broken.png,glaucoma,px"]) + "\n")
    save_tower(tower, tmp_path / "tower")
    command = (
        main, "probe", "--encoder", tmp_path / "tower", "--labels", table, "--images", images, "--patient-column",
        "patient", "--protocol", "finetune", "--epochs", 2, "--learning-rate", 1e-3, "--trainings", 2,
        "--min-positives", 3, "--workers", 0,
    )  # fmt: skip
    done = invoke(*command, "--out", tmp_path / "r.json", "--tower-out", tmp_path / "learnt")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["labels"]) == {"glaucoma", "cataract", "drusen"}, "findings, several at once"
    assert result["skipped"] == {
        "image unreadable": 1,
        "no label": sum(",,p" in line for line in lines),
    }
    assert result["macro"]["AUC"]["value"] == pytest.approx(np.mean([run["AUC"] for run in result["runs"]]))
    assert [run["seed"] for run in result["finetuning"]] == [0, 1]
    assert "training 2" in done.out
    assert load_tower(tmp_path / "learnt").spec.projection_dim is None
    once = finetune_probe(
        tmp_path / "tower", table, images, patient_column="patient", settings={"epochs": 2, "learning_rate": 1e-3},
        min_positives=3, workers=0,
    )  # fmt: skip
    assert once.result.macro["AUC"].value == pytest.approx(result["runs"][0]["AUC"], abs=0.1)
    with pytest.raises(OutputTakenError):
        finetune_probe(tmp_path / "tower", table, images, tower_out=tmp_path / "learnt")
    record = json.loads((tmp_path / "learnt" / "mgll_tower.json").read_text())
    assert record["provenance"]["finetuning"]["skipped"] == result["skipped"]
    assert "row 2: column 'labels' is blank" in refused(*command, "--strict")
    labeled = [line for line in lines if ",,p" not in line]
    table.write_text("\n".join(["file,labels,patient", *labeled, "broken.png,glaucoma,px"]) + "\n")
    row = len(labeled) + 2
    assert f"row {row}: the image is not in a supported format" in refused(*command, "--strict")
    (images / "broken.png").unlink()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--epochs", "3"], "--epochs has no effect on a linear probe: add --protocol finetune"),
        (["--protocol", "fine"], "Did you mean 'finetune'"),
        (["--protocol", "finetune", "--epochs", "-1"], "--epochs is -1"),
        (["--protocol", "finetune", "--val-share", "1.5"], "--val-share is 1.5"),
    ],
)
def test_bad_input_is_one_line(
    tower: Tower, eyes: LabeledImages, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    (tmp_path / "labels.csv").write_text(
        "file,labels\n" + "\n".join(f"{i}.png,{'ab'[i % 2]}" for i in range(40))
    )
    save_tower(tower, tmp_path / "tower")
    line = refused(
        main, "probe", "--encoder", tmp_path / "tower", "--labels", tmp_path / "labels.csv", "--images",
        eyes.images[0].parent, *arguments,
    )  # fmt: skip
    assert complaint in line
