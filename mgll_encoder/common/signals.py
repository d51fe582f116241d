"""SIGTERM (sent by Slurm and container engines) and SIGHUP end a command as Ctrl-C does: its files are cleaned up."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """The process received a signal to end. Libraries treat it as Ctrl-C."""


class _State:
    received: int | None = None
    deferring = False
    swallowed = False


_state = _State()


def received() -> int | None:
    """Return the first signal that asked this process to end, or None."""
    return _state.received


def exit_code() -> int:
    """Return the exit code that a shell expects after a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (_state.received or signal.SIGINT)


@contextmanager
def watched(*, last: bool = False) -> Iterator[None]:
    """Raise `Terminated` in the main thread on a signal to end; ignored signals (nohup) stay ignored.

    Only Ctrl-C interrupts a second time, so that launchers that signal twice do not disturb the cleanup.

    Args:
        last: Whether the process ends after the block, so that a later Ctrl-C should end it without a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    home = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != home:  # a forked child: restore the default behavior
            _as_before(number, frame)
            return
        first, _state.received = _state.received is None or _state.swallowed, _state.received or number
        _state.swallowed = False
        if (first and not _state.deferring) or (number == signal.SIGINT and not first):
            raise Terminated

    def repeat(lost: Any) -> None:
        """Repeat a signal that arrived where Python drops exceptions (a destructor, a fork callback)."""
        if not isinstance(lost.exc_value, Terminated):
            hook(lost)
            return
        _state.swallowed = True
        threading.Timer(0.05, os.kill, (home, _state.received)).start()

    hook, sys.unraisablehook = sys.unraisablehook, repeat
    before = {number: signal.getsignal(number) for number in WATCHED}
    _state.received = None
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handle)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(
                number, signal.SIG_DFL if last and handler is signal.default_int_handler else handler
            )


@contextmanager
def deferred() -> Iterator[None]:
    """Only record the first signal, see `received`; a second Ctrl-C interrupts at once."""
    _state.deferring = True
    try:
        yield
    finally:
        _state.deferring = False


def _as_before(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
