"""Measure the startup time of commands that need no model, relative to ``python -c "import torch"``."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from timing import seconds_of

from mgll_encoder.common import cli
from mgll_encoder.common.progress import track
from mgll_encoder.common.terminal_table import TerminalTable

app = cli.new_app("Measure the startup time of commands that need no model.")

LIMIT = 0.3
"""A command should answer within this fraction of the time for importing torch."""

MISTAKES: Mapping[str, str] = {
    "mgll-encoder": "inspect nope",
    "swap-encoder": "--mllm nope --encoder nope",
    "retrain-projector": "--model nope --data nope",
    "finetune-lora": "--model nope --data nope",
    "eval-mcq": "run --model nope --bench nope",
    "mgll": "eval run --model nope --bench nope",
}
"""Command -> arguments with a path that does not exist."""


def fastest(command: Sequence[str | Path], repeats: int) -> float:
    """Return the seconds of the fastest of several runs: other load on the machine only adds time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = partial(subprocess.run, command, capture_output=True, check=False, env=environment)
    return min(seconds_of(run) for _ in range(repeats))


@app.command()
def startup(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each command; the fastest counts.")] = 5,
) -> None:
    """Measure the startup time of commands that need no model.

    Example: python scripts/bench/startup.py --repeats 5
    """
    torch = fastest([sys.executable, "-c", "import torch"], repeats)
    scripts = Path(sys.executable).parent
    table = TerminalTable().add_words("command")
    table.add_figures("--help", "--version", "wrong path", "wrong option")
    worst = 0.0
    for name, mistake in track(MISTAKES.items(), "measuring"):
        asked = ("--help", "--version", mistake, "--nope")
        ratios = [fastest([scripts / name, *arguments.split()], repeats) / torch for arguments in asked]
        table.add_row(name, *(f"{ratio:.2f}" for ratio in ratios))
        worst = max(worst, *ratios)
    cli.stdout.print(table)
    cli.stdout.print(
        f'Times relative to python -c "import torch" ({torch:.2f} s); worst {worst:.2f}, limit {LIMIT}'
    )


if __name__ == "__main__":
    cli.run(app)
