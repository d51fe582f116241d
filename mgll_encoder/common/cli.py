"""Manners of every command: exit codes (0 done, 2 the user's mistake, 1 our fault), one-line errors, progress."""

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mgll_encoder.common.errors import UserError

T = TypeVar("T")

stdout = Console()
"""Results: tables, paths, the next command to type."""

stderr = Console(stderr=True)
"""Progress, warnings and errors."""


def new_app(help_text: str) -> typer.Typer:
    """A Typer application with this project's settings."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
    )


def run(app: typer.Typer) -> NoReturn:
    """Run a command and leave with its exit code.

    Set ``MGLL_DEBUG=1`` to see tracebacks instead of one-line errors.
    """
    _quieten_libraries()
    # So that nothing looks for garbage among all that torch has made: half a second at every exit.
    atexit.register(gc.freeze)
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
    except (UserError, typer.exceptions.TyperException) as error:
        _reraise_if_debugging()
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(2, message)
    except (typer.Abort, KeyboardInterrupt):
        _fail(130, "interrupted")
    except Exception as error:  # the last resort: our fault, said in one line
        _reraise_if_debugging()
        _fail(
            1, f"{type(error).__name__}: {error} (a fault of ours: run again with MGLL_DEBUG=1 and report it)"
        )
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def importing() -> Iterator[None]:
    """A block of imports without garbage collection: what they make stays, and torch takes a fifth less time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def warn(message: str) -> None:
    """Tell the user something they should know, on stderr."""
    stderr.print(f"[yellow]warning:[/yellow] {escape(message)}", highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Say what is being done, on stderr."""
    stderr.print(escape(message), highlight=False, soft_wrap=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate under a progress bar on stderr (a plain line where stderr is no terminal)."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not stderr.is_terminal:
        note(f"{description} ..." if total is None else f"{description} ({total}) ...")
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)


def _quieten_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # It sets its own level when it is imported, which transformers' Trainer does; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="PIL")  # what matters is said by mgll_encoder.common.images


def _reraise_if_debugging() -> None:
    if os.environ.get("MGLL_DEBUG"):
        raise


def _fail(code: int, message: str) -> NoReturn:
    stderr.print(f"[red]error:[/red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(code)
