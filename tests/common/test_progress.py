"""The library prints nothing: messages are log records, and progress is shown only on request."""

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from mgll_encoder.common import progress
from mgll_encoder.common.progress import Pace, counter, counting, show_with, track
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

    counts: dict[str, list[int]] = {}

    @contextmanager
    def counting_up(description: str, total: int) -> Iterator[Callable[[int], None]]:
        counts[description] = [total]
        yield counts[description].append

    show_with(noting, counting_up)
    try:
        align(plan_swap(tiny_llava, a_tower(tmp_path / "mgll")), tmp_path / "images", device="cpu")
    finally:
        show_with(None)
    assert "Hashing images" in seen
    total, *advanced = counts["Encoding images"]
    assert (total, sum(advanced)) == (12, 12), "images are counted, not batches"
    assert "error" not in capfd.readouterr().err
    assert list(track([1, 2], "counting")) == [1, 2]


def test_bars_of_other_libraries_follow_the_program(capfd: pytest.CaptureFixture[str]) -> None:
    """The Trainer's and datasets' bars are shown where ours are, whether or not stderr is a terminal."""
    counted: list[int] = []

    @contextmanager
    def noting(description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield counted.append

    assert counter() is None
    with counting("Answering", 5) as advance:
        advance(2)
    show_with(None, noting)
    try:
        assert counter() is noting
        with counting("Answering", 5) as advance:
            advance(3)
    finally:
        show_with(None)
    assert counted == [3]
    assert capfd.readouterr() == ("", "")


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_long_work_tells_now_and_then_what_is_left() -> None:
    clock, lines = Clock(), []
    pace = Pace("training", 450, unit="steps", say=lines.append, clock=clock)
    for _ in range(450):
        clock.now += 2.0
        pace.advance(about="loss 0.5000")
    assert lines[0] == "training (450 steps) ..."
    assert lines[1] == "training: 15 of 450 steps, loss 0.5000, 14 min left"
    assert lines[2] == "training: 30 of 450 steps, loss 0.5000, 14 min left"
    assert lines[-1].endswith("s left")
    assert 20 <= len(lines) <= 30, "a quarter of an hour"


def test_a_day_of_work_is_no_flood_of_lines_and_short_work_none() -> None:
    clock, lines = Clock(), []
    pace = Pace("reading", say=lines.append, clock=clock)
    for _ in range(24 * 3600):
        clock.now += 1.0
        pace.advance(1_000)
    assert 150 <= len(lines) <= 300
    assert lines[-1].startswith("reading: 86,")
    assert re.search(r"000 so far, 2[34] h \d+ min$", lines[-1])
    short: list[str] = []
    pace = Pace("reading", 29, say=short.append, clock=clock)
    for _ in range(29):
        clock.now += 1.0
        pace.advance()
    assert short == ["reading (29) ..."]


def test_a_list_whose_length_is_known_is_told_in_log_records(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SHORTEST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    assert list(track("abc", "reading")) == ["a", "b", "c"]
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "reading (3) ..."
    assert told[1].startswith("reading: 1 of 3, ")
    assert len(told) == 3, "the last item needs no line"


def test_bytes_are_told_in_their_units_and_have_a_bar_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[int] = []
    with counting("writing", 2_500_000, in_bytes=True) as advance:
        advance(2_500_000)
    assert [record.getMessage() for record in caplog.records] == ["writing (2.5 MB) ..."]
    show_with(None, byte_counter=lambda description, total: nullcontext(counted.append))
    try:
        with counting("writing", 5, in_bytes=True) as advance:
            advance(3)
        with counting("Answering", 5) as advance:
            advance(4)
    finally:
        show_with(None)
    assert counted == [3]


def test_lines_of_progress_and_of_what_is_next_begin_alike() -> None:
    """A cold reader met "Checking images" and "checking images", "Next:" and "next:"."""
    root, found = Path(__file__).parents[2], []
    for package in ("mgll_encoder", "mllm_adapters", "eval_mcq"):
        for file in set((root / package).rglob("*.py")) - {Path(progress.__file__)}:
            for node in ast.walk(ast.parse(text := file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                    "track",
                    "counting",
                    "Pace",
                ):
                    words = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                    found.append(next((word for word in words if isinstance(word, str)), "Given"))
            assert not re.search(r"[\"']next: ", text), file
    assert len(found) > 20
    assert [words for words in found if not words[:1].isupper()] == []


def test_no_library_module_uses_the_terminal() -> None:
    root = Path(__file__).parents[2]
    using = [
        file.relative_to(root).as_posix()
        for package in ("mgll_encoder", "mllm_adapters", "eval_mcq")
        for file in (root / package).rglob("*.py")
        if "cli" not in file.relative_to(root).parts and "common.cli" in file.read_text("utf-8")
    ]
    assert using == []
