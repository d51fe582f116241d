"""Training on cached features: the same losses as without, for every family, and never features of something else."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import MismatchError, StorageError
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import apply_stage
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import AnswerCollator, encode, prepare_examples
from mllm_adapters.feature_cache import precompute as feature_fill
from mllm_adapters.feature_cache import store as feature_store
from mllm_adapters.feature_cache.cache import cache_features
from mllm_adapters.feature_cache.cached_modules import KEY
from mllm_adapters.feature_cache.precompute import ComputeSettings
from mllm_adapters.feature_cache.store import FeatureStore
from mllm_adapters.loading.load import load_mllm
from mllm_adapters.swap.apply import apply_plan
from mllm_adapters.training.engine import train
from mllm_adapters.training.prepare import prepare_training
from mllm_adapters.training.recipe import Recipe, RunOptions
from tests import builders
from tests.mllm_adapters import complete
from tests.mllm_adapters.retraining import color_rows, loud_llava, turns, write_json

CPU = ComputeSettings(torch.device("cpu"))

QUICK = ("instructblip", "qwen3-vl", "mini-gemini")
"""Rows of the default run: a Q-Former, packed images with three layers read, two towers."""

ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in complete.BUILDERS
    if name != "instructblip-t5"
]
"""All but the one that training refuses: its language model has an encoder."""


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache that nothing has been written to."""
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures of four sizes; rows of one and two turns, without an image, with two."""
    folder = tmp_path_factory.mktemp("place")
    for i in range(4):
        builders.picture(folder / "images", f"{i}.png", (60 * i, 250 - 60 * i, 90), size=30 + 9 * i)
    asked = turns("<image>\nWhich?", "Glaucoma", "Sure?", "yes")
    rows = [{"id": i, "image": f"{i}.png", "conversations": asked[: 2 + 2 * (i % 2)]} for i in range(4)]
    rows.append({"id": 4, "conversations": turns("Hello", "hi")})
    rows.append({"id": 5, "image": ["1.png", "2.png"], "conversations": turns("<image><image>\nBoth?", "no")})
    return SimpleNamespace(
        encoder=complete.encoder(folder / "mgll"),
        data=write_json(folder / "t.json", rows),
        images=folder / "images",
    )


def prepared(model_folder, place, stage="projector"):
    model, processor = load_mllm(model_folder, dtype=torch.float32)
    apply_stage(model, stage)
    corpus = read_corpus(place.data, place.images)
    examples, _ = prepare_examples(corpus, processor, 2048, True)
    return SimpleNamespace(model=model.eval(), processor=processor, corpus=corpus, examples=examples)


def cached(ready, place=CPU):
    return cache_features(ready.model, ready.examples, ready.corpus, ready.processor, place)


def test_hosts_that_read_different_layers_of_one_tower_have_features_of_their_own(
    tiny_llava, place, own_cache
):
    """The library returns only the layer that is asked for: which one it is, is its place among the outputs."""
    stores = []
    for layer in (-1, -2):
        ready = prepared(tiny_llava, place)
        ready.model.config.vision_feature_layer = layer
        found = cached(ready)  # refuses features that are not what the tower gives
        stores.append(found.dataset.store.folder)
    assert len(set(stores)) == 2


def fresh_batch(ready):
    rows = [encode(example, ready.corpus.folder, ready.processor) for example in ready.examples]
    return AnswerCollator(ready.processor.tokenizer.pad_token_id or 0)(rows)


def loss(model, batch):
    return float(model(**batch).loss.detach())


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def whole_batch(cache):
    return cache.collator([cache.dataset[i] for i in range(len(cache.dataset))])


def check_equal(ready):
    """Cached and fresh features make the same loss and the same gradients, and the tower is gone."""
    batch = fresh_batch(ready)
    expected, slopes = loss(ready.model, batch), gradients(ready.model, batch)
    cache = cached(ready)
    assert cache is not None
    kept = whole_batch(cache)
    assert not any(
        isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 1 for v in kept.values()
    )
    assert loss(ready.model, kept) == pytest.approx(expected, abs=1e-5)
    found = gradients(ready.model, whole_batch(cache))
    assert found.keys() == slopes.keys()
    assert far(found, slopes) < 1e-4
    gone = tuple(f"{call.name}." for call in cache.cast.plan.calls)
    assert gone
    assert not [name for name, _ in ready.model.named_parameters() if name.startswith(gone)]
    mixed = whole_batch(cache)
    mixed[KEY]["features"] = [value.roll(1, 0) for value in mixed[KEY]["features"]]
    assert far(gradients(ready.model, mixed), slopes) > 1e-3, "negative control: features in another order"


def far(found, expected):
    """The largest difference of gradients, relative to the largest gradient of the parameter."""
    return max(
        float((found[n] - g).abs().max() / g.abs().max())
        for n, g in expected.items()
        if g.abs().max() > 1e-12
    )


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_and_the_gradients_are_those_without_a_cache(name, place, request, tmp_path):
    source = complete.BUILDERS[name](tmp_path / "host", lambda: request.getfixturevalue("golden"))
    check_equal(prepared(source, place))
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(place.encoder))
    check_equal(prepared(apply_plan(plan, family, checkpoint, tmp_path / "swapped"), place))


@pytest.fixture(scope="module")
def loud(tiny_llava, tmp_path_factory):
    """A model folder that learns, and data with eight pictures."""
    folder = tmp_path_factory.mktemp("loud")
    model = loud_llava(tiny_llava, folder / "model")
    data = write_json(folder / "train.json", color_rows(folder / "images"))
    return SimpleNamespace(model=model, data=data, images=folder / "images")


@pytest.fixture
def copied(loud, tmp_path):
    """The same, to be changed."""
    shutil.copytree(loud.model.parent, tmp_path / "copy")
    return SimpleNamespace(
        model=tmp_path / "copy" / "model",
        data=tmp_path / "copy" / "train.json",
        images=tmp_path / "copy" / "images",
    )


@pytest.fixture
def filled(monkeypatch):
    """How many images went through the towers, call by call."""
    counts = []
    original = feature_fill._towers

    def counted(model, plan, group, place):
        counts.append(len(group))
        return original(model, plan, group, place)

    monkeypatch.setattr(feature_fill, "_towers", counted)
    return counts


RECIPE = Recipe(max_steps=6, batch_size=2, learning_rate=1e-2)


def run(place, out, **options):
    job = prepare_training(place.model, place.data, place.images, RECIPE)
    return train(job, out, RunOptions(report_to=(), logging_steps=1, **options))


def test_training_takes_the_same_way_with_and_without_the_cache(loud, tmp_path, own_cache, filled):
    plain = run(loud, tmp_path / "plain", feature_cache=False)
    assert not filled
    kept = run(loud, tmp_path / "kept")
    assert sum(filled) == 2, "of eight files in two colors"
    assert dict(kept.losses) == pytest.approx(dict(plain.losses), abs=1e-5)
    assert len(plain.losses) == 6
    again = run(loud, tmp_path / "again", workers=1)
    assert sum(filled) == 2, "a second run computes nothing"
    assert again.losses == kept.losses
    coarse = run(loud, tmp_path / "coarse", feature_precision="bfloat16")
    assert sum(filled) == 4, "another precision is another store"
    assert dict(coarse.losses) == pytest.approx(dict(plain.losses), abs=5e-2)
    assert coarse.losses != kept.losses


def test_training_opens_no_image_but_those_it_checks_the_cache_with(loud, tmp_path, own_cache, monkeypatch):
    run(loud, tmp_path / "first")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **rest: opened.append(path) or original(path, **rest))
    run(loud, tmp_path / "second")
    assert len(opened) == 2


def another_tower(place):
    model, _ = load_mllm(place.model)
    with torch.no_grad():
        model.model.vision_tower.embeddings.class_embedding[0] += 1e-3
    model.save_pretrained(place.model)


def another_image(place):
    path = place.images / "3.png"
    data = path.read_bytes()
    builders.picture(place.images, "3.png", (1, 2, 3))
    assert path.read_bytes() != data


def another_preprocessing(place):
    path = place.model / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_mean"] = [0.4, 0.5, 0.6]
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "computed"),
    [(another_tower, 8), (another_image, 1), (another_preprocessing, 8), (lambda place: None, 0)],
)
def test_another_tower_image_or_preprocessing_is_a_miss(copied, own_cache, filled, change, computed):
    for i in range(8):  # as they are, they have two colors: equal files are one image
        builders.picture(copied.images, f"{i}.png", (9 * i, 0, 0))
    assert cached(prepared(copied.model, copied)) is not None
    assert sum(filled) == 8
    filled.clear()
    change(copied)
    assert cached(prepared(copied.model, copied)) is not None
    assert sum(filled) == computed


def test_a_fill_that_is_interrupted_goes_on(loud, own_cache, monkeypatch, filled, caplog):
    monkeypatch.setattr(feature_fill, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_fill, "IMAGES_AT_ONCE", 1)
    counted = feature_fill._towers

    def interrupted(*arguments):
        if sum(filled) == 1:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(feature_fill, "_towers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(prepared(loud.model, loud))
    assert "the features of 1 of 2 images are kept in" in caplog.text
    monkeypatch.setattr(feature_fill, "_towers", counted)
    filled.clear()
    check_equal(prepared(loud.model, loud))
    assert sum(filled) == 1, "two different pictures, one of them done before"


def test_a_shard_that_was_cut_off_is_computed_again(loud, own_cache, filled):
    cached(prepared(loud.model, loud))
    (shard,) = own_cache.glob("vision/*/*.safetensors")
    whole = shard.read_bytes()
    for damage in (whole[:-10], whole[:5], b""):
        shard.write_bytes(damage)
        check_equal(prepared(loud.model, loud))
        assert shard.read_bytes() == whole


def test_a_store_that_is_not_what_it_is_named_after_is_refused(loud, own_cache):
    cached(prepared(loud.model, loud))
    (note,) = own_cache.glob("vision/*/store.json")
    note.write_text(note.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(MismatchError, match=r"store\.json does not match the name of its folder"):
        cached(prepared(loud.model, loud))


def test_ranks_share_the_work(loud, own_cache, filled):
    for rank in (0, 1):
        ready = prepared(loud.model, loud)
        share = replace(CPU, rank=rank, ranks=2)
        if rank == 0:  # the other one has not done its share: nothing to train on yet
            with pytest.raises(KeyError):
                cached(ready, share)
        else:
            assert cached(ready, share) is not None
        assert sum(filled) == rank + 1


def test_two_writers_of_one_store_do_not_disturb_each_other(tmp_path):
    a, b = (FeatureStore(tmp_path, {"tower": "x"}) for _ in range(2))
    values = {name: ([torch.full((1, 2), float(i))], [1, 1]) for i, name in enumerate("pqr")}
    a.add({"p": values["p"], "q": values["q"]})
    b.add({"q": values["q"], "r": values["r"]})
    for store in (a, b, FeatureStore(tmp_path, {"tower": "x"})):
        store.refresh()
        for name, (features, lengths) in values.items():
            found = store.get(name)
            assert torch.equal(found[0][0], features[0])
            assert found[1] == lengths
    assert FeatureStore(tmp_path, {"tower": "y"}).missing("pqr") == ["p", "q", "r"]


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_once(loud, own_cache):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_fill_alone, args=(loud,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    check_equal(prepared(loud.model, loud))


def _fill_alone(place):
    check_equal(prepared(place.model, place))


def test_a_full_disk_is_told_before_anything_is_computed_twice(loud, own_cache, monkeypatch):
    usage = shutil.disk_usage(loud.images)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        StorageError, match=r"needs 1\.3 kB in .*, where 0\.1 kB are free: set MGLL_CACHE_DIR"
    ):
        cached(prepared(loud.model, loud))
    assert not list(own_cache.glob("vision/*/*.safetensors"))


def test_a_tower_that_trains_is_not_cached(loud, caplog):
    ready = prepared(loud.model, loud)
    ready.model.model.vision_tower.requires_grad_(True)
    assert cached(ready) is None
    assert "no feature cache: no module of its tower is frozen as a whole" in "\n".join(caplog.messages)


def test_a_cache_that_does_not_fit_is_never_used(loud, own_cache, monkeypatch):
    cached(prepared(loud.model, loud))
    (shard,) = own_cache.glob("vision/*/*.safetensors")
    save_file({n: v + 1 if v.is_floating_point() else v for n, v in load_file(shard).items()}, shard)
    feature_store._opened.cache_clear()
    ready = prepared(loud.model, loud)
    with pytest.raises(
        MismatchError, match=r"does not fit this model: features differ .*`feature_cache=False`"
    ):
        cached(ready)
    assert ready.model.model.vision_tower.config.model_type == "clip_vision_model", "the tower is back"


def test_adapters_around_the_model_train_on_the_cache_as_well(loud, own_cache):
    ready = prepared(loud.model, loud)
    ready.model = get_peft_model(ready.model, LoraConfig(target_modules=r".*language_model.*q_proj"))
    check_equal(ready)


def test_the_towers_come_back_for_as_long_as_they_are_needed(loud, own_cache):
    ready = prepared(loud.model, loud)
    batch = fresh_batch(ready)
    expected = loss(ready.model, batch)
    cache = cached(ready)
    with pytest.raises(RuntimeError, match="is replaced by a cache"):
        loss(ready.model, batch)
    with cache.cast.towers_back():
        assert loss(ready.model, batch) == expected
    assert loss(ready.model, whole_batch(cache)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_bench_times_four_arms(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "bench" / "retrain.py"
    options = ["--shape", "smoke", "--steps", "2", "--repeats", "1", "--out", tmp_path / "bench.json"]
    subprocess.run([sys.executable, script, *map(str, options)], check=True, capture_output=True)
    rates = json.loads((tmp_path / "bench.json").read_text())["samples_per_second"]
    assert set(rates) == {"limit", "bare", "cached", "uncached"}
    assert all(value > 0 for values in rates.values() for value in values)
