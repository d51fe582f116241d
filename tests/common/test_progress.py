"""A library prints nothing: what it tells are log records, and progress is shown by whoever wants it."""

from pathlib import Path

import pytest

from mgll_encoder.common.progress import show_with, track
from mgll_encoder.common.tables import read_table
from mllm_adapters import align, plan_swap
from tests.builders import picture
from tests.mllm_adapters.llava_checkpoints import a_tower


def test_a_python_user_sees_nothing_and_may_listen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "labels.csv").write_text("file;labels\na.png;DR\n")
    read_table(tmp_path / "labels.csv", "--labels")
    assert capfd.readouterr() == ("", "")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mgll_encoder.common.tables", "INFO")


def test_progress_is_shown_with_what_one_gives(
    tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        picture(tmp_path / "images", f"{number}.png", (20 * number, 90, 200 - 20 * number))
    seen: list[str] = []

    def noting(items, description, total=None):
        seen.append(description)
        return items

    show_with(noting)
    try:
        align(plan_swap(tiny_llava, a_tower(tmp_path / "mgll")), tmp_path / "images", device="cpu")
    finally:
        show_with(None)
    assert "Noting the images" in seen
    assert "error" not in capfd.readouterr().err
    assert list(track([1, 2], "counting")) == [1, 2]
