"""Steps of a long experiment: commands of this project in order, printed, and skipped when their output exists."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mgll_encoder.common import cli
from mgll_encoder.common.errors import TrainingError


def program(command: str, *arguments: str) -> list[str]:
    """Return what runs a console command of this project or a script of this folder, with this interpreter."""
    if command.endswith(".py"):
        return [sys.executable, str(Path(__file__).parent / command), *arguments]
    return [str(Path(sys.executable).with_name(command)), *arguments]


def typed(words: Sequence[str | Path]) -> str:
    """Return a command as one types it in the working folder."""
    first, *rest = map(str, words)
    script = ["python", os.path.relpath(Path(__file__).parent / first)] if first.endswith(".py") else [first]
    return shlex.join([*script, *rest])


class Steps:
    """Runs commands in order, prints them, and skips finished ones.

    Args:
        out: Output folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def step(self, title: str, output: str, command: str, *arguments: str | Path) -> Path:
        """Run a command that writes ``output`` (a path below the output folder), unless it exists.

        Raises:
            UserError: the command failed; its own message was printed before.
        """
        target = self.out / output
        if target.exists():
            cli.note(f"{title}: {target} exists")
            return target
        words = [command, *map(str, arguments)]
        cli.stdout.rule(f"{title} ({time.monotonic() - self.began:.0f} s)", align="left")
        cli.stdout.print(f"$ {typed(words)}", style="bold", soft_wrap=True, markup=False)
        self.run(*words)
        return target

    def run(self, command: str, *arguments: str) -> None:
        """Run a console command of this project, or one of its scripts.

        Raises:
            UserError: it failed.
        """
        if subprocess.run(program(command, *arguments), check=False).returncode:
            raise TrainingError(
                f"{command} failed: fix the error above and run this again; finished steps are kept"
            )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.began
