"""Commands of this project in processes that share their start: libraries are imported once, and each command forks.

A command takes seconds to import torch and transformers; many short ones in a row would mostly do that.
"""

import atexit
import importlib.metadata
import io
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO

LIBRARIES = (
    "torch",
    "torchvision",
    "scipy.stats",
    "accelerate",
    "datasets",
    "transformers.image_processing_utils_fast",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
)
"""Imported before the fork. None may ask the GPU driver anything, since a process forked after that cannot use the GPU;
so transformers.trainer_utils, which imports bitsandbytes, is not among them."""


def start(command: Sequence[str], environment: Mapping[str, str]) -> tuple[ForkServerProcess, IO[bytes]]:
    """Start a command.

    Args:
        command: A console command of this project or a script of this folder, and its arguments.
        environment: Environment of all commands of this process; that of the first one counts.

    Returns:
        The process, and what it prints.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    printed, prints = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(list(command), prints))
    with _replaced(environment):
        process.start()
    prints.close()
    return process, os.fdopen(os.dup(printed.fileno()), "rb")


@contextmanager
def _replaced(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(command: Sequence[str], prints: Connection) -> None:
    """Be the command, with its own streams."""
    set_start_method(None, force=True)  # the command's own processes start as always
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, nothing), (1, prints.fileno()), (2, prints.fileno())):
        os.dup2(source, descriptor)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    try:
        _become(*command)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends without them


def _become(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(str(Path(__file__).parent / name), run_name="__main__")
    else:
        (found,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        sys.exit(found.load()())
