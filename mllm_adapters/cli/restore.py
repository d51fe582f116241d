"""``swap-encoder verify`` and ``swap-encoder restore``: check a swapped checkpoint, undo a swap."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mgll_encoder.common import cli
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import InvalidArgumentError, MismatchError
from mgll_encoder.common.terminal_table import TerminalTable
from mllm_adapters import api
from mllm_adapters.checkpoints.locate import check_swapped
from mllm_adapters.cli.common_options import FORCE_HELP, parts_of

MARKS = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text("–")}
"""Passed, failed, not checked."""


def verify(
    folder: Annotated[Path, typer.Argument(help="Checkpoint written by swap-encoder.")],
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="The new tower (file, folder or hub id). Default: searched for by name and hash next to the "
            "folder."
        ),
    ] = None,
    mllm: Annotated[
        str | None,
        typer.Option(help="The original checkpoint (folder, hub id or family name). Default: likewise."),
    ] = None,
    device: compute.Device = AUTO,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check that a swapped checkpoint is unchanged (files, tensors, tower), and that its output depends on images.

    The exit code is 2 if a check fails. A dash marks a check that could not be made, with the reason.

    Example: swap-encoder verify llava-med-mgll-fundus --encoder mgll-fundus.pt
    """
    from dataclasses import asdict

    checks = api.verify(folder, encoder=encoder, mllm=mllm, device=device, quick=quick)
    if as_json:
        cli.stdout.print_json(
            data=[asdict(check) | {"detail": cli.spelled(check.detail)} for check in checks]
        )
    else:
        table = TerminalTable().add_words("", "check", "what was found")
        for check in checks:
            table.add_row(MARKS[check.passed], check.name, cli.spelled(check.detail))
        cli.stdout.print(table)
    if failed := [check for check in checks if check.passed is False]:
        found = "; ".join(f"{check.name} ({check.detail})" for check in failed)
        raise MismatchError(f"{folder}: {len(failed)} of {len(checks)} checks failed: {found}")


def restore(
    folder: Annotated[Path, typer.Argument(help="Checkpoint written by swap-encoder.")],
    mllm: Annotated[
        str | None,
        typer.Option(help="The original checkpoint (folder or hub id): restore its tower and connector."),
    ] = None,
    to_encoder: Annotated[
        bool, typer.Option("--to-encoder", help="Write only the tower, as an ordinary tower folder.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: <folder>-restored, or <folder>-encoder.")
    ] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part", help="Path of a part of the original that is not next to it: NAME=PATH. Repeatable."
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy unchanged files instead of hard-linking them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Undo a swap: restore the original tower and connector, or extract the new tower.

    Everything that the swap did not change is copied from the folder, bit by bit.

    Example: swap-encoder restore llava-med-mgll-fundus --mllm llava-med --out llava-med-again
    """
    if (mllm is None) == (not to_encoder):
        raise InvalidArgumentError("pass either --mllm MLLM or --to-encoder: swap-encoder restore --help")
    if to_encoder and (parts or copy):
        raise InvalidArgumentError(
            "--part and --copy go with --mllm: --to-encoder reads nothing of the original"
        )
    name = folder.absolute().name
    target = out or Path(f"{name}-{'encoder' if to_encoder else 'restored'}")

    given = parts_of(parts)
    check_swapped(folder)
    following = cli.next_line("mgll-encoder inspect {}", target)
    if mllm is not None:
        cli.note(f"Restoring {folder} from {mllm} ...")
        run = f"runs/{target.name}"
        following = cli.next_line("eval-mcq run --model {} --bench test.jsonl --out {}", target, run)
    api.restore(folder, target, mllm=mllm, parts=given, force=force, copy=copy)
    cli.say(f"Written: {target}")
    cli.say(following)
