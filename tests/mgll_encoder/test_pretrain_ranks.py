"""Pretraining on two processes gives the same epochs, including augmentation, as one with twice the batch size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.phantom.dataset import write_phantom

COMMAND = Path(sys.executable).parent / "mgll-encoder"


def run(*words: object, **environment: str) -> None:
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(tower: Path) -> list[float]:
    content = json.loads((tower / "mgll_tower.json").read_text())
    return content["provenance"]["pretraining"]["epoch_losses"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_learn_as_one_with_the_double_batch(tmp_path):
    folder = tmp_path / "set"
    write_phantom(folder, 4, image_size=64)
    build_fundus(FundusTable(folder / "labels.csv"), folder, folder / "manifest.jsonl", test_share=0.2)
    command = [
        COMMAND, "pretrain", "--manifest", folder / "manifest.jsonl", "--tower-size", "tiny", "--epochs", "2",
        "--workers", "0",
    ]  # fmt: skip
    run(*command, "--batch-size", "16", "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    run(*torchrun, *command, "--batch-size", "8", "--out", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "set", "two"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="DeepSpeed compiles its optimiser")
def test_deepspeed_learns_the_same(tmp_path):
    pytest.importorskip("deepspeed")
    folder = tmp_path / "set"
    write_phantom(folder, 4, image_size=64)
    build_fundus(FundusTable(folder / "labels.csv"), folder, folder / "manifest.jsonl", test_share=0.2)
    settings = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
    }  # fmt: skip
    (tmp_path / "zero2.json").write_text(json.dumps(settings))
    command = [
        COMMAND, "pretrain", "--manifest", folder / "manifest.jsonl", "--tower-size", "tiny", "--epochs", "2",
        "--workers", "0", "--batch-size", "16",
    ]  # fmt: skip
    run(*command, "--out", tmp_path / "plain")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--no-python"]
    run(
        *torchrun,
        *command,
        "--deepspeed",
        tmp_path / "zero2.json",
        "--out",
        tmp_path / "zero",
        DS_ACCELERATOR="cpu",
    )
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "plain"), abs=2e-3)
