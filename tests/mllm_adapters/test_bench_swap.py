"""The bench runs, and says what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_bench_of_a_swap_runs_at_a_small_size(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "bench" / "swap.py", "--scratch", tmp_path / "scratch"]
    options = ["--size", "0.1", "--growth", "0.1", "--repeats", "1", "--shrink", "16", "--shard", "0.02"]
    subprocess.run([*command, *options, "--out", tmp_path / "swap.json"], check=True)
    runs = json.loads((tmp_path / "swap.json").read_text())["runs"]
    assert set(runs) == {"swap", "cp of the touched bytes", "load, replace, save", "swap at 0.1 GB"}
    assert runs["swap"][0]["written"] < runs["load, replace, save"][0]["written"] / 2
    assert not list((tmp_path / "scratch").iterdir())
