"""``swap-encoder compose`` and ``swap-encoder extract``: a whole checkpoint out of a delta, a delta out of one."""

from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder.common import cli
from mllm_adapters.checkpoints.locate import check_delta, check_swapped
from mllm_adapters.cli.common_options import COPY_HELP, FORCE_HELP, OUT_HELP, parts_of, progress_bar
from mllm_adapters.core.hub_resolve import check_name, resolve

MLLM_HELP = "The base: checkpoint folder, hub id, or family name."
PART_HELP = "Where a part of the base lies that is not beside it: NAME=PATH. Repeatable."


def compose(
    delta: Annotated[Path, typer.Option(help="What swap-encoder --delta or extract wrote.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    mllm: Annotated[
        str | None, typer.Option(help=f"{MLLM_HELP} Default: looked for by name and hash beside the delta.")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="The tower of a delta with --reference-tower (file, folder or hub id). Default: looked for by name "
            "and hash."
        ),
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=PART_HELP)] = None,
    copy: Annotated[bool, typer.Option("--copy", help=COPY_HELP)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Write the whole checkpoint that a delta and its base make up.

    It equals the one that the swap would have written without --delta.

    Example: swap-encoder compose --mllm llava-med --delta llava-med-mgll-delta --out llava-med-mgll
    """
    check_delta(delta)
    if mllm:
        check_name(mllm)
    from mllm_adapters.loading.delta import ENCODER_PART, open_delta
    from mllm_adapters.swap import delta_files
    from mllm_adapters.swap.apply import check_output
    from mllm_adapters.swap.report import total_bytes

    check_output(out, force, [delta])
    parts = parts_of(part) | ({ENCODER_PART: encoder} if encoder else {})
    opened = open_delta(delta, resolve(mllm) if mllm else None, parts)
    with progress_bar("writing", total_bytes(opened.plan)) as advance:
        delta_files.compose(opened, out, force=force, copy=copy, progress=advance)
    cli.stdout.print(f"Written: {out}", markup=False, soft_wrap=True)
    cli.stdout.print(f"Next: swap-encoder verify {out}", markup=False, soft_wrap=True)


def extract(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint that swap-encoder or, after it, retrain-projector wrote.")
    ],
    mllm: Annotated[str, typer.Option(help=MLLM_HELP)],
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} Default: <folder>-delta.")] = None,
    reference_tower: Annotated[
        bool,
        typer.Option(
            "--reference-tower",
            help="Name the tower by the encoder's hashes, do not store it (unless it was trained).",
        ),
    ] = False,
    part: Annotated[list[str] | None, typer.Option(help=PART_HELP)] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Write of a swapped checkpoint, retrained or not, only what does not follow from its base.

    Everything else is held against the base first: what differs there cannot be a delta.

    Example: swap-encoder extract llava-med-mgll-aligned --mllm llava-med --out run-7-delta
    """
    check_swapped(folder)
    check_name(mllm)
    from mllm_adapters.core.provenance import read_record
    from mllm_adapters.core.streaming import nbytes
    from mllm_adapters.swap import delta_files
    from mllm_adapters.swap.apply import check_output

    target = out or Path(f"{folder.absolute().name}-delta")
    check_output(target, force, [folder])
    with progress_bar("comparing", sum(map(nbytes, read_record(folder).tensors))) as advance:
        delta_files.extract(
            folder,
            resolve(mllm),
            target,
            parts=parts_of(part),
            reference_tower=reference_tower,
            force=force,
            progress=advance,
        )
    cli.stdout.print(f"Written: {target}", markup=False, soft_wrap=True)
    following = f"swap-encoder compose --mllm {mllm} --delta {target} --out {folder.absolute().name}-again"
    cli.stdout.print(f"Next: {following}", markup=False, soft_wrap=True)
