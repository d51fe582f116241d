"""`make demo` at tiny sizes: every command from pictures to the table runs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "demo.py"


def demo(out: Path) -> str:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--quick"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200).stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_ends_in_a_table_and_says_that_it_is_a_phantom(tmp_path: Path) -> None:
    printed = demo(tmp_path / "demo")
    for command in ("mgll-encoder pretrain", "swap-encoder --mllm", "retrain-projector", "eval-mcq run"):
        assert f"$ {command}" in printed
    assert "This is a phantom" in printed
    table = (tmp_path / "demo" / "table.md").read_text()
    for word in ("base", "retrained", "mgll", "Glaucoma", "Average"):
        assert word in table
    again = demo(tmp_path / "demo")
    assert "$ mgll-encoder pretrain" not in again, "finished steps are kept"
    assert "Glaucoma" in again
