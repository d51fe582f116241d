"""The library prints nothing: messages are log records, and progress is shown only on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eval_mcq.runs.progress import rate
from mgll_encoder.common.progress import counter, show_with, track
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


def test_bars_of_other_libraries_follow_the_program(capfd: pytest.CaptureFixture[str]) -> None:
    """The Trainer's and datasets' bars are shown where ours are, whether or not stderr is a terminal."""
    counted: list[int] = []

    @contextmanager
    def counting(description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield counted.append

    assert counter() is None
    with rate("Answering", 5) as advance:
        advance(2)
    show_with(None, counting)
    try:
        assert counter() is counting
        with rate("Answering", 5) as advance:
            advance(3)
    finally:
        show_with(None)
    assert counted == [3]
    assert capfd.readouterr() == ("", "")


def test_no_library_module_uses_the_terminal() -> None:
    root = Path(__file__).parents[2]
    using = [
        file.relative_to(root).as_posix()
        for package in ("mgll_encoder", "mllm_adapters", "eval_mcq")
        for file in (root / package).rglob("*.py")
        if "cli" not in file.relative_to(root).parts and "common.cli" in file.read_text("utf-8")
    ]
    assert using == []
