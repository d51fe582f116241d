"""Work distributed over processes that may crash: one damaged file does not affect the others."""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from mgll_encoder.common.errors import StorageError

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 4
"""Tasks submitted per process before the first result is awaited."""


def resilient_map(
    work: Callable[[T], R], tasks: Sequence[T], workers: int, lost: Callable[[T], R], seconds: int = 60
) -> Iterator[R]:
    """Yield the results of tasks in their order, computed in other processes.

    Args:
        work: A module-level function.
        tasks: Its arguments.
        workers: Number of processes, at least 1.
        lost: Returns the result of a task that took too long or whose process was killed (out of memory, a crash of a
            decoder).
        seconds: Time limit of a task.

    Raises:
        StorageError: the processes have no shared memory.
    """
    limited, workers = partial(_limited, work, seconds), max(1, workers)
    waiting = deque(tasks)
    while waiting:
        flying: deque[tuple[T, Future[R]]] = deque()
        pool = _pool(workers)
        try:
            while waiting or flying:
                while waiting and len(flying) < AHEAD * workers:
                    flying.append((waiting[0], pool.submit(limited, waiting[0])))
                    waiting.popleft()
                result = flying[0][1].result()
                flying.popleft()
                yield result
        except BrokenProcessPool:  # the culprit is unknown: repeat the tasks in flight one by one
            for task, _ in flying:
                yield _alone(limited, task, lost)
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(work: Callable[[T], R], task: T, lost: Callable[[T], R]) -> R:
    with _pool(1) as pool:
        try:
            return pool.submit(work, task).result()
        except BrokenProcessPool:
            return lost(task)


def _pool(workers: int) -> ProcessPoolExecutor:
    try:
        return ProcessPoolExecutor(workers, initializer=_as_usual)
    except OSError as error:  # a semaphore is a file of 32 bytes; Python loses the error number
        raise StorageError(
            "processes cannot share memory: /dev/shm is missing, full or read-only, or files are limited to a few "
            "bytes: see `df /dev/shm` and `ulimit -f`"
        ) from error


def _limited(work: Callable[[T], R], seconds: int, task: T) -> R:
    """Do the work; the system kills the process after the time limit, even inside a decoder."""
    signal.alarm(seconds)
    try:
        return work(task)
    finally:
        signal.alarm(0)


def _as_usual() -> None:
    """Set a worker's signal handlers: the parent handles Ctrl-C, the other signals end the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)
