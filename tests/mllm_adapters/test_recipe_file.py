import re
from pathlib import Path

import pytest
import yaml

from mgll_encoder.common.errors import NotFoundError, UserError
from mllm_adapters.training.recipe import Recipe
from mllm_adapters.training.recipe_file import resolve


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


def test_a_recipe_has_the_trainers_names_and_ours(recipe):
    file = recipe(
        "stage: lora\nrank: 8\nnum_train_epochs: 2\nper_device_train_batch_size: 4\nweight_decay: 0.1\n"
    )
    found = resolve(file).recipe
    assert (found.stage, found.rank, found.epochs, found.batch_size) == ("lora", 8, 2, 4)
    assert found.arguments == {"weight_decay": 0.1}


def test_a_number_that_yaml_takes_for_text_is_a_number(recipe):
    assert resolve(recipe("learning_rate: 1e-4")).recipe.learning_rate == 1e-4


def test_what_is_typed_wins_over_the_file_and_the_file_over_defaults(recipe):
    file = recipe("seed: 3\nmax_length: 100\nlogging_steps: 5\ndataloader_num_workers: 7")
    found = resolve(file, ["max_length=200"], {"logging_steps": 9, "batch_size": None}, workers=2)
    assert (found.recipe.seed, found.recipe.max_length, found.options.logging_steps) == (3, 200, 9)
    assert (found.recipe.batch_size, found.options.workers) == (Recipe().batch_size, 7)
    assert resolve(workers=2).options.workers == 2


def test_the_learning_rate_is_the_stages_own_unless_given():
    assert [resolve(None, [f"stage={stage}"]).recipe.learning_rate for stage in ("projector", "lora", "full")] == [
        1e-3, 2e-4, 2e-5,
    ]  # fmt: skip
    assert resolve(None, ["stage=full", "learning_rate=0.5"]).recipe.learning_rate == 0.5


def test_paths_start_from_the_recipe_file_or_from_here(recipe, tmp_path):
    file = recipe("deepspeed: sub/zero2.json")
    assert resolve(file).options.deepspeed == tmp_path / "sub" / "zero2.json"
    assert resolve(None, ["deepspeed=zero2.json"]).options.deepspeed == Path("zero2.json")


def test_the_resolved_recipe_is_a_recipe(recipe):
    file = recipe(
        "stage: lora-vision\nqlora: true\nreport_to: none\nlr_scheduler_type: linear\nmax_grad_norm: 0.3"
    )
    first = resolve(file)
    again = resolve(recipe(first.as_yaml()))
    assert again == first
    assert yaml.safe_load(first.as_yaml())["report_to"] == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learning_rat: 1", r"recipe\.yaml: unknown recipe key 'learning_rat': did you mean 'learning_rate'"),
        ("batch_size: 4", r"unknown recipe key 'batch_size': did you mean 'per_device_train_batch_size'"),
        ("learning_rate: fast", r"recipe\.yaml: learning_rate is fast: it must be a valid number"),
        (
            "per_device_train_batch_size: 0",
            r"recipe\.yaml: per_device_train_batch_size is 0: .* greater than 0",
        ),
        ("weight_decay: [1]", r"recipe\.yaml: weight_decay is \[1\]"),
        ("seed:", r"recipe\.yaml: seed has no value"),
        ("seed: 4294967296", r"seed is 4294967296: it must be less than 4294967296"),
        ("report_to: 3", r"report_to is 3: it must be a valid tuple"),
        ("learning_rate: nan", r"learning_rate is nan: it must be a finite number"),
        ("bf16: true", r"bf16 is not for recipes: use precision"),
        ("do_eval: true", r"do_eval has no effect"),
        ("output_dir: x", r"output_dir is not for recipes: it follows from `out`"),
        ("stage: lorra\n", r"unknown stage 'lorra': did you mean 'lora'"),
        ("rank: 8", r"recipe\.yaml: rank has no effect: stage 'projector' has no adapters"),
        ("qlora: true", r"`qlora=True` .* stage 'projector' has no adapters"),
        ("a: b: c", r"recipe\.yaml is not YAML"),
        ("just words", r"recipe\.yaml has no keys"),
        ("report_to: tensorbord", r"did you mean 'tensorboard'"),
    ],
)
def test_bad_recipes_are_refused_in_one_line_with_file_and_key(recipe, text, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        resolve(recipe(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "flags", "complaint"),
    [
        (["seed"], {}, "'seed' is not an override: write key=value"),
        (["sead=1"], {}, "did you mean 'seed'"),
        (["seed=x"], {}, "seed= on the command line is x"),
        (["seed=1", "seed=2"], {}, "seed is given twice"),
        (["per_device_train_batch_size=1"], {"batch_size": 2}, "given twice: as `batch_size`"),
        ([], {"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_bad_overrides_are_refused(overrides, flags, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        resolve(None, overrides, flags)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.yaml does not exist"):
        resolve(tmp_path / "none.yaml")
