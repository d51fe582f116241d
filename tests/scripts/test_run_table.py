"""The table of a family in one command, stopped and taken up again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval_mcq.helpers import write_labels
from tests.mllm_adapters import complete

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_table.sh"
DISEASES = ("age-related macular degeneration", "cataract", "glaucoma", "myopia")

pytestmark = pytest.mark.slow  # a dozen commands, each of which starts Python and its libraries


def run_table(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", **{name: str(value) for name, value in settings.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_a_table_of_three_arms_is_made_and_not_made_twice(golden: Path, tmp_path: Path) -> None:
    labels = write_labels(
        tmp_path,
        [{"file": f"{i}.png", "labels": DISEASES[i % 4], "patient": f"p{i}"} for i in range(160)],
    )
    settings = {
        "ENCODER": complete.encoder(tmp_path / "mgll"),
        "MLLM": complete.BUILDERS["llava"](tmp_path / "host", lambda: golden),
        "LABELS": labels,
        "IMAGES": tmp_path / "photos",
        "OUT": tmp_path / "tables",
        "PRESET": "fundus10",
        "BUILD": "--patient-column patient --diseases AMD,Cataract,Glaucoma,Myopia",
        "TRAIN": "deepspeed=null max_steps=2 per_device_train_batch_size=2 dataloader_num_workers=0 save_steps=1",
        "RUN": "--rotations 2",
    }
    out = tmp_path / "tables" / "llava"
    stopped = run_table("llava", **settings, LAUNCH="false")
    assert stopped.returncode == 1, stopped.stderr
    assert (out / "mgll" / "config.json").is_file()
    assert not (out / "mgll-retrained").exists()
    done = run_table("llava", **settings)
    assert done.returncode == 0, done.stderr
    assert f"{out}/mgll is there" in done.stderr
    assert "| Average |" in (out / "table.md").read_text()
    assert all(arm in (out / "table.md").read_text() for arm in ("base", "retrained", "mgll"))
    assert (out / "report.html").is_file()
    again = run_table("llava", **settings)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(" is there") == 11


def test_what_is_missing_is_said() -> None:
    assert "ENCODER=mgll-fundus.pt" in run_table("llava").stderr
    given = {"ENCODER": "e", "LABELS": "l", "IMAGES": "i"}
    assert "family is one of llava" in run_table("lava", **given).stderr
    assert "leave it out with 'all'" in run_table("all", **given, MLLM="m").stderr
