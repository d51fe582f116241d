import json
import re
import shutil
import sys

import pytest

from mgll_encoder.common import progress
from mllm_adapters.cli import retrain
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters.retraining import color_rows, turns, write_json


@pytest.fixture
def place(tmp_path, tiny_llava):
    """A folder with a model, data and images, as a user has them."""
    shutil.copytree(tiny_llava, tmp_path / "llava")
    write_json(tmp_path / "train.json", color_rows(tmp_path / "images", 4))
    return tmp_path


@pytest.fixture
def command(place, monkeypatch, capsys):
    """Run retrain-projector; return its exit code, standard output and standard error."""

    def run(*extra, **replaced):
        options = {"model": place / "llava", "data": place / "train.json", "images": place / "images"}
        options |= replaced
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        workers = ["--workers", "0", "--report-to", "none"]
        monkeypatch.setattr(sys, "argv", ["retrain-projector", *given, *workers, *map(str, extra)])
        with pytest.raises(SystemExit) as left:
            retrain.main()
        return left.value.code, *capsys.readouterr()

    return run


def files(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_the_command_shows_what_trains_writes_the_model_and_says_what_comes_next(command, place):
    code, out, err = command("--max-steps", 2, "--batch-size", 2)
    assert code == 0, err
    for words in ("projector", "language_model", "the rest is frozen", "Rows: 4 of 4", "Steps: 2", "Loss:"):
        assert words in out
    written = place / "llava-aligned"
    assert f"Next: eval-mcq run --model {written}" in out.replace("\n", "")
    assert "llava-aligned.training" in err.replace("\n", "")
    assert json.loads((written / "training.json").read_text())["steps"] == 2
    assert (written / "model.safetensors").is_file()


def test_a_dry_run_shows_the_plan_and_writes_nothing(command, place):
    before = files(place)
    code, out, _ = command("--dry-run", "--epochs", 3, "--batch-size", 2)
    assert code == 0
    assert "Steps: 6" in out
    assert files(place) == before


def test_a_bench_of_the_test_split_is_trained_on_with_a_warning(command, place):
    bench = small_bench(place / "bench", 3)
    code, _, err = command("--dry-run", data=bench)
    assert (code, "test split" in err) == (0, False)
    header, *questions = bench.read_text().splitlines()
    bench.write_text(
        "\n".join([json.dumps({**json.loads(header), "built": {"split": "test"}}), *questions]) + "\n"
    )
    code, _, err = command("--dry-run", data=bench)
    assert code == 0
    line = next(line for line in err.splitlines() if line.startswith("warning:"))
    assert line.startswith(
        f"warning: {bench} is of the test split: a model that is trained on it cannot be judged by it"
    )
    assert line.endswith("(build one with `eval-mcq build --split train`)")


def test_a_log_gets_lines_with_the_time_left_and_no_bars(command, place, monkeypatch):
    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    code, out, err = command("--max-steps", 3, "--batch-size", 2)
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("Training")]
    assert lines[0] == "Training (3 steps) ..."
    assert re.fullmatch(r"Training: 1 of 3 steps(, loss \d+\.\d{4})?, \d+ s left", lines[1])
    assert re.fullmatch(r"Training: 2 of 3 steps, loss \d+\.\d{4}, \d+ s left", lines[2])
    assert len(lines) == 3
    assert "Reading rows of train.json: 4 so far" in err
    for drawn in ("\r", "it/s", "s/it", "█", "{'loss'", "Writing model shards"):
        assert drawn not in out + err, repr((out + err)[(out + err).find(drawn) - 300 :][:400])


def test_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["retrain-projector", "--help"])
    with pytest.raises(SystemExit) as left:
        retrain.main()
    assert left.value.code == 0
    assert "Example: retrain-projector --model" in " ".join(capsys.readouterr().out.split())


def no_images(place):
    shutil.rmtree(place / "images")


def one_image_less(place):
    (place / "images" / "2.png").unlink()


def image_is_text(place):
    (place / "images" / "2.png").write_text("no picture")


def data_is(value):
    return lambda place: write_json(place / "train.json", value)


def data_is_broken(place):
    (place / "train.json").write_text('[{"id": 1, "image"')


def output_is_taken(place):
    (place / "llava-aligned").mkdir()


def no_model(place):
    shutil.rmtree(place / "llava")


def weights_are_cut(place):
    file = place / "llava" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def no_tokenizer(place):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (place / "llava" / name).unlink()


def original_layout(place):
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": "x"}
    write_json(place / "llava" / "config.json", config)


TAGS = [{"id": 1, "image": "0.png", "conversations": turns("<image> <image>", "red")}]
MONOLOGUE = [{"id": 1, "image": "0.png", "conversations": turns("<image>", "red", "Sure?")}]
TALK_ONLY = [{"id": 1, "conversations": turns("Hello", "Hi")}]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (data_is([]), "holds no conversations"),
        (data_is(TAGS), "2 <image> tags for 1 images"),
        (data_is(MONOLOGUE), "the answer of 'gpt' is missing"),
        (data_is(TALK_ONLY), "none of 1 rows can be trained on"),
        (data_is_broken, "is not JSON"),
        (no_images, "image folder"),
        (one_image_less, "1 of 4 images are missing"),
        (output_is_taken, "llava-aligned exists"),
        (no_model, "llava"),
        (weights_are_cut, "damaged"),
        (no_tokenizer, "no tokenizer"),
        (original_layout, "swap-encoder convert"),
    ],
)
def test_bad_input_gives_one_line_exit_code_2_and_writes_nothing(command, place, spoil, complaint):
    spoil(place)
    before = files(place)
    code, out, err = command("--max-steps", 1)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert err.rstrip().endswith(errors[0])
    assert complaint in errors[0]
    assert out == ""
    assert files(place) == before


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--batch-size", "0", "--batch-size is 0"),
        ("--report-to", "tensorbord", "did you mean 'tensorboard'"),
        ("--max-length", "3", "longer than 3 tokens"),
        ("--resume", None, "no checkpoint to resume from"),
    ],
)
def test_bad_options_give_one_line_exit_code_2_and_write_nothing(command, place, option, value, complaint):
    before = files(place)
    code, _, err = command(option, *([value] if value else []))
    assert code == 2
    assert complaint in err
    assert files(place) == before
