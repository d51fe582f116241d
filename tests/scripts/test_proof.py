"""Plain CLIP against MGLL in one command, on a folder in the form of the real photographs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mgll_encoder.data.phantom.dataset import write_phantom

SCRIPT = Path(__file__).parents[2] / "scripts" / "proof.py"

pytestmark = pytest.mark.slow  # four towers, each of which starts Python and its libraries


def proof(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def two_hospitals(tmp_path: Path) -> Path:
    """Phantom photographs, with every other one labeled as from another hospital."""
    folder = tmp_path / "data"
    write_phantom(folder, 60, 64, 0, False)
    with (folder / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for place, row in enumerate(rows):
        row["patient_or_source_id"], row["dataset"] = f"p{place}", f"hospital {place % 2 + 1}"
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.timeout(900)
def test_every_arm_is_compared_with_plain_clip_seed_by_seed_and_never_trained_twice(
    two_hospitals: Path, tmp_path: Path
) -> None:
    out = tmp_path / "proof"
    settings = ("--data", two_hospitals, "--out", out, "--seeds", 2, "--epochs", 1, "--arms", "clip;mgll")
    done = proof(*settings)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (out / "towers").iterdir()} == {"clip-0", "mgll-0", "clip-1", "mgll-1"}
    table = (out / "proof.md").read_text()
    assert "**all sources" in table
    rows = [line for line in table.splitlines() if line.startswith("| mgll |")]
    assert rows
    assert all("of 2 |" in row for row in rows)
    again = proof(*settings)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(" exists\n") == 5
    assert (out / "proof.md").read_text() == table


def test_an_unknown_arm_is_named(two_hospitals: Path, tmp_path: Path) -> None:
    refused = proof("--data", two_hospitals, "--out", tmp_path / "proof", "--arms", "clip;mgl")
    assert refused.returncode == 2
    assert "did you mean 'mgll'" in refused.stderr
