"""``swap-encoder``: put a vision tower into a multimodal LLM."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from mgll_encoder.common import cli
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.extras import CORE, needs
from mgll_encoder.locate import check_tower
from mllm_adapters.cli.delta import compose, extract
from mllm_adapters.cli.undo import restore, verify
from mllm_adapters.cli.writing import COPY_HELP, FORCE_HELP, OUT_HELP, parts_of, progress_bar
from mllm_adapters.parts import check_name, resolve

if TYPE_CHECKING:
    from mllm_adapters.alignment.align import Alignment
    from mllm_adapters.checkpoint import Checkpoint
    from mllm_adapters.contract import Family, Plan, Target
    from mllm_adapters.planning import TowerDtype


@dataclass(frozen=True)
class Fitting:
    """The options of ``--align``."""

    images: Path
    samples: int
    device: str


app = cli.new_app(
    """Put an MGLL vision tower into a multimodal LLM.

    Example: [bold]swap-encoder --mllm llava-med --encoder mgll-fundus.pt[/bold]
    """
)

MLLM_HELP = "Checkpoint folder, hub id, or family name (which stands for its published checkpoint)."
PART_HELP = "Where a part of the checkpoint lies that is not found beside it: NAME=PATH. Repeatable."
DRY_RUN_HELP = "Print the plan and stop."
JSON_HELP = "Print the plan as JSON."


@app.callback(invoke_without_command=True)
@needs(CORE)
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
    weights: Annotated[
        str | None,
        typer.Option(help="raw or ema, for towers with a moving average of the weights beside them."),
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=PART_HELP)] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="What to write: own, or llava (loads with stock transformers) where that is exact."
        ),
    ] = "own",
    align: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, without labels: fit what reads the tower to them, in closed form."
        ),
    ] = None,
    align_samples: Annotated[
        int | None, typer.Option(min=1, help="Images of --align to use, at most (default: 500).")
    ] = None,
    align_device: Annotated[
        str | None, typer.Option(help="Where --align runs the towers: cpu, cuda ... (default: auto).")
    ] = None,
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

    check_tower(encoder)
    check_name(mllm)
    with cli.importing():
        from mgll_encoder import inspect_tower
        from mllm_adapters.planning import with_tower_dtype
        from mllm_adapters.registry import open_checkpoint
        from mllm_adapters.swap.apply import apply_plan
        from mllm_adapters.swap.delta import stored_names
        from mllm_adapters.swap.report import total_bytes

    if push_to_hub is not None and not dry_run:
        from mllm_adapters.swap.hub import check_push

        check_push(push_to_hub)
    tower_dtype = _dtype(dtype)
    choices: dict[str, Any] = {"activation": activation, "weights": weights}  # checked there
    tower = inspect_tower(encoder, **choices)
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
    plain, fitting = plan, _fitting(align, align_samples, align_device)
    if fitting:
        plan = _to_be_fitted(plan, family, checkpoint, fitting)
    held = stored_names(plan.steps, reference_tower=reference_tower) if delta else None
    _show(plan, checkpoint, target, held, as_json=as_json, force=force, copy=copy)
    if dry_run:
        return
    alignment = _fit(plain, family, checkpoint, fitting, as_json) if fitting else None
    if alignment:
        plan = alignment.apply_to(plan)
    options: dict[str, Any] = {"force": force, "checked": True}
    if alignment:
        options |= {"fitted": alignment.tensors, "trainings": [alignment.training()]}
    with progress_bar("writing", total_bytes(plan, held)) as advance:
        if delta:
            from mllm_adapters.swap.delta_files import write_delta

            write_delta(
                plan, family, checkpoint, target,
                reference_tower=reference_tower, progress=advance, **options,
            )  # fmt: skip
        else:
            apply_plan(plan, family, checkpoint, target, copy=copy, progress=advance, **options)
    _tell(f"Written: {target}", as_json)
    if push_to_hub is not None:
        from mllm_adapters.swap.hub import push

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
    check_name(mllm)
    from mllm_adapters.registry import open_checkpoint
    from mllm_adapters.swap.apply import apply_plan
    from mllm_adapters.swap.report import total_bytes

    checkpoint, family, _ = open_checkpoint(resolve(mllm), parts_of(part))
    plan = family.plan(checkpoint)
    _show(plan, checkpoint, out, as_json=as_json, force=force, copy=copy)
    if dry_run:
        return
    with progress_bar("writing", total_bytes(plan)) as advance:
        apply_plan(plan, family, checkpoint, out, force=force, copy=copy, checked=True, progress=advance)
    _tell(f"Written: {out}", as_json)


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


def _show(
    plan: "Plan",
    checkpoint: "Checkpoint",
    out: Path,
    held: Collection[str] | None = None,
    *,
    as_json: bool,
    force: bool,
    copy: bool,
) -> None:
    """Check a plan and print it; of a delta, ``held`` are the tensors that it holds."""
    from mllm_adapters.loading import check_complete
    from mllm_adapters.swap.apply import check_output, inputs
    from mllm_adapters.swap.report import plan_table

    check_output(out, force, inputs(plan))
    check_complete(plan)
    if as_json:
        cli.stdout.print_json(plan.model_dump_json())
    else:
        cli.stdout.print(plan_table(plan, checkpoint, copy=copy, held=held))
    for note in plan.notes:
        cli.note(f"note: {note}")


def _fitting(images: Path | None, samples: int | None, device: str | None) -> Fitting | None:
    from mllm_adapters.alignment.align import SAMPLES

    if images is not None:
        return Fitting(images, samples or SAMPLES, device or "auto")
    for option, value in (("--align-samples", samples), ("--align-device", device)):
        if value is not None:
            raise UserError(f"{option} {value} is about the images to align on: give --align IMAGES too")
    return None


def _to_be_fitted(plan: "Plan", family: "Family", checkpoint: "Checkpoint", fitting: Fitting) -> "Plan":
    """The plan with its readers to be fitted; what the options ask for is there."""
    from mllm_adapters.alignment.align import find_device, fitted_plan
    from mllm_adapters.alignment.matching import find_images

    find_images(fitting.images, fitting.samples)
    find_device(fitting.device)
    return fitted_plan(plan, family, checkpoint)


def _fit(
    plan: "Plan", family: "Family", checkpoint: "Checkpoint", fitting: Fitting, as_json: bool
) -> "Alignment":
    """Fit the readers and say how well that went."""
    from mllm_adapters.alignment.align import align
    from mllm_adapters.swap.report import alignment_table

    found = align(
        plan,
        family,
        checkpoint,
        fitting.images,
        samples=fitting.samples,
        device=fitting.device,
        track=cli.track,
    )
    (cli.stderr if as_json else cli.stdout).print(alignment_table(found))
    for warning in found.warnings():
        cli.warn(warning)
    return found


def _tell(line: str, as_json: bool) -> None:
    console = cli.stderr if as_json else cli.stdout  # with --json, standard output is JSON and nothing else
    console.print(line, markup=False, soft_wrap=True)
