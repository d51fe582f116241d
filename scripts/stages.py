"""Stages of a demonstration: commands of this project, several at a time, each with a bar, a log and its time."""

import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from forked import start
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from steps import typed

from mgll_encoder.common import cli
from mgll_encoder.common.errors import TrainingError

AT_ONCE = 2
"""Number of commands that run at the same time."""

TAIL = 15
"""Number of lines of a log that are shown when its command has failed."""

COUNTED = re.compile(rb": ([\d,]+) of ([\d,]+)")
"""How a command's lines count, such as ``Training: 250 of 1,200 steps``."""

HEARTBEAT = 30.0
"""Longest time without a line, in seconds."""


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
        return typed(self.command)

    def needs(self, other: "Stage") -> bool:
        """Whether the command reads what another stage writes: a path below its output, or a folder around it."""
        values = (word.rpartition("=")[2] for word in map(str, self.command))
        named = [Path(value) for value in values if value]
        related = (path.is_relative_to(other.output) or other.output.is_relative_to(path) for path in named)
        return other is not self and any(related)


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
        if not waiting:
            cli.say(f"All {len(stages)} stages were done before: nothing is run; --fresh starts over.")
            return
        before = len(stages) - len(waiting)
        done_before = f", {before} of them done before" if before else ""
        cli.say(f"{len(stages)} stages{done_before}, two at a time; logs in {self.logs}")
        finished: queue.Queue[_Command] = queue.Queue()
        running: list[_Command] = []
        failed: list[_Command] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=cli.stderr, transient=True) as bars, _ended(running):
            whole = bars.add_task("all stages", total=len(waiting))
            while running or (waiting and not failed):
                unwritten = [*waiting, *(command.stage for command in running)]
                ready = [stage for stage in waiting if not any(map(stage.needs, unwritten))]
                for stage in ready[: AT_ONCE - len(running)] if not failed else ():
                    cli.say(
                        f"stage {stages.index(stage) + 1} of {len(stages)}, {stage.title}:\n$ {stage.shown}"
                    )
                    waiting.remove(stage)
                    running.append(_Command(stage, self, bars, finished))
                done = _next(finished, running)
                running.remove(done)
                bars.advance(whole)
                self.seconds[done.stage.title] = done.seconds
                cli.stdout.print(f"{done.stage.title}: {done.seconds:.0f} s", style="bold", highlight=False)
                failed += [done] if done.process.exitcode else []
        for command in failed:
            _show_end(command.log)
            raise TrainingError(
                f"{command.stage.command[0]} failed ({command.log}): follow its message, then run this again; "
                "finished stages are kept"
            )


class _Command:
    """A stage in a process of its own, with its bar. As it prints to no terminal, it counts in lines."""

    def __init__(
        self, stage: Stage, stages: Stages, bars: Progress, finished: "queue.Queue[_Command]"
    ) -> None:
        self.stage, self.bars, self.finished = stage, bars, finished
        self.log = stages.logs / f"{re.sub(r'[^a-z0-9]+', '-', stage.title.lower()).strip('-')}.txt"
        self.bar = bars.add_task(stage.title, total=None)
        self.began, self.seconds = time.monotonic(), 0.0
        threads = max(1, len(os.sched_getaffinity(0)) // AT_ONCE)
        plain = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
        # Unbuffered, lines come when they are printed, and those of both streams in their order.
        at_once = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}
        self.process, printed = start([*map(str, stage.command)], {**_environment(), **plain, **at_once})
        threading.Thread(target=self._follow, args=(printed,), daemon=True).start()

    def _follow(self, printed: IO[bytes]) -> None:
        with self.log.open("wb", buffering=0) as log:
            for line in printed:
                log.write(line)
                if found := COUNTED.search(line):
                    done, total = (int(number.replace(b",", b"")) for number in found.groups())
                    self.bars.update(self.bar, completed=done, total=total)
        self.process.join()
        self.seconds = time.monotonic() - self.began
        self.bars.remove_task(self.bar)
        self.finished.put(self)


@contextmanager
def _ended(running: Sequence[_Command]) -> Iterator[None]:
    """End the commands that still run after the block: it was interrupted, and Python would wait for them."""
    try:
        yield
    finally:
        for command in running:
            command.process.terminate()


def _environment() -> dict[str, str]:
    """Return the environment without what makes Rich draw colors and bars into a file."""
    forcing = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {name: value for name, value in os.environ.items() if name not in forcing}


def _next(finished: "queue.Queue[_Command]", running: Sequence[_Command]) -> _Command:
    """Return the next command that ends; until then say now and then what is running."""
    while True:
        try:
            return finished.get(timeout=HEARTBEAT)
        except queue.Empty:
            now = time.monotonic()
            cli.say(
                "running: " + ", ".join(f"{one.stage.title} ({now - one.began:.0f} s)" for one in running)
            )


def _show_end(log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines()[-TAIL:]:
        cli.stderr.print(line, soft_wrap=True, markup=False, highlight=False)
