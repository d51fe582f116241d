"""Stages of a demonstration: commands of this project, several at a time, each with a bar, a log and its time."""

import os
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from steps import program

from mgll_encoder.common import cli
from mgll_encoder.common.errors import TrainingError

COUNTED = re.compile(rb"(?<![\d/])(\d+)/([1-9]\d*)(?![:/\d])")
"""How the bars of the commands count, such as ``12/126``."""

AT_ONCE = 2
"""Number of commands that run at the same time."""

TAIL = 15
"""Number of lines of a log that are shown when its command has failed."""


@dataclass(frozen=True)
class Stage:
    """A command with an output.

    Attributes:
        title: What it does, for its bar.
        output: File or folder that it writes; if that exists, the stage is done.
        command: A console command of this project or a script of this folder, with its arguments.
    """

    title: str
    output: Path
    command: Sequence[str | Path]

    @property
    def shown(self) -> str:
        """The command as one types it."""
        return shlex.join(map(str, self.command))

    def needs(self, other: "Stage") -> bool:
        """Whether the command reads what another stage writes: a path below its output."""
        named = [word.rpartition("=")[2] for word in map(str, self.command)]
        return other is not self and any(Path(word).is_relative_to(other.output) for word in named)


class Stages:
    """Runs stages and remembers how long they took.

    Args:
        logs: Folder for what the commands print.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()
        logs.mkdir(parents=True, exist_ok=True)

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def run(self, stages: Sequence[Stage]) -> None:
        """Run all stages that are not done, each as soon as what its command reads has been written.

        Raises:
            UserError: a command failed; the end of its log is shown.
        """
        waiting = [stage for stage in stages if not stage.output.exists()]
        finished: queue.Queue[_Command] = queue.Queue()
        running: list[_Command] = []
        failed: list[_Command] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=cli.stderr, transient=True) as bars:
            whole = bars.add_task("all stages", total=len(waiting))
            while running or (waiting and not failed):
                unwritten = [*waiting, *(command.stage for command in running)]
                ready = [stage for stage in waiting if not any(map(stage.needs, unwritten))]
                for stage in ready[: AT_ONCE - len(running)] if not failed else ():
                    cli.say(f"$ {stage.shown}")
                    waiting.remove(stage)
                    running.append(_Command(stage, self, bars, finished))
                done = finished.get()
                running.remove(done)
                bars.advance(whole)
                self.seconds[done.stage.title] = done.seconds
                cli.stdout.print(f"{done.stage.title}: {done.seconds:.0f} s", style="bold", highlight=False)
                failed += [done] if done.process.returncode else []
        for command in failed:
            _show_end(command.log)
            raise TrainingError(
                f"{command.stage.command[0]} failed ({command.log}): follow its message, then run this again; "
                "finished stages are kept"
            )


class _Command:
    """A stage in a process of its own, with its bar."""

    def __init__(
        self, stage: Stage, stages: Stages, bars: Progress, finished: "queue.Queue[_Command]"
    ) -> None:
        self.stage, self.bars, self.finished = stage, bars, finished
        self.log = stages.logs / f"{re.sub(r'[^a-z0-9]+', '-', stage.title.lower()).strip('-')}.txt"
        self.bar = bars.add_task(stage.title, total=None)
        self.began, self.seconds = time.monotonic(), 0.0
        threads = max(1, len(os.sched_getaffinity(0)) // AT_ONCE)
        # The commands draw bars on terminals only, so each gets one for its standard error.
        self.reading, writing = os.openpty()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                program(*map(str, stage.command)),
                stdout=log,
                stderr=writing,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "TERM": "xterm", "COLUMNS": "200"},
            )
        os.close(writing)
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        with self.log.open("ab") as log:
            while part := _read(self.reading):
                log.write(part)
                if found := COUNTED.findall(part):
                    self.bars.update(self.bar, completed=int(found[-1][0]), total=int(found[-1][1]))
        os.close(self.reading)
        self.process.wait()
        self.seconds = time.monotonic() - self.began
        self.bars.remove_task(self.bar)
        self.finished.put(self)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # what Linux gives when the process at the other end has ended
        return b""


def _show_end(log: Path) -> None:
    text = log.read_text(errors="replace").replace("\r\n", "\n")
    for line in text.splitlines()[-TAIL:]:
        cli.stderr.print(line.rpartition("\r")[2], soft_wrap=True, markup=False, highlight=False)
