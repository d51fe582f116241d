import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, TrainerCallback

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    OutputTakenError,
    TrainingError,
    UnknownNameError,
    UnsupportedCheckpointError,
)
from mgll_encoder.common.files import sha256
from mgll_encoder.common.resuming import last_checkpoint
from mllm_adapters.training.engine import train
from mllm_adapters.training.prepare import names_on_disk, prepare_training
from mllm_adapters.training.recipe import Recipe, RunOptions
from mllm_adapters.training.work_folder import work_folder
from tests.mllm_adapters.retraining import color_rows, loud_llava, turns, write_json

FAST = RunOptions(report_to=(), logging_steps=1, save_steps=2)
RECIPE = Recipe(max_steps=6, batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """The Trainer collects garbage at every start, a second each time where all of torch is on the heap."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tiny_llava, tmp_path_factory):
    return loud_llava(tiny_llava, tmp_path_factory.mktemp("loud") / "loud")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_json(folder / "train.json", color_rows(folder / "images"))


@pytest.fixture
def run(model, data, tmp_path):
    def start(name="out", recipe=RECIPE, options=FAST, data=data, model=model, callbacks=(), **flags):
        job = prepare_training(model, data, data.parent / "images", recipe)
        return train(job, tmp_path / name, options, callbacks=callbacks, **flags)

    return start


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run that nothing disturbed, to compare others with. Do not write into it."""
    job = prepare_training(model, data, data.parent / "images", RECIPE)
    return train(job, tmp_path_factory.mktemp("whole") / "out", FAST)


class Interrupt(TrainerCallback):
    """The user presses Ctrl-C at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder):
    return load_file(folder / "model.safetensors")


def projector(folder):
    return {name: value for name, value in weights(folder).items() if "multi_modal_projector" in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_the_projector_changes_on_disk(model, whole):
    before, after = weights(model), weights(whole.out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(projector(model))


def test_the_result_is_an_ordinary_checkpoint_with_its_processor(model, whole):
    outcome = whole
    loaded, report = AutoModelForImageTextToText.from_pretrained(outcome.out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = projector(outcome.out)["multi_modal_projector.linear_1.weight"]
    assert torch.equal(loaded.model.multi_modal_projector.linear_1.weight, written)
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "config.json"):
        assert (outcome.out / name).read_bytes() == (model / name).read_bytes()


def test_half_precision_checkpoints_stay_half_precision(model, run, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float16).save_pretrained(half)
    outcome = run(model=half)
    assert {value.dtype for value in weights(outcome.out).values()} == {torch.float16}
    assert not same(projector(half), projector(outcome.out))


def test_the_loss_falls_on_a_task_that_can_be_learnt_and_the_answers_follow_the_image(model, data, run):
    outcome = run(recipe=Recipe(max_steps=40, batch_size=8, learning_rate=2e-2))
    first, last = outcome.losses[0][1], outcome.losses[-1][1]
    assert last < 0.5 * first
    job = prepare_training(outcome.out, data, data.parent / "images", RECIPE)
    from mllm_adapters.data.dataset import ConversationDataset

    examples = ConversationDataset(job.examples, data.parent / "images", job.processor)
    red, blue = examples[0], examples[1]
    with torch.no_grad():
        right = job.model(**{k: v[None] if v.ndim == 1 else v for k, v in red.items()}).loss
        swapped = {**red, "pixel_values": blue["pixel_values"]}
        wrong = job.model(**{k: v[None] if v.ndim == 1 else v for k, v in swapped.items()}).loss
    assert right < wrong


def test_the_record_says_what_was_done(data, whole):
    outcome = whole
    record = json.loads((outcome.out / "training.json").read_text())
    assert record["data_sha256"] == sha256(data)
    assert record["steps"] == outcome.steps == 6
    assert record["final_loss"] == outcome.losses[-1][1]
    assert [step for step, _ in record["losses"]] == [1, 2, 3, 4, 5, 6]
    assert sorted(record["trained"]) == sorted(projector(outcome.out))
    assert record["learning_rate"] == RECIPE.learning_rate


def test_the_last_step_is_logged_whatever_the_interval(run):
    outcome = run(options=RunOptions(report_to=(), logging_steps=100))
    assert [step for step, _ in outcome.losses] == [1, 6]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, whole):
    again, other = run("a"), run("b", recipe=replace(RECIPE, seed=1))
    assert same(projector(whole.out), projector(again.out))
    assert not same(projector(whole.out), projector(other.out))


def test_accumulated_batches_weigh_tokens_like_one_batch(run):
    whole = run("whole", recipe=Recipe(max_steps=3, batch_size=4, learning_rate=1e-3))
    parts = run(
        "parts", recipe=Recipe(max_steps=3, batch_size=1, gradient_accumulation=4, learning_rate=1e-3)
    )
    for (_, a), (_, b) in zip(whole.losses, parts.losses, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("interrupted_at", [3, 5])
def test_an_interrupted_run_that_is_resumed_ends_like_one_that_was_not(run, whole, tmp_path, interrupted_at):
    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[Interrupt(interrupted_at)])
    assert not (tmp_path / "cut").exists()
    saved = last_checkpoint(work_folder(tmp_path / "cut"))
    assert saved.name == f"checkpoint-{interrupted_at - 1}"
    resumed = run("cut", resume=True)
    assert same(projector(resumed.out), projector(whole.out))
    assert resumed.losses == whole.losses


def test_a_run_that_finished_training_but_not_writing_can_be_resumed(run, tmp_path):
    outcome = run()
    kept = projector(outcome.out)
    shutil.rmtree(outcome.out)
    assert same(projector(run(resume=True).out), kept)


def test_a_half_written_checkpoint_is_passed_over(run, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[Interrupt(5)])
    work = work_folder(tmp_path / "cut")
    (work / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_checkpoint(work).name == "checkpoint-2"
    assert same(projector(run("cut", resume=True).out), projector(whole.out))


def test_checkpoints_hold_the_projector_only_and_do_not_pass_for_a_model(model, whole):
    saved = last_checkpoint(whole.work)
    assert set(load_file(saved / "trained.safetensors")) == {f"model.{name}" for name in projector(model)}
    assert not (saved / "config.json").exists()
    assert not (saved / "model.safetensors").exists()


def test_a_frozen_tower_stays_in_evaluation_mode_while_training(model, run, whole, tmp_path):
    wobbly = tmp_path / "wobbly"
    shutil.copytree(model, wobbly)
    config = json.loads((wobbly / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    write_json(wobbly / "config.json", config)
    assert run(model=wobbly).losses == whole.losses


def test_rows_without_images_do_not_stop_the_projector_stage(model, data):
    rows = [*json.loads(data.read_text()), {"id": "t", "conversations": turns("Hello", "Hi")}]
    mixed = write_json(data.parent / "mixed.json", rows)
    job = prepare_training(model, mixed, data.parent / "images", RECIPE)
    assert (job.counts.kept, job.counts.text_only) == (8, 1)


def test_gradient_checkpointing_changes_nothing_but_memory(run, whole):
    saving = RunOptions(report_to=(), logging_steps=1, gradient_checkpointing=True)
    assert dict(run(options=saving).losses) == pytest.approx(dict(whole.losses))


def test_images_are_opened_by_workers_with_the_same_result(run, whole):
    many = RunOptions(report_to=(), logging_steps=1, workers=2, feature_cache=False)
    assert run(options=many).losses == whole.losses


def test_tensorboard_logs_go_to_the_work_folder(run):
    outcome = run(options=RunOptions(report_to=("tensorboard",)))
    assert list(outcome.work.glob("runs/*/events.*"))


def test_planned_steps_are_the_trainers(run, model, data, tmp_path):
    for recipe in (Recipe(epochs=2, batch_size=3, gradient_accumulation=2), Recipe(epochs=0.5, batch_size=2)):
        job = prepare_training(model, data, data.parent / "images", recipe)
        outcome = train(job, tmp_path / f"{recipe.epochs}", FAST)
        assert outcome.steps == job.steps


def test_an_output_that_exists_and_a_run_in_the_way_are_refused(run, tmp_path):
    outcome = run()
    with pytest.raises(OutputTakenError, match="exists"):
        run()
    shutil.rmtree(outcome.out)
    with pytest.raises(MismatchError, match=r"checkpoint-6 of an earlier run.*`resume=True`.*`force=True`"):
        run()
    assert run(force=True).steps == 6


def test_resuming_nothing_or_another_run_is_refused(run, data):
    with pytest.raises(NotFoundError, match="no checkpoint to resume from"):
        run(resume=True)
    shutil.rmtree(run().out)
    with pytest.raises(MismatchError, match=r"another run: its learning_rate was 0\.01, now it is 0\.5"):
        run(recipe=replace(RECIPE, learning_rate=0.5), resume=True)
    rows = json.loads(data.read_text())
    with pytest.raises(MismatchError, match="another run: its data_sha256"):
        run(data=write_json(data.parent / "other.json", rows[:4]), resume=True)


def test_resuming_with_another_model_is_refused(model, run, tmp_path):
    shutil.rmtree(run().out)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    swapped = LlavaForConditionalGeneration.from_pretrained(model)
    with torch.no_grad():
        swapped.model.vision_tower.embeddings.class_embedding.add_(1)
    swapped.save_pretrained(other)
    with pytest.raises(MismatchError, match="another run: its model_sha256"):
        run(model=other, resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_since_it_was_checked_stops_training_with_its_name_and_the_step(
    model, data, tmp_path, workers
):
    folder = tmp_path / "damaged"
    shutil.copytree(data.parent, folder)
    job = prepare_training(model, folder / "train.json", folder / "images", RECIPE)
    broken = folder / "images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    options = RunOptions(report_to=(), workers=workers, save_steps=1, feature_cache=False)
    with pytest.raises(
        TrainingError, match=r"^image \S+3\.png cannot be decoded.*training stopped at step \d"
    ) as caught:
        train(job, tmp_path / "out", options)
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_training(run, tmp_path):
    with pytest.raises(
        TrainingError, match=r"became nan.* at step \d: start over with a lower `learning_rate`"
    ):
        run(recipe=replace(RECIPE, learning_rate=1e38))
    assert not (tmp_path / "out").exists()


def test_full_memory_says_which_knob_to_turn(run):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise torch.OutOfMemoryError

    with pytest.raises(TrainingError, match="`batch_size=2`: halve it"):
        run(callbacks=[Full()])


def test_a_checkpoint_in_its_original_layout_is_sent_to_convert(data, tmp_path):
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": "x"}
    write_json(tmp_path / "llava" / "config.json", config)
    with pytest.raises(UnsupportedCheckpointError, match=r"`convert\(mllm="):
        train(
            prepare_training(tmp_path / "llava", data, data.parent / "images", RECIPE), tmp_path / "out", FAST
        )


def test_a_model_without_a_tokenizer_is_refused(model, data, tmp_path):
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, mute)
    with pytest.raises(BadDataError, match="no tokenizer"):
        prepare_training(mute, data, data.parent / "images", RECIPE)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
        ({"max_steps": -1}, "`max_steps` is -1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        Recipe(**change)


def test_an_unknown_logger_is_refused_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'tensorboard'"):
        RunOptions(report_to=("tensorbord",))


def test_parameters_are_matched_to_stored_names_by_suffix_and_ambiguity_is_refused():
    names = ["model.multi_modal_projector.linear_1.weight"]
    stored = "multi_modal_projector.linear_1.weight"
    assert names_on_disk(names, [stored, "lm_head.weight"]) == {names[0]: stored}
    with pytest.raises(BadDataError, match="0 stored tensors"):
        names_on_disk(names, ["mm_projector.0.weight"])
    with pytest.raises(BadDataError, match="2 stored tensors"):
        names_on_disk(names, [stored, names[0]])
