"""``swap-encoder``: put a vision tower into a multimodal LLM."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from mgll_encoder.common import cli
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.spec import Activation
from mllm_adapters.cli.delta import compose, extract, progress_bar
from mllm_adapters.cli.undo import restore, verify

if TYPE_CHECKING:
    from mllm_adapters.checkpoint import Checkpoint
    from mllm_adapters.contract import Family, Plan, Target
    from mllm_adapters.planning import TowerDtype

app = cli.new_app(
    """Put an MGLL vision tower into a multimodal LLM.

    Example: [bold]swap-encoder --mllm llava-med --encoder mgll-fundus.pt[/bold]
    """
)

MLLM_HELP = "Checkpoint folder, hub id, or family name (which stands for its published checkpoint)."
OUT_HELP = "Folder to write."
PART_HELP = "Where a part of the checkpoint lies that is not found beside it: NAME=PATH. Repeatable."
FORCE_HELP = "Replace the output folder if it exists."
DRY_RUN_HELP = "Print the plan and stop."
JSON_HELP = "Print the plan as JSON."
COPY_HELP = "Copy unchanged files instead of hard-linking them (sharing blocks where the file system can)."


@app.callback(invoke_without_command=True)
def swap(
    context: typer.Context,
    mllm: Annotated[str | None, typer.Option(help=MLLM_HELP)] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="Tower: MGLL checkpoint, open_clip file or folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} Default: <mllm>-<encoder>.")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Input side in pixels. Default: what keeps the host's number of tokens."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="gelu or quick_gelu, for towers that do not say it themselves.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=PART_HELP)] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="What to write: own, or llava (loads with stock transformers) where that is exact."
        ),
    ] = "own",
    dtype: Annotated[
        str | None,
        typer.Option(help="What to write the tower in: float32, float16 or bfloat16. Default: the host's."),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help=COPY_HELP)] = False,
    delta: Annotated[
        bool,
        typer.Option("--delta", help="Write only what does not follow from the checkpoint: a small folder."),
    ] = False,
    reference_tower: Annotated[
        bool,
        typer.Option(
            "--reference-tower", help="With --delta: name the tower by its hashes, do not store it."
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result to the hub as OWNER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: not for everyone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Put an MGLL vision tower into a multimodal LLM.

    The language model is never loaded: shards that hold nothing of the tower are hard-linked, the others are
    rewritten tensor by tensor.

    Example: swap-encoder --mllm llava-med --encoder mgll-fundus.pt
    """
    if context.invoked_subcommand is not None:
        return
    if mllm is None or encoder is None:
        missing = "--mllm" if mllm is None else "--encoder"
        raise UserError(f"{missing} is missing: swap-encoder --mllm llava-med --encoder mgll-fundus.pt")

    if private and push_to_hub is None:
        raise UserError("--private goes with --push-to-hub OWNER/NAME")
    if reference_tower and not delta:
        raise UserError("--reference-tower goes with --delta")
    if copy and delta:
        raise UserError("--copy goes without --delta: a delta holds no file of the checkpoint")

    from mgll_encoder import inspect_tower
    from mllm_adapters.apply import apply_plan
    from mllm_adapters.delta import stored_names
    from mllm_adapters.delta_files import write_delta
    from mllm_adapters.hub import check_push, push
    from mllm_adapters.parts import resolve
    from mllm_adapters.planning import with_tower_dtype
    from mllm_adapters.registry import open_checkpoint

    if push_to_hub is not None and not dry_run:
        check_push(push_to_hub)
    tower_dtype = _dtype(dtype)
    tower = inspect_tower(encoder, activation=cast(Activation | None, activation))
    checkpoint, family, _ = open_checkpoint(resolve(mllm), parts_of(part))
    plan = family.plan(checkpoint, tower, image_size, _target(layout, family))
    if tower_dtype is not None:
        plan = with_tower_dtype(plan, tower_dtype)
    for warning in tower.warnings:
        cli.warn(warning)
    named = Path(os.path.abspath(encoder))  # noqa: PTH100 - "." and ".." have no names of their own
    tower_name = named.name if encoder.is_dir() else named.stem
    swapped_name = f"{Path(os.path.abspath(mllm)).name}-{tower_name}"  # noqa: PTH100
    target = out or Path(f"{swapped_name}-delta" if delta else swapped_name)
    held = stored_names(plan.steps, reference_tower=reference_tower) if delta else None

    def write(progress: Callable[[int], None]) -> None:
        options: dict[str, Any] = {"force": force, "checked": True, "progress": progress}
        if delta:
            write_delta(plan, family, checkpoint, target, reference_tower=reference_tower, **options)
        else:
            apply_plan(plan, family, checkpoint, target, copy=copy, **options)

    _execute(plan, checkpoint, target, write, held, dry_run=dry_run, as_json=as_json, force=force, copy=copy)
    if not dry_run:
        if push_to_hub is not None:
            _tell(f"Pushed: {push(target, push_to_hub, private=private)}", as_json)
        following = f"retrain-projector --model {target} --data train.json --images images/"
        if delta:
            following = f"swap-encoder compose --mllm {mllm} --delta {target} --out {swapped_name}"
        _tell(f"Next: {following}", as_json)


@app.command()
def convert(
    mllm: Annotated[str, typer.Option(help=MLLM_HELP)],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    part: Annotated[list[str] | None, typer.Option(help=PART_HELP)] = None,
    copy: Annotated[bool, typer.Option("--copy", help=COPY_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Convert a checkpoint from its original layout to the transformers layout, tower and all.

    Example: swap-encoder convert --mllm llava-v1.5-7b --out llava-v1.5-7b-hf
    """
    from mllm_adapters.apply import apply_plan
    from mllm_adapters.parts import resolve
    from mllm_adapters.registry import open_checkpoint

    checkpoint, family, _ = open_checkpoint(resolve(mllm), parts_of(part))
    plan = family.plan(checkpoint)

    def write(progress: Callable[[int], None]) -> None:
        apply_plan(plan, family, checkpoint, out, force=force, copy=copy, checked=True, progress=progress)

    _execute(plan, checkpoint, out, write, dry_run=dry_run, as_json=as_json, force=force, copy=copy)


@app.command()
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the README has it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what is supported: layouts read, tokens per image, readers, how the result loads.

    Example: swap-encoder families
    """
    from mllm_adapters.support import support, support_markdown, support_tables

    if as_json:
        cli.stdout.print_json(data=[row.model_dump() for row in support()])
    elif markdown:
        cli.stdout.print(support_markdown(), soft_wrap=True, markup=False, highlight=False)
    else:
        cli.stdout.print(support_tables())


app.command()(verify)
app.command()(restore)
app.command()(compose)
app.command()(extract)


def main() -> None:
    """Entry point of ``swap-encoder``."""
    cli.run(app)


def parts_of(options: list[str] | None) -> dict[str, Path]:
    """What ``--part NAME=PATH`` says.

    Raises:
        UserError: one is not of this form.
    """
    parts = {}
    for option in options or []:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise UserError(f"--part {option}: expected NAME=PATH, such as --part vision-tower=openai/clip")
        parts[name] = Path(path)
    return parts


def _target(layout: str, family: "Family") -> "Target":
    from mllm_adapters.contract import Target

    if layout not in get_args(Target):
        raise unknown_name("--layout", layout, get_args(Target))
    if layout in family.spec.targets:
        return layout
    if family.spec.not_llava:
        raise UserError(f"--layout {layout}: {family.spec.not_llava}; use --layout own")
    return "own"  # which is a LLaVA


def _dtype(name: str | None) -> "TowerDtype | None":
    from mllm_adapters.planning import TowerDtype

    if name is not None and name not in get_args(TowerDtype):
        raise unknown_name("--dtype", name, get_args(TowerDtype))
    return cast("TowerDtype | None", name)


def _execute(
    plan: "Plan",
    checkpoint: "Checkpoint",
    out: Path,
    write: Callable[[Callable[[int], None]], None],
    held: Collection[str] | None = None,
    *,
    dry_run: bool,
    as_json: bool,
    force: bool,
    copy: bool,
) -> None:
    """Show a plan and, unless that is all, write it; of a delta, ``held`` are the tensors that it holds."""
    from mllm_adapters.apply import check_output, inputs
    from mllm_adapters.loading import check_complete
    from mllm_adapters.report import plan_table, total_bytes

    check_output(out, force, inputs(plan))
    check_complete(plan)
    if as_json:
        cli.stdout.print_json(plan.model_dump_json())
    else:
        cli.stdout.print(plan_table(plan, checkpoint, copy=copy, held=held))
    for note in plan.notes:
        cli.note(f"note: {note}")
    if dry_run:
        return
    with progress_bar("writing", total_bytes(plan, held)) as advance:
        write(advance)
    _tell(f"Written: {out}", as_json)


def _tell(line: str, as_json: bool) -> None:
    console = cli.stderr if as_json else cli.stdout  # with --json, standard output is JSON and nothing else
    console.print(line, markup=False, soft_wrap=True)
