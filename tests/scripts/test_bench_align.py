"""A user measures the benefit of alignment, with an interruption."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import builders
from tests.mllm_adapters import complete
from tests.mllm_adapters.retraining import COLORS, loud_llava, turns, write_json

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "align.py"
QUESTION = "<image>\nWhich?\nA. red\nB. blue\nAnswer with the letter."


@pytest.mark.slow
def test_the_bench_of_alignment_measures_each_arm_once(tiny_llava: Path, tmp_path: Path) -> None:
    base, encoder = loud_llava(tiny_llava, tmp_path / "base"), complete.encoder(tmp_path / "mgll")
    images = tmp_path / "photos"
    rows = []
    for i in range(12):
        builders.picture(images, f"{i}.png", list(COLORS.values())[i % 2])
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns(QUESTION, "AB"[i % 2])})
    data = write_json(tmp_path / "data.json", rows)
    out = tmp_path / "align.json"

    def bench(*more: str) -> str:
        done = subprocess.run(
            [
                sys.executable, SCRIPT, "--mllm", base,
                "--encoder", encoder, "--align", images, "--data", data, "--train", data,
                "--images", images, "--samples", "12", "--steps", "2", "--every", "1", "--out", out, *more,
            ],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = bench()
    found = json.loads(out.read_text())
    assert "Chance: 50.0%" in shown
    assert found["aligned on 12"]["alignment"]["connectors"]
    losses = {round(found[arm]["loss"], 4) for arm in found if arm != "retrained"}
    assert len(losses) == 3, "the width changes: both swaps that are not aligned have a new connector"
    assert set(found["retrained"]) == {"0"}

    del found["swapped, connector kept"], found["aligned on 12"]["alignment"]
    found["base"]["loss"] = 77.0
    found["aligned on 12"]["alignment"] = {"connectors": [], "seconds": 1}
    out.write_text(json.dumps(found))
    assert "77.0000" in bench("--seeds", "2")
    again = json.loads(out.read_text())
    assert round(again["swapped, connector kept"]["loss"], 4) in losses
    assert again["retrained"]["0"] == found["retrained"]["0"]
    assert set(again["retrained"]) == {"0", "1"}
