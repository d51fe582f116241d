"""Behavior shared by all commands: exit codes, one-line errors, progress.

Exit codes: 0 done, 2 user error (or a disk error), 1 a bug in this project, 130 and 143 ended by Ctrl-C and SIGTERM.
"""

import atexit
import gc
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from mgll_encoder.common import signals
from mgll_encoder.common.errors import UserError, one_line
from mgll_encoder.common.faults import find_fault
from mgll_encoder.common.files import clear_interrupted
from mgll_encoder.common.lazy import version
from mgll_encoder.common.library_errors import broken_installation
from mgll_encoder.common.old_options import accept_old_options
from mgll_encoder.common.progress import show_with
from mgll_encoder.common.spelling import Spelling
from mgll_encoder.common.taken import refuse_taken_outputs
from mgll_encoder.common.typing_errors import asked_help, typing_error

T = TypeVar("T")

PACKAGES = ("mgll_encoder", "mllm_adapters", "eval_mcq")
"""Whose log records are shown."""


class _Console(Console):
    """A console whose output may be closed early (``| head``)."""

    def on_broken_pipe(self) -> None:
        """Exit without an error message, as a shell expects when the pipe is closed."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE)


stdout = _Console(markup=False)
"""Results: tables, paths, the next command to type. Brackets in names are printed as they are, not as markup."""

stderr = _Console(stderr=True)
"""Progress, warnings and errors."""

_UNCUT = 10_000
"""More characters than a sentence has."""

_WIDEST = 100
"""Columns of help texts on a terminal that has them; longer lines are hard to read."""

_spelling = Spelling()
"""The options of the running program."""


class Commands(TyperGroup):
    """A group of commands whose help shows the first sentence of every command whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands; Typer would cut the sentences at the width of a line."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(_UNCUT)) for name, one in found if one and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def new_app(help_text: str, cls: type[TyperGroup] = Commands) -> typer.Typer:
    """Create a Typer application with this project's settings; ``cls`` is the class of its group of commands.

    Help is plain text: the panels that Typer draws with Rich cut the names of options at 80 columns.
    """
    return typer.Typer(
        help=help_text,
        cls=cls,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDEST},
        rich_markup_mode=None,
    )


def run(app: typer.Typer, name: str | None = None) -> NoReturn:
    """Run a command and exit with its exit code.

    Args:
        app: The command.
        name: Its name, as in `OLD_OPTIONS`; that of the running program if not given.

    Set ``MGLL_DEBUG=1`` to see tracebacks instead of one-line errors.
    """
    _quieten_libraries()
    # Skip the garbage collection of torch's objects at exit; it takes half a second.
    atexit.register(gc.freeze)
    try:
        with _showing_logs(), signals.watched(last=True):
            code = _outcome(prepared(app, name), name)
            if signals.received() is not None:
                clear_interrupted()
    except KeyboardInterrupt:  # a signal that arrived after the command had finished
        code = signals.exit_code()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # already reported; Python would flush again at exit and return 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def prepared(app: typer.Typer, name: str | None) -> Any:
    """Return the command of an application, with ``--version``, old names of options, and a check of ``--out``."""
    command = _with_version(typer.main.get_command(app))
    if name is not None:
        accept_old_options(command, name, warn)
    refuse_taken_outputs(command)
    _spelling.learn(command)
    return command


class _Lines(logging.Handler):
    """Print log records as lines of a command's output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record on stderr."""
        (warn if record.levelno >= logging.WARNING else note)(record.getMessage())


@contextmanager
def _showing_logs() -> Iterator[None]:
    """Show the packages' log records and progress while a command runs."""
    handler = _Lines()
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if stderr.is_terminal:
        show_with(_bar, _counting_bar, _byte_bar)
    try:
        yield
    finally:
        show_with(None)
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _with_version(command: Any) -> Any:
    """Add ``--version`` to a command."""

    def show(context: typer.Context, asked: bool) -> None:
        if asked:
            stdout.print(f"{context.command_path} {version()}", highlight=False)
            raise typer.Exit

    option = typer.Option(
        "--version", callback=show, is_eager=True, expose_value=False, help="Show the version and exit."
    )

    def bearer(asked: Annotated[bool, option] = False) -> None:
        """Carry the option: Typer creates parameters only from functions."""

    app = typer.Typer(add_completion=False)
    app.command()(bearer)
    command.params += typer.main.get_command(app).params
    return command


def _outcome(command: Any, name: str | None) -> int:
    """Run a command, report an error in one line, and return the exit code."""
    try:
        code = command.main(standalone_mode=False, prog_name=name)
        sys.stdout.flush()
    except (UserError, TyperException) as error:
        if (text := asked_help(error)) is not None:
            typer.echo(text, err=True)
            return _ended() or 2
        _reraise_if_debugging()
        message = typing_error(error) if isinstance(error, TyperException) else str(error)
        return _ended() or _fail(2, message)
    except KeyboardInterrupt:
        return _ended() or _fail(130, "interrupted")
    except Exception as error:  # anything else is a disk error or a bug
        _reraise_if_debugging()
        return _ended() or _fail_unexpected(error)
    if code == 130:  # how Typer reports Ctrl-C
        return _ended() or 130
    return code if isinstance(code, int) else 0


def _fail_unexpected(error: Exception) -> int:
    """Report in one line an error of the operating system or the installation, or else a bug in this project."""
    if fault := find_fault(error):
        return _fail(2, fault.line())
    if broken := broken_installation(error):
        return _fail(2, str(broken))
    if isinstance(error, typer.Abort) and error.__cause__ is not None:  # Typer turns EOFError into Abort
        error = cast(Exception, error.__cause__)
    again = "(this is a bug: run again with MGLL_DEBUG=1 and report it)"
    return _fail(1, f"{type(error).__name__}: {error} {again}")


def _ended() -> int:
    """Report a signal that ended the command and return its exit code; return 0 if there was none."""
    if signals.received() is None:
        return 0
    return _fail(signals.exit_code(), "interrupted")


@contextmanager
def importing() -> Iterator[None]:
    """Disable garbage collection during a block of imports: importing torch takes a fifth less time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def spelled(message: str) -> str:
    """Replace arguments by options in a message of the library; see `mgll_encoder.common.spelling`."""
    return _spelling.spell(message)


def say(line: str) -> None:
    """Print a line of the result on stdout as it is: neither wrapped nor highlighted."""
    stdout.print(line, highlight=False, soft_wrap=True)


def next_line(template: str, *values: str | Path) -> str:
    """Return the line that names the command to type next; ``values`` are quoted as a shell needs them."""
    return f"Next: {template.format(*(shlex.quote(str(value)) for value in values))}"


def warn(message: str) -> None:
    """Print a warning on stderr."""
    stderr.print(f"[yellow]warning:[/yellow] {escape(spelled(message))}", highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Print on stderr what is being done."""
    stderr.print(escape(spelled(message)), highlight=False, soft_wrap=True)


def _bar(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate under a progress bar on stderr."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Steps per second."""
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def _counting_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with speed and time left on stderr; yield a function that advances it."""
    with _advanced(description, total, MofNCompleteColumn(), _Speed()) as advance:
        yield advance


@contextmanager
def _byte_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Likewise for bytes."""
    with _advanced(description, total, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def _advanced(description: str, total: int, *figures: ProgressColumn) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), *figures, TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)


def _quieten_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # when it is imported, it resets the level set below
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # DeepSpeed sets its own level when transformers' Trainer imports it; a filter is kept.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="PIL")  # mgll_encoder.common.images reports what matters


def _reraise_if_debugging() -> None:
    if os.environ.get("MGLL_DEBUG"):
        raise


def _fail(code: int, message: str) -> int:
    # Close progress bars that are still open, so that the error starts on a new line.
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    with suppress(OSError):  # if stderr is on a full disk, the exit code must suffice
        stderr.print(
            f"[red]error:[/red] {escape(spelled(one_line(message)))}", highlight=False, soft_wrap=True
        )
    return code
