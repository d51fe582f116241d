"""Hypothesis searches each reader: it draws the file, the command and the damages, and makes what it finds smaller."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.harness import Case, Outcome, Verdict, Worker
from tests.fuzz.readers import READERS, Reader, command_for

MOST_EDITS = 3
"""Damages of one input; more are refused at the first."""


class FoundError(Exception):
    """A finding that has not been seen before: tells Hypothesis to make it smaller."""


@dataclass
class Summary:
    """What became of a reader's inputs.

    Attributes:
        inputs: How many were run, those that make a finding smaller among them.
        drawn: How many were drawn.
        verdicts: Count by kind.
        slowest: Seconds of the slowest.
        findings: What was found, to the folder that shows it.
        seconds: All of it.
    """

    inputs: int = 0
    drawn: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    findings: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, outcome: Outcome, verdict: Verdict, drawn: bool) -> None:
        """Take an input in."""
        self.inputs += 1
        self.drawn += drawn
        self.verdicts[verdict.kind] += 1
        self.slowest = max(self.slowest, outcome.seconds)


def cases(reader: Reader, valid: Path) -> st.SearchStrategy[Case]:
    """Inputs of a reader."""
    files = reader.files(valid)
    return st.builds(
        lambda file, other, command, edits: Case(file, other, command_for(command, file), tuple(edits)),
        st.sampled_from(files),
        st.sampled_from(files),
        st.sampled_from(reader.commands),
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=MOST_EDITS),
    )


def search(
    worker: Worker, number: int, chance: int, save: Path | None, tell: Callable[[str], None] = lambda _: None
) -> Summary:
    """Put so many inputs to a reader.

    Args:
        worker: Runs them.
        number: How many are drawn; those that make a finding smaller come on top.
        chance: Seed of the search.
        save: Folder that gets one folder per finding; None to keep none.
        tell: Called with each new finding.
    """
    summary = Summary()
    began = time.monotonic()
    while (left := number - summary.drawn) > 0:
        found = _until_found(worker, left, chance + summary.drawn, summary, save)
        if found is None:
            break
        tell(f"{worker.reader.name}: {found} ({summary.findings[found]})")
    summary.seconds = time.monotonic() - began
    return summary


def _until_found(worker: Worker, number: int, chance: int, summary: Summary, save: Path | None) -> str | None:
    """Draw inputs up to a finding of a new kind, make that one smaller and keep it; None where there is none."""
    known = {signature(what) for what in summary.findings}
    first: list[str] = []  # what was found, in the smallest input so far

    @seed(chance)
    @settings(
        max_examples=number, database=None, deadline=None, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(worker.reader, worker.valid))
    def one(case: Case) -> None:
        outcome, verdict = worker.run(case)
        summary.count(outcome, verdict, drawn=not first)
        if verdict.kind != "finding" or signature(verdict.what) in known:
            return
        if not first or signature(verdict.what) == signature(first[0]):
            first[:] = [verdict.what]
            if save:
                _keep(worker, case, verdict, save / "last")
            raise FoundError(verdict.what)

    try:
        one()
    except FoundError:
        summary.findings[first[0]] = _move(save / "last", save, worker.reader.name) if save else Path()
        return first[0]
    return None


def check_valid(worker: Worker) -> None:
    """Make sure that what is about to be damaged is read.

    Raises:
        RuntimeError: a command of the reader does not read its valid input.
    """
    for file in worker.reader.files(worker.valid):
        for command in {command_for(command, file) for command in worker.reader.commands}:
            outcome, verdict = worker.run(Case(file, file, command, ()))
            if outcome.code not in worker.reader.valid or verdict.kind == "finding":
                raise RuntimeError(f"{worker.reader.name}: `{command}` gives {verdict}: {outcome.err[-500:]}")


def signature(what: str) -> str:
    """What tells findings apart: all but the values in the message."""
    head = ": ".join(what.split(": ")[:2])
    return re.sub(r"\d{3,}|'[^']*'", "N", head)


def _keep(worker: Worker, case: Case, verdict: Verdict, folder: Path) -> None:
    """Save the damaged file with the command that reads it."""
    shutil.rmtree(folder, ignore_errors=True)
    target = folder / case.file
    target.parent.mkdir(parents=True)
    shutil.copyfile(worker.scratch / "work" / case.file, target)
    about = {"reader": worker.reader.name, "command": case.command, "found": verdict.what}
    (folder / "case.json").write_text(json.dumps(about, indent=2) + "\n")


def _move(folder: Path, save: Path, name: str) -> Path:
    """Give a saved input its number."""
    number = 0
    while (place := save / f"{name}_{number}").exists():
        number += 1
    return folder.rename(place)


def replay(worker: Worker, damaged: Path) -> list[tuple[str, Outcome, Verdict]]:
    """Run a saved input again: with the command it names, or with all of its reader."""
    about = damaged / "case.json"
    if about.is_file():
        lines: Sequence[str] = [json.loads(about.read_text())["command"]]
    else:
        file = sorted(p.relative_to(damaged).as_posix() for p in damaged.rglob("*") if p.is_file())[0]
        lines = [command_for(command, file) for command in worker.reader.commands]
    return [(line, *worker.replay(damaged, line)) for line in lines]


def reader_of(damaged: Path) -> Reader:
    """The reader that a saved input belongs to: its folder is called NAME_NUMBER.

    Raises:
        KeyError: there is none of this name.
    """
    name = re.sub(r"_\d+$", "", damaged.name)
    return {reader.name: reader for reader in READERS}[name]
