"""Work in processes that may be killed by their input."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from mgll_encoder.common.errors import StorageError
from mgll_encoder.common.workers import resilient_map


def square(number: int) -> int:
    match number:
        case 3 | 40:
            os.kill(os.getpid(), signal.SIGKILL)
        case 5:
            time.sleep(60)
    return number**2


def lost(number: int) -> int:
    return -number


def test_a_killed_or_endless_task_is_lost_and_no_other() -> None:
    began = time.monotonic()
    numbers = list(range(50))
    found = list(resilient_map(square, numbers, 2, lost, seconds=1))
    assert found == [-n if n in (3, 5, 40) else n**2 for n in numbers]
    assert time.monotonic() - began < 20


def test_leaving_early_leaves_no_process() -> None:
    before = _children()
    results = resilient_map(square, [6, 7, 8, 9], 1, lost)
    assert next(results) == 36
    results.close()
    assert _children() <= before


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_processes_without_shared_memory_are_a_fault_of_the_disk_not_of_the_data() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
    try:
        with pytest.raises(StorageError, match="/dev/shm"):
            next(resilient_map(square, [6], 1, lost))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
