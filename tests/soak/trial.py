"""One disturbance of one command, and what must be true afterwards."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.soak.commands import Command
from tests.soak.server import Job, Server, Typed

PATIENCE = 30.0
"""Seconds that a disturbed command may take to end, or an undisturbed one beyond its usual time."""

UNFINISHED = re.compile(r"\.(partial|replaced)-|\.lock$|^\.tmp|^tmp[a-z0-9_]{8}$|\.trial$")
"""Names of what a writer takes away when it is done: ours, and those of safetensors and datasets."""

TRAINING = re.compile(r"^\.?out\.training$")
"""Work folders of trainings, which stay until these are done, or for good."""

STARTING = re.compile(r"^Traceback .*^KeyboardInterrupt\s*\Z", re.MULTILINE | re.DOTALL)
"""What Python prints of Ctrl-C while it starts."""

VOLATILE = {"seconds"}
"""Fields of JSON records that tell of the machine."""


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run of a command leaves, and how long it takes."""

    files: dict[str, str]
    seconds: float
    largest: int
    bytes: int


@dataclass
class Result:
    """What came of a trial.

    Attributes:
        codes: Exit codes of the disturbed processes.
        faults: What is wrong; empty where nothing is.
        hit: Whether the disturbance came before the command was done.
        mute: Whether it could not print all that it had to say.
    """

    codes: list[int | None] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hit: bool = False
    mute: bool = False


class Trials:
    """Runs trials.

    Args:
        server: Starts commands.
        inputs: Folder of `make_inputs`, and of outputs of commands that others need.
        scratch: Folder to work in.
    """

    def __init__(self, server: Server, inputs: Path, scratch: Path) -> None:
        self.server, self.inputs, self.scratch = server, inputs, scratch
        self.done = (
            scratch / "undisturbed"
        )  # as deep as the working folders of trials: outputs hold relative paths
        self.untouched = tree(inputs)
        self.references: dict[str, Reference] = {}
        self._number = 0

    def start(
        self, command: Command, work: Path, *more: str, limit: int | None = None, typed: bool = False
    ) -> Job:
        """Start a command in a working folder."""
        arguments, log = command.typed(self.inputs, self.done, *more), self.log(work)
        if typed:
            return Typed(arguments, work, log, limit)
        return self.server.start(arguments, work, log, limit)

    def log(self, work: Path) -> Path:
        """Where a command prints to."""
        return self.scratch / f"{work.parent.name}-{work.name}.log"

    def reference(self, command: Command) -> Reference:
        """What the command leaves undisturbed; made once, and kept as an input of others."""
        if command.name not in self.references:
            work = self.done / command.name
            work.mkdir(parents=True)
            began = time.monotonic()
            code = self.start(command, work).wait(10 * PATIENCE)
            if code != 0:
                raise RuntimeError(
                    f"{command.name} fails undisturbed ({code}): {self.log(work).read_text()[-2000:]}"
                )
            sizes = [path.stat().st_size for path in work.rglob("*") if path.is_file()]
            found = Reference(state(work), time.monotonic() - began, max(sizes), sum(sizes))
            self.references[command.name] = found
            if left := unfinished(work):
                raise RuntimeError(f"{command.name} leaves {left} undisturbed")
        return self.references[command.name]

    def run(self, command: Command, fault: "Fault", draw: random.Random, typed: bool = False) -> Result:
        """Disturb a command, look at what is left, and let it be done."""
        reference = self.reference(command)
        self._number += 1
        folder = self.scratch / f"{self._number}"
        with fault.place(folder, reference, draw) as work:
            self.log(work).write_bytes(b"")
            result = Result()
            fault.disturb(self, command, work, draw, result, typed)
            self._judge(command, fault, work, result)
            with fault.mended(work):
                self._finish(command, work, reference, result)
            if tree(self.inputs) != self.untouched:
                result.faults.append("an input has changed")
            if result.faults:
                result.faults.append(self.log(work).read_text()[-1500:])
        shutil.rmtree(folder, ignore_errors=True)
        self.log(work).unlink(missing_ok=True)
        return result

    def _judge(self, command: Command, fault: "Fault", work: Path, result: Result) -> None:
        """What must be true as soon as the disturbed command has ended."""
        said = self.log(work).read_text(errors="replace")
        if fault.traces and not state(work) and STARTING.search(said):
            return  # Python itself was starting, before any code of ours
        if wrong := [code for code in result.codes if code not in (0, *fault.codes)]:
            result.faults.append(f"exit {wrong}")
        if "Traceback" in said:
            result.faults.append("a traceback")
        if (
            2 in result.codes
            and not result.mute
            and len(re.findall(r"^error: ", said, re.MULTILINE)) != result.codes.count(2)
        ):
            result.faults.append("not one line of error")
        if fault.clears and (left := unfinished(work)):
            result.faults.append(f"left at once: {left}")
        outputs = state(work)
        reference = self.references[command.name].files
        if not command.continues and (half := {n for n in outputs if outputs[n] != reference.get(n)}):
            result.faults.append(f"half-written or wrong: {sorted(half)[:3]}")

    def _finish(self, command: Command, work: Path, reference: Reference, result: Result) -> None:
        """The same command must be done now, and leave what it leaves undisturbed."""
        more: list[str] = []
        before = answered(work)
        if state(work) and not command.continues:
            more = ["--force"]
        elif command.resumes and saved(work):
            more = ["--resume"]
        job = self.start(command, work, *more)
        code = job.wait(PATIENCE + 5 * reference.seconds)
        if code is None:
            job.tell(signal.SIGKILL)
            job.wait(PATIENCE)
        if code != 0:
            result.faults.append(f"not done afterwards: exit {code} (typed again with {more})")
            return
        found = state(work)
        if found != reference.files:
            names = found.keys() | reference.files.keys()
            differing = sorted(name for name in names if found.get(name) != reference.files.get(name))
            result.faults.append(f"another result: {differing[:3]}")
        if left := unfinished(work):
            result.faults.append(f"left over: {left}")
        if lost := before - answered(work):
            result.faults.append(f"{len(lost)} answers lost")


@dataclass(frozen=True)
class Fault:
    """A kind of disturbance.

    Attributes:
        name: For the summary.
        codes: Exit codes that it may lead to, besides 0. (Before and after its work, a command is ended by the signal
            itself.)
        clears: Whether a command that it ended leaves nothing unfinished.
        traces: Whether Python itself prints a traceback of it, before any code of ours.
    """

    name: str
    codes: tuple[int, ...]
    clears: bool = True
    traces: bool = False

    @contextmanager
    def place(self, folder: Path, reference: Reference, draw: random.Random) -> Iterator[Path]:
        """Where the command works."""
        work = folder / "work"
        work.mkdir(parents=True)
        yield work

    @contextmanager
    def mended(self, work: Path) -> Iterator[None]:
        """The disturbance has gone."""
        yield

    def disturb(
        self, trials: Trials, command: Command, work: Path, draw: random.Random, result: Result, typed: bool
    ) -> None:
        """Start the command and disturb it, until it has ended."""
        raise NotImplementedError


def ended(job: Job, result: Result, seconds: float) -> None:
    """Wait until a process has ended; one that does not hangs."""
    code = job.wait(seconds)
    if code is None:
        result.faults.append("hangs")
        job.tell(signal.SIGKILL)
        code = job.wait(PATIENCE)
    result.codes.append(code)


@dataclass(frozen=True)
class Signalled(Fault):
    """A signal at any moment, to the process or to all of its group."""

    number: int = signal.SIGKILL

    def disturb(
        self, trials: Trials, command: Command, work: Path, draw: random.Random, result: Result, typed: bool
    ) -> None:
        """See `Fault`."""
        usual = trials.references[command.name].seconds
        job = trials.start(command, work, typed=typed)
        early = job.wait(draw.uniform(0, usual * (4 if typed else 0.9)))
        if early is not None:
            result.codes.append(early)
            return
        result.hit = True
        job.tell(self.number, everyone=draw.random() < 0.5)
        ended(job, result, PATIENCE)
        job.tell(signal.SIGKILL)  # what the first process has left behind, if anything


@dataclass(frozen=True)
class Limited(Fault):
    """No file may become larger than something: what a full disk looks like without the right to mount one."""

    def disturb(
        self, trials: Trials, command: Command, work: Path, draw: random.Random, result: Result, typed: bool
    ) -> None:
        """See `Fault`."""
        reference = trials.references[command.name]
        limit = int(draw.uniform(0, reference.largest))
        job = trials.start(command, work, limit=limit, typed=typed)
        ended(job, result, PATIENCE + 3 * reference.seconds)
        result.hit = 0 not in result.codes
        result.mute = trials.log(work).stat().st_size >= limit


@dataclass(frozen=True)
class Mounted(Fault):
    """A disk of its own that is too small, or can only be read."""

    writable: bool = True

    @contextmanager
    def place(self, folder: Path, reference: Reference, draw: random.Random) -> Iterator[Path]:
        """See `Fault`."""
        folder.mkdir(parents=True)
        size = int(draw.uniform(0, reference.bytes)) // 4096 * 4096 + 4096
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        try:
            work = folder / "work"
            work.mkdir()
            if not self.writable:
                mount("-o", "remount,ro", str(folder))
            yield work
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)

    @contextmanager
    def mended(self, work: Path) -> Iterator[None]:
        """See `Fault`."""
        mount("-o", "remount,rw,size=1g", str(work.parent))
        yield

    def disturb(
        self, trials: Trials, command: Command, work: Path, draw: random.Random, result: Result, typed: bool
    ) -> None:
        """See `Fault`."""
        reference = trials.references[command.name]
        job = trials.start(command, work, typed=typed)
        ended(job, result, PATIENCE + 3 * reference.seconds)
        result.hit = 0 not in result.codes


@dataclass(frozen=True)
class Twice(Fault):
    """The same command at the same time, somewhat later."""

    def disturb(
        self, trials: Trials, command: Command, work: Path, draw: random.Random, result: Result, typed: bool
    ) -> None:
        """See `Fault`."""
        reference = trials.references[command.name]
        first = trials.start(command, work, typed=typed)
        early = first.wait(draw.uniform(0, reference.seconds / 2))
        second = trials.start(command, work, typed=typed)
        result.hit = early is None
        patience = PATIENCE + 6 * reference.seconds
        if early is None:
            ended(first, result, patience)
        else:
            result.codes.append(early)
        ended(second, result, patience)
        if 0 not in result.codes:
            result.faults.append("neither of two writers is done")


def mount(*arguments: str) -> None:
    """Mount something.

    Raises:
        subprocess.CalledProcessError: it is not allowed.
    """
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount disks."""
    folder.mkdir(parents=True)
    try:
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder))
    except (subprocess.CalledProcessError, OSError):
        return False
    finally:
        subprocess.run(["umount", folder], check=False, capture_output=True)
        folder.rmdir()
    return True


KILL = Signalled("kill", (-signal.SIGKILL,), clears=False)
TERM = Signalled("term", (128 + signal.SIGTERM, -signal.SIGTERM), number=signal.SIGTERM)
INT = Signalled("ctrl-c", (128 + signal.SIGINT, -signal.SIGINT), traces=True, number=signal.SIGINT)
LIMIT = Limited("limit", (2,))
FULL = Mounted("full disk", (2,))
READ_ONLY = Mounted("read-only", (2,), writable=False)
TWICE = Twice("two writers", (2,))

ANYWHERE: Sequence[Fault] = (KILL, TERM, LIMIT, KILL, INT, TWICE)
"""What needs no rights; kills twice as often."""

AS_ROOT: Sequence[Fault] = (*ANYWHERE, FULL, READ_ONLY)


def state(work: Path) -> dict[str, str]:
    """Hashes of all finished outputs in a working folder, by name; what tells of machine and place is left out."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work)
        if name.parts[0] == "cache" or TRAINING.match(name.parts[0]) or path.is_dir():
            continue
        if not any(UNFINISHED.search(part) for part in name.parts):
            found[str(name)] = sha256(_told(path, work)).hexdigest()
    return found


def tree(folder: Path) -> dict[str, str]:
    """Hashes of all files in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def unfinished(work: Path) -> list[str]:
    """What writers have left behind."""
    names = (path.relative_to(work) for path in work.rglob("*"))
    return sorted(
        str(name)
        for name in names
        if UNFINISHED.search(name.name) and not (TRAINING.match(name.parts[0]) and len(name.parts) > 1)
    )


def saved(work: Path) -> bool:
    """Whether a training has saved a checkpoint."""
    return any(work.glob("*out.training/checkpoint-*/trainer_state.json"))


def answered(work: Path) -> set[str]:
    """The whole rows of a run."""
    file = work / "out" / "answers.jsonl"
    return set(file.read_text().splitlines(keepends=True)[:-1]) if file.is_file() else set()


def _told(path: Path, work: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".json":
        try:
            return json.dumps(_stable(json.loads(data)), sort_keys=True).replace(str(work), "WORK").encode()
        except ValueError:
            pass
    return data.replace(os.fsencode(work), b"WORK")


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value
