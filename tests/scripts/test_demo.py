"""`make demo` at sizes that teach nothing: every command of the way from pictures to the table runs."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress, TaskID

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from demo import FULL, MODELS, QUICK, the_reports, until_the_answers  # noqa: E402
from stages import Stage, Stages  # noqa: E402

from mgll_encoder.common.errors import TrainingError  # noqa: E402


def demo(out: Path) -> str:
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--out", str(out), "--quick"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200).stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_ends_in_a_table_and_says_that_it_is_a_phantom(tmp_path: Path) -> None:
    printed = demo(tmp_path / "demo")
    for command in ("mgll-encoder pretrain", "swap-encoder --mllm", "retrain-projector", "eval-mcq run"):
        assert f"$ {command}" in printed
    assert "This is a phantom" in printed
    assert re.search(r"mgll against control: [+-]?\d+\.\d \[", printed)
    first, *lines = printed.splitlines()
    assert first == f"18 stages, two at a time; logs in {tmp_path / 'demo' / 'logs'}"
    assert {f"stage {number} of 18" for number in range(1, 19)} == {
        line.partition(",")[0] for line in lines if line.startswith("stage ")
    }
    assert {line.split()[0] for line in lines if line.strip()} >= {"base", "control", "mgll", "aligned"}
    for log in (tmp_path / "demo" / "logs").iterdir():
        assert "\x1b" not in log.read_text(), log
    assert printed.rstrip().splitlines()[-4].startswith("With your own files")
    table = (tmp_path / "demo" / "table.md").read_text()
    for word in ("base", "control", "mgll", "aligned", "Glaucoma", "Average"):
        assert word in table
    assert "mgll against control" in (tmp_path / "demo" / "report.html").read_text()
    again = demo(tmp_path / "demo")
    assert "$ mgll-encoder pretrain" not in again, "finished stages are kept"
    assert again.startswith("All 18 stages were done before")
    assert "Glaucoma" in again


def test_all_arms_come_from_the_same_base_and_both_retrainings_are_alike() -> None:
    stages = until_the_answers(Path("demo"), FULL)
    assert len({stage.output for stage in stages}) == len({stage.title for stage in stages}) == len(stages)
    control, mgll = (
        next(stage for stage in stages if stage.output.name == f"{model}-retrained")
        for model in ("base", "mgll")
    )
    assert [str(word).replace("models/mgll", "models/base") for word in mgll.command] == [
        str(word) for word in control.command
    ]
    swaps = [stage for stage in stages if stage.command[0] == "swap-encoder"]
    assert {str(stage.command[2]) for stage in swaps} == {"demo/models/base"}
    assert {stage.output.name for stage in stages} >= set(MODELS.values())
    assert [stage.title for stage in until_the_answers(Path("demo"), QUICK)] == [
        stage.title for stage in stages
    ]


def python(title: str, output: Path, code: str, *reads: Path) -> Stage:
    script = output.with_name(f"{title}.py")
    script.write_text(code)
    return Stage(title, output, [str(script), *map(str, reads)])


def test_a_stage_waits_for_what_it_reads_and_is_not_run_twice(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    copy = "import sys; from pathlib import Path; Path(sys.argv[-1]).write_text(Path(sys.argv[1]).read_text() + 'x')"
    slow = f"import time; time.sleep(1); open(r'{first}', 'w').write('x')"
    stages = [
        python("third", third, copy, second, third),
        python("second", second, copy, first, second),
        python("first", first, slow),
    ]
    runner = Stages(tmp_path / "logs")
    runner.run(stages)
    assert third.read_text() == "xxx"
    assert list(runner.seconds) == ["first", "second", "third"]
    assert runner.seconds["first"] >= 1
    third.unlink()
    again = Stages(tmp_path / "logs")
    again.run(stages)
    assert list(again.seconds) == ["third"]


def test_two_stages_run_at_the_same_time_and_their_logs_are_plain(tmp_path: Path) -> None:
    meet = (
        "import sys, time; from pathlib import Path; mine, other = map(Path, sys.argv[1:3])\n"
        "from mgll_encoder.common import cli\n"
        "print(' 3/7 ', file=sys.stderr, flush=True); assert not (sys.stderr.isatty() or cli.stderr.is_terminal)\n"
        "cli.stdout.print('bold', style='bold red')\n"
        "mine.write_text(''); end = time.time() + 60\n"
        "while not other.exists(): assert time.time() < end; time.sleep(0.01)\n"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    # each names the other's marker, not its output: neither waits for the other
    stages = [
        python("one", tmp_path / "never-1", meet, a, b),
        python("two", tmp_path / "never-2", meet, b, a),
    ]
    Stages(tmp_path / "logs").run(stages)
    assert sorted((tmp_path / "logs" / "one.txt").read_text().split()) == ["3/7", "bold"]


def test_the_bar_of_a_stage_counts_as_its_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    class Watched(Progress):
        def update(self, task_id: TaskID, **fields: Any) -> None:
            counted.append((self.tasks[task_id].description, fields["completed"], fields["total"]))
            super().update(task_id, **fields)

    monkeypatch.setattr("stages.Progress", Watched)
    says = "print('Training (1,200 steps) ...\\nTraining: 250 of 1,200 steps, loss 0.5, 9 s left')"
    Stages(tmp_path / "logs").run([python("first", tmp_path / "first", says)])
    assert counted == [("first", 250, 1200)]


def test_a_viewer_of_a_pipe_sees_how_much_there_is_and_that_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.HEARTBEAT", 0.2)
    slow = f"import time; time.sleep(1); open(r'{tmp_path / 'first'}', 'w').close()"
    stages = [python("first", tmp_path / "first", slow), python("second", tmp_path, "", tmp_path / "first")]
    Stages(tmp_path / "logs").run(stages)
    printed = capfd.readouterr().out
    assert printed.startswith(
        f"2 stages, 1 of them done before, two at a time; logs in {tmp_path / 'logs'}\n"
    )
    assert re.search(r"stage 1 of 2, first:\n\$ python \S+/first\.py\n", printed)
    assert re.search(r"^running: first \(\d s\)$", printed, re.MULTILINE)
    Stages(tmp_path / "logs").run(stages)
    assert capfd.readouterr().out == "All 2 stages were done before: nothing is run; --fresh starts over.\n"


def test_a_script_is_printed_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS.parent)
    (shown,) = [one.shown for one in until_the_answers(Path("demo"), FULL) if ".py" in one.shown]
    assert shown.startswith("python scripts/build_smol_llava.py --tower demo/towers/general ")


def test_the_reports_wait_for_the_answers() -> None:
    arms = [f"{arm}=demo/runs/{arm}" for arm in MODELS]
    answers = [one for one in until_the_answers(Path("demo"), FULL) if one.title.startswith("Answers")]
    for report in the_reports(Path("demo"), arms):
        assert all(report.needs(one) for one in answers)
    assert not any(one.needs(other) for one in answers for other in answers)


def test_a_stage_that_fails_shows_the_end_of_its_log_and_stops_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = "import sys; print('line\\n' * 40); sys.exit('error: the disk is full')"
    stages = [
        python("bad", tmp_path / "bad", bad),
        python("after", tmp_path / "after", "raise SystemExit('not to be run')", tmp_path / "bad"),
    ]
    with pytest.raises(
        TrainingError, match=r"bad\.py failed \(.*bad\.txt\): follow its message, then run this again"
    ):
        Stages(tmp_path / "logs").run(stages)
    shown = capfd.readouterr().err
    assert "error: the disk is full" in shown
    assert shown.count("line") < 20
    assert not (tmp_path / "logs" / "after.txt").exists()


def test_a_demo_that_is_ended_does_not_wait_for_its_stage(tmp_path: Path) -> None:
    """Slurm and container engines send SIGTERM to the first process alone."""
    began, slow = tmp_path / "began", tmp_path / "slow.py"
    slow.write_text(f"import time; open({str(began)!r}, 'w').close(); time.sleep(600)")
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from pathlib import Path\nfrom stages import Stage, Stages\nfrom mgll_encoder.common import cli\n"
        "app = cli.new_app('x')\n@app.command()\ndef go() -> None:\n"
        f"    stage = Stage('slow', Path({str(tmp_path / 'never')!r}), [{str(slow)!r}])\n"
        f"    Stages(Path({str(tmp_path / 'logs')!r})).run([stage])\n"
        "if __name__ == '__main__': cli.run(app)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 200
        while not began.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait(100) == 143
    finally:
        process.kill()


def test_a_command_still_finds_the_gpu_after_the_libraries_were_imported_for_all(tmp_path: Path) -> None:
    """A process that is forked after the driver was asked for anything cannot use the GPU."""
    asked = tmp_path / "asked"
    code = f"""
import pathlib, sys, torch
def recorded(event, arguments):
    if event == "ctypes.dlopen" and "cuda.so" in str(arguments): note("dlopen")
def note(name): pathlib.Path({str(asked)!r}).open("a").write(name + "\\n")
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name): setattr(torch._C, name, lambda *_, name=name: note(name) or 0)
sys.addaudithook(recorded)
sys.path.insert(0, {str(SCRIPTS)!r})
import importlib
from forked import LIBRARIES
for library in LIBRARIES: importlib.import_module(library)
note("imported")
torch.cuda.is_available()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    first, *after = asked.read_text().split()
    assert first == "imported", "an import asked the GPU driver"
    assert after or not hasattr(__import__("torch")._C, "_cuda_getDeviceCount"), "the recorder records"
