"""Starts commands in processes of their own: forked from one that has imported everything, or as a user does."""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1", "COLUMNS": "200",
}  # fmt: skip


class Job:
    """A command that was started, the leader of a process group."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self, seconds: float) -> int | None:
        """Its exit code (negative: the signal that ended it), or None where it has not ended by then."""
        raise NotImplementedError

    def tell(self, number: int, everyone: bool = True) -> None:
        """Send a signal to all of its processes, or to the first one."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if everyone else os.kill)(self.pid, number)


class Typed(Job):
    """A command that was started as a user does it, with its own imports."""

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path, limit: int | None) -> None:
        program = Path(sys.executable).with_name(arguments[0])
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [program, *arguments[1:]], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True, env=_environment(folder), preexec_fn=lambda: _limit(limit),
            )  # fmt: skip
        super().__init__(self._process.pid)

    def wait(self, seconds: float) -> int | None:
        """See `Job`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class Forked(Job):
    """A command that was forked from the server."""

    def __init__(self, pid: int, server: "Server") -> None:
        super().__init__(pid)
        self._server = server

    def wait(self, seconds: float) -> int | None:
        """See `Job`."""
        return self._server.wait(self.pid, seconds)


class Server:
    """A process that has imported everything, so that a command costs a fork."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        self._said = b""
        self._ended: dict[int, int] = {}
        self._read("ready", 300)

    def start(self, arguments: Sequence[str], folder: Path, log: Path, limit: int | None = None) -> Job:
        """Start a command in a folder, where files may not become larger than ``limit`` bytes."""
        request = {"arguments": list(arguments), "folder": str(folder), "log": str(log), "limit": limit}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Forked(int(self._read("started", 30)), self)

    def wait(self, pid: int, seconds: float) -> int | None:
        """See `Job`."""
        until = time.monotonic() + seconds
        while pid not in self._ended and (left := until - time.monotonic()) > 0:
            self._next(left)
        return self._ended.pop(pid, None)

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()

    def _read(self, word: str, seconds: float) -> str:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if (found := self._next(left)) and found[0] == word:
                return found[1]
        raise TimeoutError(f"the server has not said '{word}' in {seconds:.0f} s")

    def _next(self, seconds: float) -> tuple[str, str] | None:
        """The next line's first two words. Not by ``readline``: select does not see the lines that it has buffered."""
        stream = self._process.stdout
        assert stream
        if b"\n" not in self._said:
            if not select.select([stream], [], [], seconds)[0]:
                return None
            if not (more := os.read(stream.fileno(), 65536)):
                raise EOFError("the server has ended")
            self._said += more
            return self._next(seconds) if b"\n" in self._said else None
        line, self._said = self._said.split(b"\n", 1)
        word, *rest = line.decode(errors="replace").split() or [""]  # libraries print there, too
        if word == "ended":
            self._ended[int(rest[0])] = int(rest[1])
        return word, rest[0] if rest else ""


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "MGLL_CACHE_DIR": str(folder / "cache")}


def _limit(size: int | None) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _child(request: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    os.setsid()
    with Path(os.devnull).open("rb") as nothing, Path(request["log"]).open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    _limit(request["limit"])
    os.chdir(request["folder"])
    os.environ.update(_environment(Path(request["folder"])))
    sys.argv = request["arguments"]
    try:
        known[sys.argv[0]]()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:  # nothing may pass the command's own mapping
        sys.stderr.write(f"Traceback: not caught: {error!r}\n")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def serve() -> None:
    """Fork a command for every line that comes in, and tell how those end."""
    from tests.fuzz.harness import commands, warm

    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # as for a command that has not yet begun, without a traceback
    warm()
    known = commands()
    _say("ready")
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            child = os.fork()
            if child == 0:
                _child(json.loads(line), known)
            _say("started", child)
        while (ended := _one_that_ended()) is not None:
            _say("ended", *ended)


def _one_that_ended() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


if __name__ == "__main__":
    serve()
