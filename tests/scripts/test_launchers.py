"""The launch lines in the recipes' headers, run unchanged except for sizes: two processes on the CPU."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_adapters.cli.retrain import main as retrain_projector
from tests import builders
from tests.mllm_adapters.retraining import color_rows, loud_llava, write_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "scripts" / "recipes" / "llava" / "projector.yaml"
LAUNCHERS = ("one GPU", "deepspeed", "torchrun", "accelerate")
OVERRIDES = (
    "max_steps=2", "gradient_accumulation_steps=1", "logging_steps=1", "dataloader_num_workers=0", "report_to=none",
)  # fmt: skip


def line(launcher: str, recipe: Path = RECIPE) -> str:
    found = re.search(rf"^# {launcher}: +(.+)$", recipe.read_text(), re.MULTILINE)
    return found[1] if found else ""


@pytest.fixture(scope="module")
def place(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    loud_llava(tiny_llava, folder / "MODEL")
    write_json(folder / "train.json", color_rows(folder / "images"))
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> list[float]:
    return run("one GPU", place, 2)


def run(launcher: str, place: Path, size: int) -> list[float]:
    """The losses of a launch line with ``size`` examples per process."""
    out = place / launcher.replace(" ", "-")
    words = shlex.split(line(launcher).replace(" 8 ", " 2 "))
    assert "2" in words or launcher == "one GPU"
    done = subprocess.run(
        [*words, *OVERRIDES, f"per_device_train_batch_size={size}", "--out", str(out)],
        cwd=place,
        env={
            **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [loss for _, loss in json.loads((out / "training.json").read_text())["losses"]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_a_launch_line_trains_on_two_processes_as_on_one(
    launcher: str, place: Path, alone: list[float]
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is in the extra 'train'")
    assert run(launcher, place, 1) == pytest.approx(alone, abs=1e-4)


def test_every_recipe_gives_the_same_lines() -> None:
    for file in sorted((ROOT / "scripts" / "recipes").rglob("*.yaml")):
        for launcher in LAUNCHERS:
            found = line(launcher, file).replace(
                f"{file.parent.name}/{file.stem}.yaml", "llava/projector.yaml"
            )
            found = found.replace("finetune-lora", "retrain-projector").replace("cli.lora", "cli.retrain")
            if file.stem == "qlora":
                assert "deepspeed=" not in found
                assert found in ("", line(launcher), line(launcher).removesuffix(" deepspeed=null"))
            else:
                assert found == line(launcher), file


def test_deepspeed_without_a_launcher_is_refused_before_anything_is_loaded(place: Path) -> None:
    complaint = builders.refused(
        retrain_projector, "--recipe", RECIPE, "--model", place / "MODEL", "--data", place / "train.json",
        "--images", place / "images", "--out", place / "none",
    )  # fmt: skip
    assert "start with torchrun, deepspeed --no_local_rank or accelerate launch --multi_gpu" in complaint
    assert "deepspeed=null" in complaint
