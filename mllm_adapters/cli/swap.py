"""``swap-encoder``: put a vision tower into a multimodal LLM."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgll_encoder.common import cli
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common.devices import AUTO, Precision
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.extras import CORE, needs
from mllm_adapters import api
from mllm_adapters.cli.common_options import COPY_HELP, FORCE_HELP, OUT_HELP, parts_of
from mllm_adapters.cli.delta import compose, extract
from mllm_adapters.cli.export import export
from mllm_adapters.cli.restore import restore, verify

if TYPE_CHECKING:
    from mllm_adapters.swap.planned import Fitting, SwapPlan

app = cli.new_app(
    """Put an MGLL vision tower into a multimodal LLM.

    Example: swap-encoder --mllm llava-med --encoder mgll-fundus.pt
    """
)

MLLM_HELP = "Checkpoint folder, hub id, or family name (which stands for its published checkpoint)."
ENCODER_HELP = (
    "Tower: MGLL checkpoint, open_clip file, folder, or hub id such as openai/clip-vit-large-patch14."
)
PART_HELP = "Path of a part of the checkpoint that is not found next to it: NAME=PATH. Repeatable."
DRY_RUN_HELP = "Print the plan and stop."
JSON_HELP = "Print the plan as JSON."


@app.callback(invoke_without_command=True)
@needs(CORE)
def swap(
    context: typer.Context,
    mllm: Annotated[str | None, typer.Option(help=MLLM_HELP)] = None,
    encoder: Annotated[Path | None, typer.Option(help=ENCODER_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help=f"{OUT_HELP} Default: <mllm>-<encoder>.")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Image size in pixels. Default: keep the host's number of tokens."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Visual tokens per image or tile, instead of --image-size: choose the size that gives "
            "them, such as 256 for MGLL at its own 224 px.",
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="gelu or quick_gelu, for towers that do not record it.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="raw or ema, for towers that also contain a moving average of the weights."),
    ] = None,
    parts: Annotated[list[str] | None, typer.Option("--part", help=PART_HELP)] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Output layout: own, or llava (loads with stock transformers) for families that support it."
        ),
    ] = "own",
    images: Annotated[
        Path | None,
        typer.Option(
            "--align",
            help="Fit the connector on these images in closed form: folder, manifest or benchmark; labels "
            "are ignored.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--align-samples", min=1, help="Maximum number of images for --align. Default: 500."),
    ] = None,
    device: compute.Device = AUTO,
    precision: Annotated[
        Precision, typer.Option(help="Of the written tower. " + compute.HELP.format(auto="auto (the host's)"))
    ] = AUTO,
    copy: Annotated[bool, typer.Option("--copy", help=COPY_HELP)] = False,
    delta_only: Annotated[
        bool,
        typer.Option("--delta-only", help="Write a delta: only the tensors that differ from the base."),
    ] = False,
    reference_tower: Annotated[
        bool,
        typer.Option(
            "--reference-tower",
            help="Refer to the tower by its hashes instead of storing it (with --delta-only).",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result to the hub as OWNER/NAME.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private (with --push-to-hub).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Put an MGLL vision tower into a multimodal LLM.

    The language model is never loaded: shards without tensors of the tower are hard-linked, the others are
    rewritten tensor by tensor.

    Example: swap-encoder --mllm llava-med --encoder mgll-fundus.pt

    At another image size: swap-encoder --mllm llava-med --encoder openai/clip-vit-base-patch32 --tokens 49
    """
    if context.invoked_subcommand is not None:
        return
    if mllm is None or encoder is None:
        missing = "--mllm" if mllm is None else "--encoder"
        raise InvalidArgumentError(
            f"{missing} is missing: swap-encoder --mllm llava-med --encoder mgll-fundus.pt"
        )

    if private and push_to_hub is None:
        raise InvalidArgumentError("--private requires --push-to-hub OWNER/NAME")
    if reference_tower and not delta_only:
        raise InvalidArgumentError("--reference-tower requires --delta-only")
    if copy and delta_only:
        raise InvalidArgumentError(
            "--copy cannot be combined with --delta-only: a delta contains no file of the checkpoint"
        )

    fitting = _fitting(images, samples, device)
    with cli.importing():
        if push_to_hub is not None and not dry_run:
            from mllm_adapters.swap.hub import check_push

            check_push(push_to_hub)
        plan = api.plan_swap(
            mllm, encoder, image_size=image_size, tokens=tokens, layout=layout, activation=activation,
            weights=weights, precision=precision, parts=parts_of(parts),
        )  # fmt: skip
    for warning in plan.warnings:
        cli.warn(warning)
    target = out or Path(f"{plan.name}-delta" if delta_only else plan.name)
    if fitting:
        plan = plan.to_fit(fitting)
    held = plan.held_by_delta(reference_tower=reference_tower) if delta_only else None
    _show(plan, target, held, as_json=as_json, force=force, copy=copy)
    if dry_run:
        return
    if fitting:
        plan = _fitted(plan, as_json)
    if delta_only:
        plan.write_delta(target, reference_tower=reference_tower, force=force)
    else:
        plan.write(target, force=force, copy=copy)
    _tell(f"Written: {target}", as_json)
    if push_to_hub is not None:
        from mllm_adapters.swap.hub import push

        _tell(f"Pushed: {push(target, push_to_hub, private=private)}", as_json)
    if delta_only:
        following = cli.next_line(
            "swap-encoder compose --mllm {} --delta {} --out {}", mllm, target, plan.name
        )
    else:
        rows = _training_rows(images)
        following = cli.next_line("retrain-projector --model {} --data {} --images {}", target, *rows)
    _tell(following, as_json)


@app.command()
def convert(
    mllm: Annotated[str, typer.Option(help=MLLM_HELP)],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    parts: Annotated[list[str] | None, typer.Option("--part", help=PART_HELP)] = None,
    copy: Annotated[bool, typer.Option("--copy", help=COPY_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Convert a checkpoint, including its tower, from its original layout to the transformers layout.

    Example: swap-encoder convert --mllm llava-v1.5-7b --out llava-v1.5-7b-hf
    """
    plan = api.plan_conversion(mllm, parts=parts_of(parts))
    _show(plan, out, as_json=as_json, force=force, copy=copy)
    if dry_run:
        return
    plan.write(out, force=force, copy=copy)
    _tell(f"Written: {out}", as_json)


@app.command()
def families(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/families.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrix as JSON.")] = False,
) -> None:
    """Show the supported families: layouts, tokens per image, connectors, how the result loads.

    Example: swap-encoder families
    """
    from mllm_adapters.core.support_matrix import support_markdown, support_tables

    if as_json:
        cli.stdout.print_json(data=[row.model_dump() for row in api.list_families()])
    elif markdown:
        cli.say(support_markdown(cli.spelled))
    else:
        cli.stdout.print(support_tables(cli.spelled))


@app.command()
@needs(CORE)
def example(
    out: Annotated[Path, typer.Option(help=OUT_HELP)] = Path("example"),
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Write a LLaVA, a tower, images and training rows of toy size with random weights, to try a first swap.

    Example: swap-encoder example
    """
    cli.note("writing a toy model, a tower and images ...")  # the imports below take the time
    from mllm_adapters.examples.untrained import write_example

    write_example(out, force=force)
    cli.stdout.print(
        f"Written: {out} (a LLaVA and a tower of toy size with random weights, images, train.json)"
    )
    made = (out / name for name in ("llava", "tower", "photographs", "swapped"))
    cli.say(cli.next_line("swap-encoder --mllm {} --encoder {} --align {} --out {}", *made))


app.command()(verify)
app.command()(restore)
app.command()(compose)
app.command()(extract)
app.command()(export)


def main() -> None:
    """Entry point of ``swap-encoder``."""
    cli.run(app, "swap-encoder")


def _show(
    plan: "SwapPlan",
    out: Path,
    held: Collection[str] | None = None,
    *,
    as_json: bool,
    force: bool,
    copy: bool,
) -> None:
    """Check a plan and print it; for a delta, ``held`` are its tensors."""
    plan.check(out, force=force)
    if as_json:
        cli.stdout.print_json(plan.plan.model_dump_json())
    else:
        cli.stdout.print(plan.table(copy=copy, held=held))
    for note in plan.notes:
        cli.note(f"note: {note}")


def _fitting(images: Path | None, samples: int | None, device: str) -> "Fitting | None":
    if images is not None:
        return api.fitting(images, samples, device)
    if samples is not None:
        raise InvalidArgumentError(f"--align-samples {samples} requires --align IMAGES")
    if device != AUTO:
        raise InvalidArgumentError(f"--device {device} requires --align IMAGES: nothing else is computed")
    return None


def _fitted(plan: "SwapPlan", as_json: bool) -> "SwapPlan":
    """Fit the connector and print how well it fits."""
    from mllm_adapters.swap.report import alignment_table

    plan = plan.fit()
    if plan.alignment is not None:
        (cli.stderr if as_json else cli.stdout).print(alignment_table(plan.alignment))
        for warning in plan.alignment.warnings():
            cli.warn(warning)
    return plan


def _training_rows(images: Path | None) -> tuple[str | Path, str | Path]:
    """Return rows and images for the next command: those next to the images of ``--align``, or names to replace."""
    rows = images and images.with_name("train.json")
    return (rows, images) if images and rows and rows.is_file() else ("train.json", "images/")


def _tell(line: str, as_json: bool) -> None:
    console = cli.stderr if as_json else cli.stdout  # with --json, standard output contains only JSON
    console.print(line, markup=False, soft_wrap=True)
