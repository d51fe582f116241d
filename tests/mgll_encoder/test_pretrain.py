import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgll_encoder.cli.pretrain import pretrain as pretrain_command
from mgll_encoder.common.cli import new_app
from mgll_encoder.common.errors import UserError
from mgll_encoder.data.batches import Collator, ManifestImages, jitter, plan_rows, text_key
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.phantom_set import write_phantom
from mgll_encoder.data.skipped import Skipped
from mgll_encoder.pretrain import PretrainOptions, pretrain
from mgll_encoder.tower import load_tower
from mgll_encoder.two_towers import PRESETS, Preset
from mgll_encoder.word_pieces import clip_tokenizer

NANO = Preset(
    PRESETS["tiny"].spec.model_copy(
        update={"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "image_size": 32, "projection_dim": 16}
    ),
    text_width=32,
    text_depth=1,
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Small sums, the same on every machine, with a tower of two thin blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(PRESETS, "nano", NANO)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Four phantom eyes per class at 32 px, all but a few for training."""
    folder = tmp_path_factory.mktemp("phantom") / "set"
    write_phantom(folder, 4, size=32)
    build_fundus(FundusTable(folder / "labels.csv"), folder, folder / "manifest.jsonl", test=0.2)
    return folder / "manifest.jsonl"


def clip_tokens(texts):
    return clip_tokenizer()(texts, padding=True, return_tensors="pt")


def options(**changes) -> PretrainOptions:
    return PretrainOptions(**{"preset": "nano", "epochs": 3, "batch_size": 16, "lr": 2e-3, **changes})


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
    batch = Collator(clip_tokens)(items)
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


def test_a_killed_training_resumes_to_the_same_tower(manifest, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(self, logs, start_time=None):
        if self.state.global_step == 4:  # the end of epoch 2, before its checkpoint is written
            raise Killed

    pretrain(manifest, tmp_path / "whole", options(), workers=0)
    with monkeypatch.context() as patch:
        patch.setattr("mgll_encoder.pretrain._Trainer.log", dying)
        with pytest.raises(Killed):
            pretrain(manifest, tmp_path / "killed", options(), workers=0)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(UserError, match=r"cannot resume: 'lr' was 0\.002"):
        pretrain(manifest, tmp_path / "killed", options(lr=1e-3), workers=0, resume=True)
    resumed = pretrain(manifest, tmp_path / "killed", options(), workers=0, resume=True)
    assert resumed.steps == 6
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), atol=1e-7, rtol=0)


def test_there_must_be_something_to_resume(manifest, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        pretrain(manifest, tmp_path / "none", options(), workers=0, resume=True)


def test_a_training_can_start_from_a_tower(manifest, tmp_path):
    pretrain(manifest, tmp_path / "first", options(epochs=1), workers=0)
    gentle = options(epochs=1, lr=1e-9, init=tmp_path / "first")
    pretrain(manifest, tmp_path / "second", gentle, workers=0)
    torch.testing.assert_close(weights(tmp_path / "second"), weights(tmp_path / "first"), atol=1e-6, rtol=0)
    projections = [load_tower(tmp_path / name).projection for name in ("first", "second")]
    torch.testing.assert_close(*projections, atol=1e-6, rtol=0)


def test_broken_images_are_counted_or_stop_a_strict_run(manifest, tmp_path):
    def change(rows):
        kept = [row for row in rows if row["split"] == "train"]
        extra = {**kept[0], "image": "broken.png"}
        other = {**kept[1], "texts": {"status": ["something else"]}}
        return [*kept, extra, {**kept[0], "image": "gone.png"}, other]

    (manifest.parent / "broken.png").write_bytes((manifest.parent / "contact_sheet.png").read_bytes()[:2000])
    changed = edit(manifest, tmp_path / "m.jsonl", change)
    skipped = Skipped()
    plan = plan_rows(changed, None, (), "train", False, skipped)
    assert skipped.counts == {"image unreadable": 2, "rows of one image disagree": 1}
    assert len(plan.offsets) == 38 - 1
    assert "line 40: image" in skipped.first["image unreadable"]
    with pytest.raises(UserError, match=r"line 42: the texts of .* differ from those in line 3"):
        plan_rows(changed, None, (), "train", False, Skipped(strict=True))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--granularities", "diseases"], "unknown granularity 'diseases': did you mean 'disease'"),
        (["--loss", "mgl"], "unknown loss 'mgl': did you mean 'mgll'"),
        (["--preset", "large"], "unknown preset 'large'"),
        (["--alpha", "1,2"], "give three numbers"),
        (["--alpha", "0,0,0"], "at least one above 0"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--images", "nowhere"], "image folder nowhere"),
        (["--init", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(manifest, tmp_path, arguments, complaint):
    out = tmp_path / "tower"
    app = new_app("pretrain alone")
    app.command()(pretrain_command)
    result = CliRunner().invoke(app, ["--data", str(manifest), "--out", str(out), *arguments])
    assert isinstance(result.exception, UserError)
    assert complaint in str(result.exception)
    assert list(tmp_path.iterdir()) == []
