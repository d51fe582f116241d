import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgll_encoder.cli.pretrain import pretrain as pretrain_command
from mgll_encoder.common import signals
from mgll_encoder.common.cli import new_app
from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    OutputTakenError,
    UserError,
)
from mgll_encoder.common.files import sha256
from mgll_encoder.common.picture_bytes import picture_digest
from mgll_encoder.common.resuming import ResumeError, only_run
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.trained_on import as_numbers, trainings_of
from mgll_encoder.data.batches import ManifestCollator, ManifestImages, jitter, plan_rows, text_key
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.manifest import read_rows
from mgll_encoder.data.phantom.dataset import write_phantom
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES, TowerSize
from mgll_encoder.pretraining.options import PretrainOptions
from mgll_encoder.pretraining.pretrain import pretrain
from mgll_encoder.pretraining.trainer import TowerTrainer, Validation
from mgll_encoder.text.clip_tokenizer import clip_tokenizer
from mgll_encoder.text.text_tower import TextTower, load_text_tower
from mgll_encoder.tower.load import inspect_tower as swap_header
from mgll_encoder.tower.load import load_tower
from tests.mgll_encoder.test_text_tower import bert_folder

NANO = TowerSize(
    TOWER_SIZES["tiny"].spec.model_copy(
        update={"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "image_size": 32, "projection_dim": 16}
    ),
    text_width=32,
    text_depth=1,
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """One thread and a tower of two thin blocks, so that results are the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(TOWER_SIZES, "nano", NANO)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Four phantom eyes per class at 32 px, all but a few for training."""
    folder = tmp_path_factory.mktemp("phantom") / "set"
    write_phantom(folder, 4, image_size=32)
    build_fundus(FundusTable(folder / "labels.csv"), folder, folder / "manifest.jsonl", test_share=0.2)
    return folder / "manifest.jsonl"


def clip_tokens(texts):
    return clip_tokenizer()(texts, padding=True, return_tensors="pt")


def options(**changes) -> PretrainOptions:
    return PretrainOptions(
        **{"tower_size": "nano", "epochs": 3, "batch_size": 16, "learning_rate": 2e-3, **changes}
    )


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_tower(folder).model.parameters()])


def edit(manifest: Path, out: Path, change) -> Path:
    """A copy of the manifest with its rows changed."""
    head, *rows = manifest.read_text().splitlines()
    head = json.dumps({**json.loads(head), "images": str(manifest.parent)})
    out.write_text(
        "\n".join([head, *(json.dumps(row) for row in change([json.loads(row) for row in rows]))]) + "\n"
    )
    return out


def test_each_distinct_text_of_a_batch_is_encoded_once(manifest):
    plan = plan_rows(manifest, None, (), "train", False, Skipped())
    data = ManifestImages(plan, NANO.spec, seed=0)
    items = [data[i] for i in range(len(data))]
    batch = ManifestCollator(clip_tokens)(items)
    texts = {text for item in items for level in item["texts"] for text in level}
    assert len(batch["input_ids"]) == len(batch["keys"]) == batch["truth"].shape[2] == len(texts)
    assert batch["truth"].shape[:2] == (len(plan.granularities), len(data))
    keys = batch["keys"].tolist()
    for i, item in enumerate(items):
        for g, level in enumerate(item["texts"]):
            assert {keys[u] for u in batch["truth"][g, i].nonzero().flatten()} == {
                text_key(text) for text in level
            }
    assert (
        batch["input_ids"].tolist()
        == clip_tokens(list(dict.fromkeys(t for i in items for g in i["texts"] for t in g)))[
            "input_ids"
        ].tolist()
    )


def test_plain_clip_sees_one_joined_string_per_image(manifest):
    plan = plan_rows(manifest, None, ("disease", "status"), "train", True, Skipped())
    item = ManifestImages(plan, NANO.spec, seed=0)[0]
    assert item["texts"] == [["normal fundus; normal"]]


def test_augmentation_never_mirrors_and_depends_on_seed_epoch_and_image(manifest):
    plan = plan_rows(manifest, None, (), "train", False, Skipped())
    data, same = ManifestImages(plan, NANO.spec, seed=0), ManifestImages(plan, NANO.spec, seed=0)
    assert torch.equal(data[0]["pixels"], same[0]["pixels"])
    same.set_epoch(1)
    assert not torch.equal(data[0]["pixels"], same[0]["pixels"])
    marked = Image.new("RGB", (64, 64))
    marked.paste((255, 255, 255), (0, 0, 24, 64))
    for seed in range(30):
        columns = np.asarray(jitter(marked, np.random.default_rng(seed)), float).mean((0, 2))
        assert columns[:32].sum() > 3 * columns[32:].sum()


@pytest.mark.parametrize("loss", ["mgll", "clip"])
def test_training_lowers_the_loss_and_writes_a_tower_with_its_history(manifest, tmp_path, loss):
    result = pretrain(manifest, tmp_path / "tower", options(loss=loss), workers=0)
    assert result.losses[-1] < result.losses[0] - 0.1
    assert result.images == 38
    assert result.steps == 3 * (38 // 16)
    tower = load_tower(tmp_path / "tower")
    assert tower.spec == NANO.spec
    assert tower.projection.shape == (16, 32)
    record = json.loads((tmp_path / "tower" / "mgll_tower.json").read_text())["provenance"]["pretraining"]
    assert record["loss"] == loss
    assert record["seed"] == 0
    assert record["final_loss"] == pytest.approx(result.losses[-1], abs=1e-5)
    assert record["alphas"]["pointwise"] == (0.02 if loss == "mgll" else 0)
    assert len(record["manifest_sha256"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_the_same_seed_gives_the_same_tower_and_test_rows_play_no_part(manifest, tmp_path):
    one = options(epochs=1)
    pretrain(manifest, tmp_path / "a", one, workers=0)
    without_test = edit(
        manifest, tmp_path / "m.jsonl", lambda rows: [r for r in rows if r["split"] == "train"]
    )
    pretrain(without_test, tmp_path / "b", one, workers=0)
    pretrain(manifest, tmp_path / "c", options(epochs=1, seed=1), workers=0)
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.allclose(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("validated", [False, True])
def test_a_killed_training_resumes_to_the_same_tower(manifest, tmp_path, monkeypatch, validated):
    if validated:
        (tmp_path / "rows").mkdir()
        manifest = with_validation(manifest, tmp_path / "rows" / "m.jsonl")

    class Killed(BaseException):
        pass

    log = TowerTrainer.log

    def dying(self, logs, start_time=None):
        if self.state.global_step == 4:  # the end of epoch 2, before its checkpoint is written
            raise Killed
        log(self, logs, start_time)

    pretrain(manifest, tmp_path / "whole", options(), workers=0)
    with monkeypatch.context() as patch:
        patch.setattr("mgll_encoder.pretraining.trainer.TowerTrainer.log", dying)
        with pytest.raises(Killed):
            pretrain(manifest, tmp_path / "killed", options(), workers=0)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(MismatchError, match=r"cannot resume: 'learning_rate' was 0\.002"):
        pretrain(manifest, tmp_path / "killed", options(learning_rate=1e-3), workers=0, resume=True)
    resumed = pretrain(manifest, tmp_path / "killed", options(), workers=0, resume=True)
    assert resumed.steps == 6
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), atol=1e-7, rtol=0)


def test_killed_between_its_last_step_and_its_tower_it_writes_the_same_bytes(manifest, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    manifest = with_validation(manifest, tmp_path / "rows" / "m.jsonl")
    pretrain(manifest, tmp_path / "whole", options(epochs=1), workers=0)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mgll_encoder.pretraining.pretrain.save_tower", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(manifest, tmp_path / "killed", options(epochs=1), workers=0)
    pretrain(manifest, tmp_path / "killed", options(epochs=1), workers=0, resume=True)
    files = [
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
    ]
    assert Path("text/tokenizer.json") in files
    assert [
        f for f in files if (tmp_path / "whole" / f).read_bytes() != (tmp_path / "killed" / f).read_bytes()
    ] == []


def test_told_to_end_it_saves_a_checkpoint_in_the_midst_of_an_epoch(manifest, tmp_path, monkeypatch):
    """What Slurm's SIGTERM does with --save-on-signal: nothing is lost, the tower is the same."""
    seen = []
    compute = TowerTrainer.compute_loss

    def told(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if self.state.global_step == 2:  # during the third step: epochs have two
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *args, **kwargs)

    pretrain(manifest, tmp_path / "whole", options(), workers=0)
    with monkeypatch.context() as patch, signals.watched():
        patch.setattr(TowerTrainer, "compute_loss", told)
        with pytest.raises(signals.Terminated):
            pretrain(manifest, tmp_path / "told", options(), workers=0, save_on_signal=True)
    assert seen == [0, 1, 2]
    assert [path.name for path in sorted((tmp_path / ".told.training").glob("check*"))] == ["checkpoint-3"]
    resumed = pretrain(manifest, tmp_path / "told", options(), workers=0, resume=True)
    assert resumed.steps == 6
    torch.testing.assert_close(weights(tmp_path / "told"), weights(tmp_path / "whole"), atol=1e-7, rtol=0)


@pytest.mark.parametrize("state", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_a_state_that_is_missing_or_damaged_is_told(manifest, tmp_path, monkeypatch, state, damage):
    monkeypatch.setattr("mgll_encoder.pretraining.pretrain.shutil", SimpleNamespace(rmtree=lambda _: None))
    pretrain(manifest, tmp_path / "run", options(epochs=1), workers=0)
    last = tmp_path / ".run.training" / "checkpoint-2"
    damage(last / state)
    with pytest.raises(ResumeError, match=f"cannot resume from {last}: .* to start over") as error:
        pretrain(manifest, tmp_path / "run", options(epochs=1), workers=0, resume=True, force=True)
    assert "weights_only" not in str(error.value)


def test_two_trainings_cannot_share_a_work_folder(manifest, tmp_path):
    with only_run(tmp_path / "tower"), pytest.raises(OutputTakenError, match="another run is training into"):
        pretrain(manifest, tmp_path / "tower", options(), workers=0)
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_something_to_resume(manifest, tmp_path):
    with pytest.raises(NotFoundError, match="nothing to resume"):
        pretrain(manifest, tmp_path / "none", options(), workers=0, resume=True)


def test_the_tower_says_by_hashes_which_images_it_was_trained_on(manifest, tmp_path):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    (training,) = trainings_of(tmp_path / "first")
    rows = [row for _, _, row in read_rows(manifest)]
    digests = {
        side: as_numbers(
            picture_digest(manifest.parent / row.image) for row in rows if (row.split == "train") == side
        )
        for side in (True, False)
    }
    assert training.title == "tower (pretrain)"
    assert set(training.images) == set(digests[True])
    assert not set(training.images) & set(digests[False])
    assert training.splits == ({"split_by": "patient", "split_test": 0.2, "split_val": 0.0, "split_seed": 0},)
    ((step, loss),) = training.losses
    record = json.loads((tmp_path / "first" / "mgll_tower.json").read_text())["provenance"]["pretraining"]
    assert (step, [loss]) == (record["steps"], record["epoch_losses"])
    longer = options(epochs=3, init=tmp_path / "first", learning_rate=1e-4)
    pretrain(manifest, tmp_path / "second", longer, workers=0)
    before, again = trainings_of(tmp_path / "second")
    assert before == training
    assert list(again.images) == list(training.images)
    assert [step_ for step_, _ in again.losses] == [step, 2 * step, 3 * step]


def test_a_training_can_start_from_a_tower(manifest, tmp_path):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    gentle = options(epochs=1, learning_rate=1e-9, init=tmp_path / "first")
    pretrain(manifest, tmp_path / "second", gentle, workers=0)
    torch.testing.assert_close(weights(tmp_path / "second"), weights(tmp_path / "first"), atol=1e-6, rtol=0)
    projections = [load_tower(tmp_path / name).projection for name in ("first", "second")]
    torch.testing.assert_close(*projections, atol=1e-6, rtol=0)


def test_a_trained_tower_can_learn_more_slowly_than_a_new_text_tower(manifest, tmp_path):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    held = options(epochs=1, init=tmp_path / "first", text_tower="new", tower_learning_rate=1e-9)
    pretrain(manifest, tmp_path / "second", held, workers=0)
    torch.testing.assert_close(weights(tmp_path / "second"), weights(tmp_path / "first"), atol=1e-6, rtol=0)
    projections = [load_tower(tmp_path / name).projection for name in ("first", "second")]
    assert not torch.allclose(*projections, atol=1e-4, rtol=0), "the projection learns at --learning-rate"
    with pytest.raises(InvalidArgumentError, match="`tower_learning_rate` is 0"):
        options(tower_learning_rate=0.0)


def spoilt(manifest: Path, out: Path) -> Path:
    """The training rows, with a damaged image, a missing one, two that disagree, and an invalid line."""

    def change(rows):
        kept = [row for row in rows if row["split"] == "train"]
        other = {**kept[1], "texts": {"status": ["something else"]}}
        return [
            *kept,
            {**kept[0], "image": "broken.png"},
            {**kept[0], "image": "gone.png"},
            other,
            {"image": "x"},
        ]

    (manifest.parent / "broken.png").write_bytes((manifest.parent / "contact_sheet.png").read_bytes()[:2000])
    return edit(manifest, out, change)


def test_rows_that_cannot_be_used_are_counted_or_stop_a_strict_run(manifest, tmp_path):
    changed = spoilt(manifest, tmp_path / "m.jsonl")
    skipped = Skipped()
    plan = plan_rows(changed, None, (), "train", False, skipped)
    assert skipped.counts == {"no image file": 1, "rows of one image disagree": 1, "line is not a row": 1}
    assert len(plan) == 38
    assert "line 41: the image" in skipped.first["no image file"]
    assert "line 42: the texts of" in skipped.first["rows of one image disagree"]
    assert "differ from those in line 3" in skipped.first["rows of one image disagree"]
    with pytest.raises(BadDataError, match=r"line 41: the image does not exist below"):
        plan_rows(changed, None, (), "train", False, Skipped(strict=True))


def test_an_image_that_cannot_be_decoded_is_left_out_of_its_batches_and_counted_once(manifest, tmp_path):
    def change(rows):
        kept = [row for row in rows if row["split"] == "train"]
        return [*kept[:20], {**kept[0], "image": "broken.png"}]

    spoilt(manifest, tmp_path / "all.jsonl")
    changed = edit(manifest, tmp_path / "m.jsonl", change)
    result = pretrain(changed, tmp_path / "tower", options(epochs=2, batch_size=7), workers=2)
    assert result.skipped.counts == {"image unreadable": 1}
    assert "line 22: the image" in result.skipped.first["image unreadable"]
    assert result.steps == 6
    plan = plan_rows(changed, None, (), "train", False, Skipped())
    data = ManifestImages(plan, NANO.spec, seed=0)
    batch = ManifestCollator(clip_tokens)([data[i] for i in range(14, 21)])
    assert len(batch["pixel_values"]) == batch["truth"].shape[1] == 6
    assert len(batch["troubles"]) == 1
    with pytest.raises(BadDataError, match=r"line 22: the image cannot be decoded"):
        pretrain(changed, tmp_path / "strict", options(epochs=1, batch_size=7), workers=2, strict=True)
    only = edit(manifest, tmp_path / "o.jsonl", lambda rows: change(rows)[-1:] * 1 + change(rows)[:1])
    with pytest.raises(BadDataError, match="none of the 1 images of a batch can be read"):
        pretrain(only, tmp_path / "none", options(epochs=1, batch_size=1), workers=0)


def with_validation(manifest: Path, out: Path) -> Path:
    """The manifest with its test rows turned into validation rows."""
    return edit(
        manifest,
        out,
        lambda rows: [{**r, "split": "val" if r["split"] == "test" else r["split"]} for r in rows],
    )


def test_the_epoch_that_ranks_validation_texts_best_is_kept(manifest, tmp_path, monkeypatch):
    changed = with_validation(manifest, tmp_path / "m.jsonl")
    given = iter([0.3, 0.9, 0.5])
    evaluate = Validation.evaluate

    def scripted(self, towers, batch_size):
        figures, troubles = evaluate(self, towers, batch_size)
        assert 0 < figures["mAP"] <= 1
        return figures | {"mAP": next(given)}, troubles

    pretrain(changed, tmp_path / "two", options(select="last"), workers=0)
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "evaluate", scripted)
        best = pretrain(changed, tmp_path / "best", options(), workers=0)
    assert (best.kept, best.validation["mAP"]) == (2, 0.9)
    record = json.loads((tmp_path / "best" / "mgll_tower.json").read_text())["provenance"]["pretraining"]
    assert (record["kept_epoch"], record["validation"]["mAP"]) == (2, 0.9)
    assert record["validation_images"] == len(manifest.read_text().splitlines()) - 1 - 38
    assert best.losses == pytest.approx(
        json.loads((tmp_path / "two" / "mgll_tower.json").read_text())["provenance"]["pretraining"][
            "epoch_losses"
        ],
        abs=1e-6,
    )  # looking at the validation rows does not change the training
    assert not torch.equal(weights(tmp_path / "best"), weights(tmp_path / "two"))


def test_best_needs_validation_rows(manifest, tmp_path):
    with pytest.raises(InvalidArgumentError, match="has 0 usable val images"):
        pretrain(manifest, tmp_path / "none", options(select="best"), workers=0)


def test_the_card_tells_what_it_was_trained_on(manifest, tmp_path):
    pretrain(manifest, tmp_path / "tower", options(epochs=1), workers=0)
    card = (tmp_path / "tower" / "README.md").read_text()
    for told in (
        "Not a medical device",
        sha256(manifest),
        "| seed | 0 |",
        "status 2",
        "soft_clip 1, pointwise 0.02",
    ):
        assert told in card
    text = load_text_tower(tmp_path / "tower")
    assert text.features(["normal fundus"]).shape == (1, 16)
    assert swap_header(tmp_path / "tower").spec.projection_dim == 16


def test_a_text_tower_that_lacks_words_is_not_trained_on(manifest, tmp_path):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    other = edit(
        manifest,
        tmp_path / "m.jsonl",
        lambda rows: [{**r, "texts": {"status": [f"Zebra {i % 2}"]}} for i, r in enumerate(rows)],
    )
    with pytest.raises(MismatchError, match=r"no embedding for .*'Zebra 0'.*`text_tower=new`"):
        pretrain(other, tmp_path / "second", options(epochs=1, init=tmp_path / "first"), workers=0)
    pretrain(
        other, tmp_path / "third", options(epochs=1, init=tmp_path / "first", text_tower="new"), workers=0
    )


def test_texts_that_lose_their_ends_are_told(manifest, tmp_path, caplog):
    def lengthen(rows):
        return [{**row, "texts": {**row["texts"], "keyword": ["drusen " * 90]}} for row in rows]

    told = "have more tokens than the text tower's context of 77"
    pretrain(manifest, tmp_path / "short", options(epochs=1))
    assert told not in " ".join(" ".join(caplog.messages).split())
    caplog.clear()
    long = edit(manifest, tmp_path / "long.jsonl", lengthen)
    pretrain(long, tmp_path / "long", options(epochs=1))
    shown = " ".join(record.getMessage() for record in caplog.records if record.name.startswith("mgll"))
    assert f"1 of {_distinct(long)} texts {told}" in shown
    assert "The longest has 182: 'drusen drusen" in shown
    assert "Token indices" not in shown, "what transformers would say of it"


def test_a_log_of_pretraining_is_quiet(manifest, tmp_path):
    """A process of its own, whose libraries have their own ideas of what to say."""

    def lengthen(rows):
        return [{**row, "texts": {**row["texts"], "keyword": ["drusen " * 90]}} for row in rows]

    long = edit(manifest, tmp_path / "long.jsonl", lengthen)
    arguments = [
        "--manifest", long, "--loss", "clip", "--tower-size", "nano", "--epochs", "1", "--workers", "0",
        "--out", tmp_path / "tower",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from mgll_encoder.cli import main; main()", "pretrain", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "more tokens than the text tower's context of 77" in done.stderr
    assert "Training (" in done.stderr
    for noise in (
        "[transformers]",
        "Token indices",
        "Writing model shards",
        "it/s",
        "\r",
        "{'loss'",
        "Warning:",
    ):
        assert noise not in done.stdout + done.stderr, done.stderr


def _distinct(manifest: Path) -> int:
    return len(set(plan_rows(manifest, None, (), "train", False, Skipped()).all_texts()))


def test_a_bert_can_be_the_text_tower_frozen_with_checkpointing_and_bf16(manifest, tmp_path):
    bert = bert_folder(tmp_path / "bert")
    changes = {
        "text_tower": str(bert),
        "freeze_text": True,
        "gradient_checkpointing": True,
        "precision": "bfloat16",
    }
    result = pretrain(manifest, tmp_path / "tower", options(epochs=1, **changes), workers=0)
    assert np.isfinite(result.losses).all()
    before, after = TextTower.load(tmp_path / "tower" / "text"), TextTower.pretrained(str(bert), 16)
    for name, weight in after.model.state_dict().items():
        assert torch.equal(before.model.state_dict()[name], weight)
    assert before.pooling == "mean"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--granularities", "diseases"], "unknown granularity 'diseases': did you mean 'disease'"),
        (["--loss", "mgl"], "unknown loss 'mgl': did you mean 'mgll'"),
        (["--tower-size", "large"], "unknown tower_size 'large'"),
        (["--alpha", "1,2"], "give three numbers"),
        (["--alpha", "0,0,0"], "at least one above 0"),
        (["--epochs", "0"], "`epochs` is 0"),
        (["--images", "nowhere"], "image folder nowhere"),
        (["--init", "nowhere.pt"], "nowhere.pt"),
        (["--text-tower", "./nowhere"], "text tower ./nowhere cannot be read"),
        (["--freeze-text"], "must be trained"),
        (["--activation", "gelu"], "`activation` is for `init`"),
        (["--select", "first"], "unknown select 'first'"),
        (["--precision", "float16"], "needs a GPU"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(manifest, tmp_path, arguments, complaint):
    out = tmp_path / "tower"
    app = new_app("pretrain alone")
    app.command()(pretrain_command)
    result = CliRunner().invoke(app, ["--manifest", str(manifest), "--out", str(out), *arguments])
    assert isinstance(result.exception, UserError)
    assert complaint in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_blocks_of_a_tower_are_trained(manifest, tmp_path):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    pretrain(
        manifest, tmp_path / "second", options(epochs=1, init=tmp_path / "first", train_blocks=1), workers=0
    )
    before, after = (load_tower(tmp_path / name).model.state_dict() for name in ("first", "second"))
    changed = {
        name.partition("layers.")[2][:1] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"1", ""}, "the last of two blocks, and the norm after it"
    assert torch.equal(
        before["embeddings.position_embedding.weight"], after["embeddings.position_embedding.weight"]
    )


def test_the_projection_and_the_text_tower_are_trained_alone(manifest, tmp_path):
    """Heads first, then everything, so that new heads do not distort a trained tower."""
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    heads = options(epochs=1, init=tmp_path / "first", text_tower="new", train_blocks=0)
    pretrain(manifest, tmp_path / "heads", heads, workers=0)
    first, second = (load_tower(tmp_path / name) for name in ("first", "heads"))
    before, after = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the image tower"
    assert first.projection is not None
    assert second.projection is not None
    assert not torch.equal(first.projection, second.projection)


@pytest.mark.parametrize("blocks", [-1, 3])
def test_blocks_to_train_are_counted(manifest, tmp_path, blocks):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    with pytest.raises(InvalidArgumentError, match=f"`train_blocks` is {blocks}.* has 2 blocks"):
        pretrain(manifest, tmp_path / "second", options(init=tmp_path / "first", train_blocks=blocks))
    with pytest.raises(InvalidArgumentError, match="`train_blocks` is for `init`"):
        options(train_blocks=1)
