"""``swap-encoder compose`` and ``swap-encoder extract``: merge a delta into its base, extract a delta."""

from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder.common import cli
from mllm_adapters import api
from mllm_adapters.cli.common_options import COPY_HELP, FORCE_HELP, OUT_HELP, parts_of

MLLM_HELP = "The base: checkpoint folder, hub id, or family name."
PART_HELP = "Path of a part of the base that is not next to it: NAME=PATH. Repeatable."


def compose(
    delta: Annotated[Path, typer.Option(help="Delta folder of swap-encoder --delta-only or extract.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    mllm: Annotated[
        str | None,
        typer.Option(help=f"{MLLM_HELP} Default: searched for by name and hash next to the delta."),
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="The tower of a delta with --reference-tower (file, folder or hub id). Default: searched for by name "
            "and hash."
        ),
    ] = None,
    parts: Annotated[list[str] | None, typer.Option("--part", help=PART_HELP)] = None,
    copy: Annotated[bool, typer.Option("--copy", help=COPY_HELP)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Merge a delta into its base and write the whole checkpoint.

    It equals the result of the swap without --delta-only.

    Example: swap-encoder compose --mllm llava-med --delta llava-med-mgll-delta --out llava-med-mgll
    """
    api.compose(
        delta,
        out,
        mllm=mllm,
        encoder=encoder,
        parts=parts_of(parts),
        copy=copy,
        force=force,
    )
    cli.say(f"Written: {out}")
    cli.say(cli.next_line("swap-encoder verify {}", out))


def extract(
    folder: Annotated[Path, typer.Argument(help="Checkpoint of swap-encoder, retrained or not.")],
    mllm: Annotated[str, typer.Option(help=MLLM_HELP)],
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} Default: <folder>-delta.")] = None,
    reference_tower: Annotated[
        bool,
        typer.Option(
            "--reference-tower",
            help="Refer to the tower by the encoder's hashes instead of storing it (unless it was trained).",
        ),
    ] = False,
    parts: Annotated[list[str] | None, typer.Option("--part", help=PART_HELP)] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Extract a delta from a swapped checkpoint, retrained or not.

    All other tensors are compared with the base; a difference there is refused.

    Example: swap-encoder extract llava-med-mgll-aligned --mllm llava-med --out run-7-delta
    """
    target = out or Path(f"{folder.absolute().name}-delta")
    api.extract(
        folder,
        mllm,
        target,
        parts=parts_of(parts),
        reference_tower=reference_tower,
        force=force,
    )
    cli.say(f"Written: {target}")
    composed = f"{folder.absolute().name}-again"
    cli.say(cli.next_line("swap-encoder compose --mllm {} --delta {} --out {}", mllm, target, composed))
