"""Outputs that appear complete or not at all: locks, leftovers of killed processes, restored outputs."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgll_encoder.common.errors import OutputTakenError
from mgll_encoder.common.files import new_folder


def killed_in(action: Callable[[], object]) -> None:
    """Run something in a child process that then waits, and kill it."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def write_and_die(out: Path, force: bool = False) -> None:
    with new_folder(out, force) as partial:
        (partial / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with new_folder(out):
            (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    try:
        lock = tmp_path / ".out.lock"
        with pytest.raises(
            OutputTakenError, match=rf"another process is writing {out} \(it holds the lock {lock}\)"
        ):
            new_folder(out).__enter__()
        with new_folder(tmp_path / "other"):
            pass  # its own lock
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_killed_process_leaves_neither_blocks_nor_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # of others
    (tmp_path / ".out2.partial-abcdefgh").mkdir()
    killed_in(lambda: write_and_die(out))
    assert not out.exists()
    assert (tmp_path / ".out.lock").exists()
    with new_folder(out) as partial:
        assert sorted(path.name for path in partial.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.partial",
        ".out2.partial-abcdefgh",
        "out",
    ]


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as partial:
        (partial / "precious").touch()

    def die_between_the_renames() -> None:
        rename = Path.rename

        def once(path: Path, target: Path) -> Path:
            if ".partial-" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = once  # type: ignore[method-assign]
        with new_folder(out, force=True):
            pass

    killed_in(die_between_the_renames)
    assert not out.exists()
    with pytest.raises(OutputTakenError, match="exists"):
        new_folder(out).__enter__()
    assert (out / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_cleared_away_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the cleanup is killed, too, a complete leftover must not keep its config.json without its weights."""
    left = tmp_path / ".out.partial-abcdefgh"
    (left / "text").mkdir(parents=True)
    for written, name in enumerate(("model.safetensors", "text/a.json", "README.md", "config.json")):
        (left / name).write_text(name)
        os.utime(left / name, ns=(written, written))
    unlink, cleared = Path.unlink, []

    def recorded(path: Path, missing_ok: bool = False) -> None:
        cleared.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", recorded)
    with new_folder(tmp_path / "out"):
        assert cleared[:4] == ["config.json", "README.md", "a.json", "model.safetensors"]
    assert not left.exists()
