"""Manners of every command: exit codes, one-line errors, progress.

Exit codes: 0 done, 2 the user's mistake (or that of their disk), 1 our fault, 130 and 143 ended by Ctrl-C and SIGTERM.
"""

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn, TypeVar, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mgll_encoder.common import signals
from mgll_encoder.common.errors import UserError, one_line
from mgll_encoder.common.faults import find_fault
from mgll_encoder.common.files import clear_interrupted
from mgll_encoder.common.lazy import version
from mgll_encoder.common.progress import show_with

T = TypeVar("T")

PACKAGES = ("mgll_encoder", "mllm_adapters", "eval_mcq")
"""Whose log records are shown."""


class _Console(Console):
    """A console whose reader may leave early (``| head``)."""

    def on_broken_pipe(self) -> None:
        """Leave quietly, as a shell expects of a process whose output nobody reads."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE)


stdout = _Console(markup=False)
"""Results: tables, paths, the next command to type; a name with brackets is a name and no markup."""

stderr = _Console(stderr=True)
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
    try:
        with _told_by_libraries(), signals.watched(last=True):
            code = _outcome(_with_version(typer.main.get_command(app)))
            if signals.received() is not None:
                clear_interrupted()
    except KeyboardInterrupt:  # a signal that came after the command was done
        code = signals.exit_code()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # told already; Python would try again when it ends, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


class _Lines(logging.Handler):
    """Log records as lines of a command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record on stderr."""
        (warn if record.levelno >= logging.WARNING else note)(record.getMessage())


@contextmanager
def _told_by_libraries() -> Iterator[None]:
    """Show what the packages log, and progress, while a command runs."""
    handler = _Lines()
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    show_with(track)
    try:
        yield
    finally:
        show_with(None)
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _with_version(command: Any) -> Any:
    """A command that knows ``--version``, too, whatever its other options."""

    def show(context: typer.Context, asked: bool) -> None:
        if asked:
            stdout.print(f"{context.info_name} {version()}", highlight=False)
            raise typer.Exit

    option = typer.Option(
        "--version", callback=show, is_eager=True, expose_value=False, help="Show the version and exit."
    )

    def bearer(asked: Annotated[bool, option] = False) -> None:
        """Typer makes parameters of functions only."""

    app = typer.Typer(add_completion=False)
    app.command()(bearer)
    command.params += typer.main.get_command(app).params
    return command


def _outcome(command: Any) -> int:
    """Run a command; say in one line what went wrong. Its exit code."""
    try:
        code = command.main(standalone_mode=False)
        sys.stdout.flush()
    except (UserError, typer.exceptions.TyperException) as error:
        _reraise_if_debugging()
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _ended() or _told(2, message)
    except KeyboardInterrupt:
        return _ended() or _told(130, "interrupted")
    except Exception as error:  # the last resort: the disk's fault or ours
        _reraise_if_debugging()
        return _ended() or _explained(error)
    if code == 130:  # how Typer passes Ctrl-C on
        return _ended() or 130
    return code if isinstance(code, int) else 0


def _explained(error: Exception) -> int:
    """Say in one line what the operating system refused, or else that we are at fault."""
    if fault := find_fault(error):
        return _told(2, fault.line())
    if isinstance(error, typer.Abort) and error.__cause__ is not None:  # what Typer makes of an EOFError
        error = cast(Exception, error.__cause__)
    again = "(a fault of ours: run again with MGLL_DEBUG=1 and report it)"
    return _told(1, f"{type(error).__name__}: {error} {again}")


def _ended() -> int:
    """The exit code where a signal has ended the command, which is said; else 0."""
    if signals.received() is None:
        return 0
    return _told(signals.exit_code(), "interrupted")


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


def _told(code: int, message: str) -> int:
    # Progress bars that an error has left open end, so that it has a line of its own.
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    with suppress(OSError):  # where stderr is on a full disk the exit code must do
        stderr.print(f"[red]error:[/red] {escape(one_line(message))}", highlight=False, soft_wrap=True)
    return code
