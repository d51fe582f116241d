"""``retrain-projector``: teach a model's projector to read its vision tower."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mgll_encoder.common import cli

if TYPE_CHECKING:
    from mllm_adapters.training import Job

app = cli.new_app(
    """Retrain the projector of a multimodal LLM; tower and language model stay as they are.

    Example: [bold]retrain-projector --model llava-med-mgll-fundus --data train.json --images images/[/bold]
    """
)


@app.command()
def retrain(
    model: Annotated[Path, typer.Option(help="Checkpoint folder, as swap-encoder writes it.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="LLaVA conversations (JSON or JSON Lines), a bench of eval-mcq or a manifest of mgll-encoder data; "
            "may be given several times."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that the image paths of conversations start from; the others know theirs."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: <model>-aligned.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples per device and forward pass.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1e-3,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps instead of epochs.")] = None,
    max_length: Annotated[
        int, typer.Option(help="Longest example in tokens, image included; longer ones are left out.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    logging_steps: Annotated[int, typer.Option(help="Steps between two log entries.")] = 10,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints to resume from.")] = 200,
    report_to: Annotated[
        list[str], typer.Option(help="tensorboard, wandb ..., or none; may be given several times.")
    ] = ["tensorboard"],  # noqa: B006 (typer takes no tuple here)
    workers: Annotated[int, typer.Option(help="Processes that open images.")] = 2,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU that has it.")
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third slower.")
    ] = False,
    answer: Annotated[
        str, typer.Option(help="What is learnt of a multiple-choice question: letter, text or both.")
    ] = "letter",
    caption: Annotated[
        str, typer.Option(help="Granularity of a manifest that becomes the caption; all: one after another.")
    ] = "all",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop at images that cannot be read, instead of leaving them out."),
    ] = False,
    feature_cache: Annotated[
        bool, typer.Option(help="Let the frozen tower see every image once, and keep the features.")
    ] = True,
    feature_dtype: Annotated[
        str, typer.Option(help="What they are kept in: float32, bfloat16, float16, or auto: as computed.")
    ] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan and stop.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output folder and forget an interrupted run.")
    ] = False,
) -> None:
    """Retrain the projector of a multimodal LLM; tower and language model stay as they are.

    The result is a checkpoint like the one given, with new projector tensors.

    Logs, and checkpoints to resume from, go to <out>.training.

    Example: retrain-projector --model llava-med-mgll-fundus --data train.json --images images/
    """
    from mllm_adapters.conversations import DataOptions
    from mllm_adapters.training import Recipe, RunOptions, check_output, plan_training, train, work_folder

    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        max_steps=max_steps,
        seed=seed,
        max_length=max_length,
        precision=precision,
    )
    options = RunOptions(
        logging_steps=logging_steps,
        save_steps=save_steps,
        report_to=tuple(name for name in report_to if name != "none"),
        workers=workers,
        gradient_checkpointing=gradient_checkpointing,
        feature_cache=feature_cache,
        feature_dtype=feature_dtype,
    )
    target = out or model.with_name(f"{model.name}-aligned")
    check_output(target, resume=resume, force=force)
    rows = DataOptions(answer=answer, caption=caption, strict=strict, seed=seed)
    job = plan_training(model, data, images, recipe, rows)
    _show(job)
    if dry_run:
        return
    cli.note(f"checkpoints and logs: {work_folder(target)} (if interrupted: the same command with --resume)")
    outcome = train(job, target, options, resume=resume, force=force)
    first, last = outcome.losses[0][1], outcome.losses[-1][1]
    cli.stdout.print(f"Loss: {first:.4f} at step {outcome.losses[0][0]}, {last:.4f} at step {outcome.steps}")
    cli.stdout.print(f"Written: {outcome.out}", soft_wrap=True)
    cli.stdout.print(f"Next: eval-mcq run --model {outcome.out} --bench bench.jsonl", soft_wrap=True)


def main() -> None:
    """Entry point of ``retrain-projector``."""
    cli.run(app)


def _show(job: "Job") -> None:
    """Print what trains and on what."""
    table = Table(title=f"Stage: {job.stage.stage}")
    for heading in ("component", "trains", "frozen"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    for part in job.stage.components:
        table.add_row(part.component, f"{part.trainable:,}", f"{part.frozen:,}")
    cli.stdout.print(table)
    share = f"{job.stage.trainable:,} of {job.stage.total:,} parameters ({job.stage.share:.2%})"
    cli.stdout.print(f"Training {share}; the rest is frozen")
    counts, recipe = job.counts, job.recipe
    left_out = f"{counts.text_only} without image, {counts.too_long} longer than {job.max_length} tokens"
    left_out += f", {counts.damaged} with unreadable images" if counts.damaged else ""
    left_out += f", {counts.other_split} of other splits" if counts.other_split else ""
    cli.stdout.print(f"Rows: {counts.kept} of {counts.rows} (left out: {left_out}); {counts.images} images")
    batch = f"batch {recipe.batch_size} x {recipe.gradient_accumulation}"
    cli.stdout.print(f"Steps: {job.steps} ({batch}), precision {job.precision}")
