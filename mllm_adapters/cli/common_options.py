"""Shared by the commands that write checkpoints: help texts, ``--part``, the progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from mgll_encoder.common import cli
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.progress import Pace

OUT_HELP = "Folder to write."
COPY_HELP = "Copy unchanged files instead of hard-linking them (sharing blocks where the file system can)."
FORCE_HELP = "Replace the output folder if it exists."


def parts_of(options: list[str] | None) -> dict[str, Path]:
    """Parse ``--part NAME=PATH``.

    Raises:
        UserError: an option does not have this form.
    """
    parts = {}
    for option in options or []:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise InvalidArgumentError(
                f"--part {option}: expected NAME=PATH, such as --part vision-tower=openai/clip"
            )
        parts[name] = Path(path)
    return parts


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over bytes on stderr, or tell it in lines; the yielded function advances it."""
    if not cli.stderr.is_terminal:
        yield Pace(description, total, show=decimal).advance
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(description, *columns, console=cli.stderr, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
