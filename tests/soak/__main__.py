"""``make soak``: kills, signals, full and read-only disks and two writers over every long command, and a summary.

python -m tests.soak 200                         all commands
python -m tests.soak 40 --commands swap,run      some
python -m tests.soak 200 --typed 0.1             a tenth of them started as a user does it, not forked

After each disturbance the same command must be done, with the result of an undisturbed one, and leave nothing else.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.soak.commands import BY_NAME, COMMANDS, Command, make_inputs
from tests.soak.server import Server
from tests.soak.trial import ANYWHERE, AS_ROOT, Fault, Result, Trials, may_mount

console = Console(stderr=True)


def main() -> int:
    """Run what was asked for; 1 where something is wrong."""
    options = _options()
    names = [name for name in options.commands.split(",") if name]
    if unknown := set(names) - {command.name for command in COMMANDS}:
        sys.exit(
            f"no command is called {', '.join(unknown)}: known are {', '.join(c.name for c in COMMANDS)}"
        )
    commands = [BY_NAME[name] for name in names] or list(COMMANDS)
    server = Server()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        try:
            trials = ready(server, Path(scratch), commands)
            found = _soak(trials, commands, options)
        finally:
            server.close()
    Console(width=180).print(_summary(found))
    return any(result.faults for _, _, result in found)


def ready(server: Server, scratch: Path, commands: list[Command]) -> Trials:
    """Trials with their inputs, and with the results of undisturbed commands."""
    inputs = scratch / "inputs"
    inputs.mkdir()
    trials = Trials(server, make_inputs(inputs), scratch)
    for command in commands:
        for needed in command.needs:
            trials.reference(BY_NAME[needed])
        trials.reference(command)
    return trials


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "number", type=int, nargs="?", default=200, help="trials, shared out among the commands"
    )
    parser.add_argument("--commands", default="", help="names separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--typed", type=float, default=0.05, help="share of commands started as a user does it"
    )
    return parser.parse_args()


def _soak(
    trials: Trials, commands: list[Command], options: argparse.Namespace
) -> list[tuple[Command, Fault, Result]]:
    faults = AS_ROOT if may_mount(trials.scratch / "mountable") else ANYWHERE
    draw, found, began = random.Random(options.seed), [], time.monotonic()
    pairs = [(command, fault) for fault in faults for command in commands]
    for number, (command, fault) in enumerate(
        itertools.islice(itertools.cycle(pairs), options.number), start=1
    ):
        result = trials.run(command, fault, draw, typed=draw.random() < options.typed)
        found.append((command, fault, result))
        minutes = (time.monotonic() - began) / 60
        console.print(
            f"{number}/{options.number} {minutes:.1f} min: {command.name}, {fault.name}: {result.codes}"
        )
        for wrong in result.faults:
            console.print(f"   {wrong}", style="red", markup=False)
    return found


def _summary(found: list[tuple[Command, Fault, Result]]) -> Table:
    by_command: dict[str, list[tuple[Fault, Result]]] = defaultdict(list)
    for command, fault, result in found:
        by_command[command.name].append((fault, result))
    names = list(dict.fromkeys(fault.name for _, fault, _ in found))
    table = Table(title="Disturbances that came before the command was done, and what was wrong afterwards")
    for heading in ("command", "trials", *names, "exit codes", "wrong"):
        table.add_column(heading, justify="left" if heading in ("command", "exit codes") else "right")
    for name, results in by_command.items():
        hits = Counter(fault.name for fault, result in results if result.hit)
        codes = Counter(code for _, result in results for code in result.codes)
        said = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items(), key=str))
        wrong = sum(bool(result.faults) for _, result in results)
        table.add_row(name, str(len(results)), *(str(hits[n]) for n in names), said, str(wrong))
    wrong = sum(bool(result.faults) for _, _, result in found)
    table.add_section()
    totals = Counter(fault.name for _, fault, result in found if result.hit)
    table.add_row("all", str(len(found)), *(str(totals[n]) for n in names), "", str(wrong))
    return table


if __name__ == "__main__":
    sys.exit(main())
