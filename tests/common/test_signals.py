"""A command ended by a signal removes its temporary files, and its exit code names the signal."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
    import multiprocessing, sys, time
    from pathlib import Path
    from mgll_encoder.common import signals
    from mgll_encoder.common.cli import new_app, run
    from mgll_encoder.common.files import new_file, new_folder

    app = new_app("x")
    out = Path(sys.argv.pop(1))

    @app.command()
    def write() -> None:
        with new_folder(out / "folder") as partial, new_file(out / "file") as file:
            (partial / "half").write_text("half")
            file.write_text("half")
            {action}

    run(app)
"""

WAIT = "print('ready', flush=True); time.sleep(60)"


def as_in_the_foreground() -> None:
    """Shells make background processes ignore these signals; the tests may run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(folder: Path, action: str = WAIT, **more: object) -> subprocess.Popen[str]:
    program = textwrap.dedent(PROGRAM).replace(
        "{action}", textwrap.indent(textwrap.dedent(action), " " * 8).strip()
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, folder],
        stdout=-1,
        stderr=-1,
        text=True,
        **{"preexec_fn": as_in_the_foreground, **more},  # type: ignore[call-overload]
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_command_that_is_told_to_end_clears_away(number: int, code: int, tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (code, "error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_told_twice_it_still_clears_away(tmp_path: Path) -> None:
    """Slurm signals every process, and torchrun signals its own again."""
    slow = """
        try:
            print('ready', flush=True); time.sleep(60)
        finally:
            time.sleep(0.5)
    """
    process = started(tmp_path, slow)
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "step"), [("locks", "_acquire"), ("files", "_new_sibling")])
def test_a_signal_between_making_and_holding_leaves_nothing(tmp_path: Path, module: str, step: str) -> None:
    """A signal may arrive anywhere: here just after the lock or the folder was created, before it is registered."""
    program = textwrap.dedent(PROGRAM).replace("{action}", "pass") + textwrap.dedent(
        f"""
        from mgll_encoder.common import {module}
        made = {module}.{step}
        def interrupted(*given):
            {module}.{step} = made
            made(*given)
            signals.signal.raise_signal(signals.signal.SIGTERM)
        {module}.{step} = interrupted
        run(app)
        """
    )
    program = program.replace("run(app)", "", 1)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (143, "error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_after_the_work_ends_the_process_without_a_traceback(tmp_path: Path) -> None:
    after = "except SystemExit: signals.signal.raise_signal(signals.signal.SIGINT)"
    program = (
        textwrap.dedent(PROGRAM).replace("{action}", "pass").replace("run(app)", f"try: run(app)\n{after}")
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True, text=True, check=False, preexec_fn=as_in_the_foreground,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    process = started(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_an_error_that_the_signal_caused_is_not_told_as_ours(tmp_path: Path) -> None:
    wrapped = """
        try:
            print('ready', flush=True); time.sleep(60)
        except KeyboardInterrupt:
            raise RuntimeError('DataLoader worker exited unexpectedly')
    """
    process = started(tmp_path, wrapped)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (143, "error: interrupted")


def test_a_signal_that_comes_while_something_is_destroyed_is_not_lost(tmp_path: Path) -> None:
    """Python drops exceptions in destructors and fork callbacks."""
    destroyed = """
        class Slow:
            def __del__(self):
                print('ready', flush=True); time.sleep(60)
        Slow()
        time.sleep(60)
    """
    process = started(tmp_path, destroyed)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (143, "error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_workers_end_when_their_pool_does(tmp_path: Path) -> None:
    """A pool ends its workers with SIGTERM; they print no tracebacks."""
    pool = """
        with multiprocessing.get_context('fork').Pool(2) as pool:
            pool.map(abs, [1, 2])
        print('ready', flush=True)
        file.write_text('whole')
    """
    process = started(tmp_path, pool)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")


def test_a_first_signal_can_wait_until_work_is_saved(tmp_path: Path) -> None:
    saving = """
        with signals.deferred():
            print('ready', flush=True)
            while signals.received() is None:
                time.sleep(0.01)
            (out / 'saved').touch()
        raise signals.Terminated
    """
    process = started(tmp_path, saving)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
