"""Work spread over processes that may die: one damaged file never takes the others with it."""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 4
"""Tasks per process that are handed out before the first result is asked for."""


def resilient_map(
    work: Callable[[T], R], tasks: Sequence[T], workers: int, lost: Callable[[T], R], seconds: int = 60
) -> Iterator[R]:
    """Results of tasks in their order, each computed in another process.

    Args:
        work: A function of a module.
        tasks: What it is called with.
        workers: Processes, at least 1.
        lost: Makes the result of a task whose process was killed (by the system for its memory, by a crash of a
            decoder) or took too long.
        seconds: How long a task may take.
    """
    limited, workers = partial(_limited, work, seconds), max(1, workers)
    waiting = deque(tasks)
    while waiting:
        flying: deque[tuple[T, Future[R]]] = deque()
        pool = ProcessPoolExecutor(workers, initializer=_as_usual)
        try:
            while waiting or flying:
                while waiting and len(flying) < AHEAD * workers:
                    flying.append((waiting[0], pool.submit(limited, waiting[0])))
                    waiting.popleft()
                result = flying[0][1].result()
                flying.popleft()
                yield result
        except BrokenProcessPool:  # whose fault it was is not known: those in flight go one by one
            for task, _ in flying:
                yield _alone(limited, task, lost)
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(work: Callable[[T], R], task: T, lost: Callable[[T], R]) -> R:
    with ProcessPoolExecutor(1, initializer=_as_usual) as pool:
        try:
            return pool.submit(work, task).result()
        except BrokenProcessPool:
            return lost(task)


def _limited(work: Callable[[T], R], seconds: int, task: T) -> R:
    """Do the work; the system ends the process when it takes too long, even inside of a decoder."""
    signal.alarm(seconds)
    try:
        return work(task)
    finally:
        signal.alarm(0)


def _as_usual() -> None:
    """Signals of a worker: interrupting is for the parent to handle, the others end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)
