"""Runs commands on damaged inputs, in a forked process that may hang, crash or eat memory, and judges what they did.

The worker is forked from a parent that has imported everything, so that an input costs milliseconds. It runs many
inputs one after another and is replaced when one has killed it.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from mgll_encoder.common.pseudonyms import KEY_FILE
from tests.fuzz.mutators import MARKER, mutate
from tests.fuzz.readers import Reader

SECONDS = 30.0
"""An input that takes longer hangs."""

BUILDING = 120.0
"""Likewise for the building of a valid input."""

MEMORY = 4 << 30
"""Bytes that an input may take beyond what the parent has mapped."""

TURNS = 400
"""Inputs of one worker: its caches do not grow for ever."""

LONGEST = 4000
"""Characters of an error line that a person can still read."""

LEFTOVER = re.compile(r"(^|/)\.[^/]+")
"""Hidden files: what a writer renames or removes when it is done. The key of the pseudonyms stays, as one of inputs."""

NOT_A_NUMBER = re.compile(r"(?<![\w.'\"/-])nan(?![\w.'\"/-])")

PACKAGES = ("mgll_encoder", "mllm_adapters", "eval_mcq")

LIBRARIES = (
    "torch", "transformers", "datasets", "pyarrow.parquet", "pandas", "openpyxl", "pydicom.pixels", "PIL.Image",
    "sklearn.linear_model", "peft", "tensorboard", "matplotlib.pyplot", "scipy.stats", "sentencepiece",
)  # fmt: skip
"""What commands import late, besides our own modules."""

Edits = tuple[int, ...]
"""Seeds of the damages that are done to a file, one after another."""


@dataclass(frozen=True)
class Case:
    """An input: which file of a reader's valid input is damaged how, and which command reads it."""

    file: str
    other: str
    command: str
    edits: Edits


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: Exit code; None where it did not exit by itself.
        fault: Why a command that ended with 1 did: the exception and the place in our code.
        out: Standard output.
        err: Standard error.
        seconds: How long it took.
        signal: What killed the process, or ``hang``.
        new: Files that were not there before.
        copied: Those of them that are the damaged file as it was given.
    """

    code: int | None
    fault: str
    out: str
    err: str
    seconds: float
    signal: str = ""
    new: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """ok: read; refused: exit code 2 in one line; finding: anything else, and what."""

    kind: Literal["ok", "refused", "finding"]
    what: str = ""


def judge(outcome: Outcome, folder: Path, reader: Reader) -> Verdict:
    """What is to be said of an outcome."""
    if (folder / MARKER).exists():
        return Verdict("finding", "planted code was run")
    if outcome.signal:
        return Verdict("finding", outcome.signal)
    if outcome.code not in (0, 2):
        return Verdict("finding", f"exit {outcome.code}: {outcome.fault or outcome.err[-200:]}")
    if "Traceback (most recent call last)" in outcome.err:
        return Verdict("finding", "a traceback on stderr")
    left = [name for name in outcome.new if not (reader.may_stay(name) or name.endswith(KEY_FILE))]
    if hidden := [name for name in left if LEFTOVER.search(name)]:
        return Verdict("finding", f"leftover {re.sub(r'[a-z0-9_]{8}$', 'XXXXXXXX', hidden[0])}")
    if outcome.code == 2:
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        if len(errors) != 1:
            return Verdict("finding", f"exit 2 with {len(errors)} error lines")
        if len(errors[0]) > LONGEST:
            return Verdict("finding", f"an error of more than {LONGEST} characters: {errors[0][:120]}")
        if any(not char.isprintable() for char in errors[0]):
            return Verdict("finding", f"control characters in the error: {errors[0][:120]!r}")
        return (
            Verdict("finding", f"refused, and {left[0]} is written")
            if left
            else Verdict("refused", errors[0])
        )
    if NOT_A_NUMBER.search(outcome.out) and not any(map(_says_nan, folder.rglob("*.json"))):
        return Verdict("finding", "nan in what is printed")
    for name in left:
        if (
            name.endswith((".json", ".jsonl"))
            and name not in outcome.copied
            and (fault := _no_json(folder / name))
        ):
            return Verdict("finding", f"{name}: {fault}")
    return Verdict("ok")


def _says_nan(file: Path) -> bool:
    """Whether a JSON file has the word in a text: numbers are written otherwise there."""
    return bool(re.search(r"\bnan\b", file.read_text(encoding="utf-8", errors="replace")))


def _no_json(file: Path) -> str:
    """What is wrong with a JSON file that was written."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        text = file.read_text(encoding="utf-8")
        for part in text.rstrip("\n").split("\n") if file.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)
    except ValueError as error:
        return re.sub(r"\d+", "N", str(error))
    except OSError:
        return ""
    return ""


class Worker:
    """Runs inputs of one reader in a forked process.

    Args:
        reader: Whose inputs.
        valid: Folder with its valid input.
        scratch: Empty folder to work in.
    """

    def __init__(self, reader: Reader, valid: Path, scratch: Path) -> None:
        self.reader, self.valid, self.scratch = reader, valid, scratch
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._turns = 0

    def run(self, case: Case) -> tuple[Outcome, Verdict]:
        """Run a case in a new working folder, which is left for the caller to look at."""
        return self._run(self.folder(), lambda folder: prepare(self.valid, folder, case), case.command)

    def replay(self, damaged: Path, command: str) -> tuple[Outcome, Verdict]:
        """Run a command on the valid input with the files of a folder laid over it."""
        return self._run(self.folder(), lambda folder: overlay(self.valid, folder, damaged), command)

    def folder(self) -> Path:
        """The working folder, emptied."""
        work = self.scratch / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        return work

    def close(self) -> None:
        """End the process."""
        if self._process and self._process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        self._process = None
        self._turns = 0

    def _run(self, folder: Path, make: Callable[[Path], None], command: str) -> tuple[Outcome, Verdict]:
        if self._process is None or self._turns >= TURNS:
            self.close()
            self._start()
        assert self._pipe is not None
        assert self._process is not None
        self._turns += 1
        make(folder)
        before = set(_files(folder))
        for name in ("out", "err"):
            (self.scratch / name).write_bytes(b"")
        began = time.monotonic()
        killed, code, fault = "", None, ""
        self._pipe.send((str(folder), command))
        if not self._pipe.poll(SECONDS):
            killed = f"hangs for more than {SECONDS:.0f} s"
        else:
            try:
                code, fault = self._pipe.recv()
            except EOFError:
                self._process.join()
                status = self._process.exitcode or 0
                killed = (
                    f"killed by {signal.Signals(-status).name}"
                    if status < 0
                    else f"process left with {status}"
                )
        seconds = time.monotonic() - began
        if killed:
            self.close()
        out, err = ((self.scratch / name).read_text("utf-8", "replace") for name in ("out", "err"))
        new = tuple(sorted(set(_files(folder)) - before))
        given = {
            path.read_bytes()
            for name in before
            if (path := folder / name).is_file() and path.suffix == ".json"
        }
        copied = tuple(
            name for name in new if name.endswith(".json") and (folder / name).read_bytes() in given
        )
        outcome = Outcome(code, fault, out, err, seconds, killed, new, copied)
        return outcome, judge(outcome, folder, self.reader)

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.scratch))
        self._process.start()
        theirs.close()


def prepare(valid: Path, folder: Path, case: Case) -> None:
    """Lay out the valid input with one file damaged."""
    data, other = (valid / case.file).read_bytes(), (valid / case.other).read_bytes()
    for seed in case.edits:
        data = mutate(case.file, data, seed, other)
    _link(valid, folder, case.file.split("/")[0])
    target = folder / case.file
    target.unlink()
    target.write_bytes(data)


def overlay(valid: Path, folder: Path, damaged: Path) -> None:
    """Lay out the valid input with the files of another folder instead of its own."""
    tops = {path.name for path in damaged.iterdir()}
    _link(valid, folder, *tops)
    for path in damaged.rglob("*"):
        target = folder / path.relative_to(damaged)
        if path.is_file() and path.name != "case.json":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copyfile(path, target)


def _link(valid: Path, folder: Path, *copied: str) -> None:
    """Symbolic links to all of the valid input, but real folders where something in them is to be replaced."""
    for path in valid.iterdir():
        target = folder / path.name
        if path.name in copied and path.is_dir():
            shutil.copytree(path, target, symlinks=True, copy_function=os.link)
        elif path.is_dir():
            target.symlink_to(path)
        else:
            os.link(path, target)


def _files(folder: Path) -> Iterator[str]:
    """Everything in a folder but the cache; of the cache what is not finished."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("cache") or LEFTOVER.search(name):
            yield name


def commands() -> Mapping[str, Callable[[], None]]:
    """The commands by name; importing them is the slow part of a run, and done once."""
    import eval_mcq.cli.main
    import mgll_encoder.cli
    import mllm_adapters.cli.lora
    import mllm_adapters.cli.retrain
    import mllm_adapters.cli.swap

    return {
        "mgll-encoder": mgll_encoder.cli.main,
        "swap-encoder": mllm_adapters.cli.swap.main,
        "retrain-projector": mllm_adapters.cli.retrain.main,
        "finetune-lora": mllm_adapters.cli.lora.main,
        "eval-mcq": eval_mcq.cli.main.main,
    }


def _serve(pipe: Connection, scratch: Path) -> None:
    """The worker: commands arrive, exit codes go back."""
    os.setsid()
    faulthandler.disable()  # a crash is told by its signal
    with Path(os.devnull).open("rb") as stream:
        os.dup2(stream.fileno(), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        with (scratch / name).open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    known = commands()
    with contextlib.suppress(EOFError):
        while True:
            folder, command = pipe.recv()
            os.chdir(folder)
            os.environ["MGLL_CACHE_DIR"] = f"{folder}/cache"
            pipe.send(_call(known, shlex.split(command)))
    os._exit(0)


def _call(known: Mapping[str, Callable[[], None]], argv: list[str]) -> tuple[int, str]:
    """Run a command as if typed: its exit code, and where an unexpected exception came from."""
    sys.argv = argv
    code, fault = 0, ""
    try:
        known[argv[0]]()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:  # nothing may pass the command's own mapping
        code, fault = 1, f"not caught: {_origin(error)}"
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    return code, fault or (_explain(known[argv[0]]) if code not in (0, 2) else "")


def _explain(main: Callable[[], None]) -> str:
    """Run a failed command once more, to see its exception."""
    os.environ["MGLL_DEBUG"] = "1"
    try:
        main()
    except BaseException as error:
        return _origin(error)
    finally:
        del os.environ["MGLL_DEBUG"]
    return "not when run again"


def _origin(error: BaseException) -> str:
    """The type of an exception and the innermost place in our code that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if any(f"/{p}/" in f.filename for p in PACKAGES) and "site-packages" not in f.filename
    ]
    frame = (ours or list(frames) or [None])[-1]
    if frame is None:
        return type(error).__name__
    where = "/".join(Path(frame.filename).parts[-2:])
    return f"{type(error).__name__} in {where}:{frame.lineno} {frame.name}: {str(error)[:150]}"


def warm() -> None:
    """Import in this process what the commands import when they run, so that every fork has it already."""
    import torch

    commands()
    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)
    extras = importlib.import_module("mgll_encoder.common.extras")
    extras.require = functools.cache(
        extras.require
    )  # what is installed stays the same, and takes 20 ms to look at
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # so that no fork looks for garbage among all that has been imported


def worker_of(reader: Reader, scratch: Path) -> Worker:
    """A worker with the reader's valid input, which is built in a process of its own.

    Raises:
        RuntimeError: it could not be built.
    """
    valid = scratch / "valid"
    valid.mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=_build, args=(reader, valid))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"the valid input of {reader.name} could not be built (exit code {process.exitcode})"
        )
    return Worker(reader, valid, scratch)


def _build(reader: Reader, folder: Path) -> None:
    os.environ["MGLL_CACHE_DIR"] = str(folder.parent / "cache")
    with (
        Path(os.devnull).open("w") as stream,
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(stream),
    ):
        try:
            reader.build(folder)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    os._exit(0)
