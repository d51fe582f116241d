"""The table of a family in one command, stopped, killed and resumed; and of all families."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import picture
from tests.eval_mcq.helpers import write_labels
from tests.mllm_adapters import complete

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_table.sh"
DISEASES = ("age-related macular degeneration", "cataract", "glaucoma", "myopia")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # dozens of commands, each of which starts its libraries


def start(*arguments: str, **settings: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "COLUMNS": "200", **{name: str(value) for name, value in settings.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.Popen(
        [SCRIPT, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_table(*arguments: str, **settings: object) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    task = start(*arguments, **settings)
    shown, _ = task.communicate()
    return task.returncode, shown


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    labels = write_labels(
        tmp_path,
        [{"file": f"{i}.png", "labels": DISEASES[i % 4], "patient": f"p{i}"} for i in range(160)],
    )
    for i in range(
        160
    ):  # each of another shade: pictures that are the same are the same image, seen in training
        picture(tmp_path / "photos", f"{i}.png", color=(i, 255 - i, 40))
    return {
        "ENCODER": complete.encoder(tmp_path / "mgll"),
        "LABELS": labels,
        "IMAGES": tmp_path / "photos",
        "OUT": tmp_path / "tables",
        "PRESET": "fundus10",
        "BUILD": "--patient-column patient --diseases AMD,Cataract,Glaucoma,Myopia",
        "TRAIN": "max_steps=30 per_device_train_batch_size=2 dataloader_num_workers=0 save_steps=1",
        "RUN": "--rotations 2",
    }


def test_a_table_of_three_arms_is_made_and_not_made_twice(
    golden: Path, settings: dict[str, object], tmp_path: Path
) -> None:
    settings["MLLM"] = complete.BUILDERS["llava"](tmp_path / "host", lambda: golden)
    out = tmp_path / "tables" / "llava"
    code, shown = run_table("llava", **settings, LAUNCH="false")
    assert code == 1, shown
    assert (out / "mgll" / "config.json").is_file()
    assert not list(out.glob("mgll-retrained*"))

    task = start("llava", **settings)
    while not list(out.glob("mgll-retrained-control.training/checkpoint-*")):
        assert task.poll() is None, task.communicate()[0]
        time.sleep(0.05)
    os.killpg(task.pid, signal.SIGKILL)
    task.communicate()
    assert (out / "mgll-retrained").exists()
    assert not (out / "mgll-retrained-control").exists()

    code, shown = run_table("llava", **settings)
    assert code == 0, shown
    assert f"{out}/mgll exists" in shown
    assert "mgll-retrained is finished" in shown
    records = [
        json.loads((out / f"mgll-retrained{arm}" / "training.json").read_text()) for arm in ("", "-control")
    ]
    assert records[0]["source"] == "mgll"
    assert records[1]["source"] == "base"
    assert all(record["steps"] == 30 for record in records)
    assert records[0]["arms"] == records[1]["arms"]
    assert "| Average |" in (out / "table.md").read_text()
    assert all(arm in (out / "table.md").read_text() for arm in ("base", "control", "mgll"))
    assert (out / "report.html").is_file()
    code, shown = run_table("llava", **settings)
    assert code == 0, shown
    assert shown.count(" exists\n") == 10


def test_all_families_go_on_past_one_that_fails(
    golden: Path, settings: dict[str, object], tmp_path: Path
) -> None:
    hosts, out = tmp_path / "hosts", tmp_path / "tables"
    hosts.mkdir()
    complete.BUILDERS["med-flamingo"](hosts / "med-flamingo", lambda: golden)
    code, shown = run_table("all", **settings, MLLM=hosts)
    assert code == 1, shown
    missing = "llava llava-med qwen-vl internvl mini-gemini instructblip janus-pro"
    assert f"error: no table of {missing}: see above" in shown
    assert (out / "med-flamingo" / "table.md").is_file()
    assert "| Average |" in (out / "med-flamingo" / "table.md").read_text()
    assert "| mgll |" in (out / "table.md").read_text()


def test_what_is_missing_is_said() -> None:
    assert "ENCODER=mgll-fundus.pt" in run_table("llava")[1]
    given = {"ENCODER": "e", "LABELS": "l", "IMAGES": "i"}
    assert "family is one of llava" in run_table("lava", **given)[1]
