"""Runs the training commands after their options are parsed: plan, show, train, print the next command."""

from dataclasses import replace
from typing import TYPE_CHECKING

from mgll_encoder.common import cli
from mgll_encoder.common.terminal_table import TerminalTable
from mllm_adapters.training.runs import TrainingRequest, Watcher, carry_out, settings_of
from mllm_adapters.training.runs import estimate as estimate_memory

if TYPE_CHECKING:
    from mllm_adapters.training.engine import Outcome
    from mllm_adapters.training.prepare import Job
    from mllm_adapters.training.recipe_file import Resolved


def launch(request: TrainingRequest, *, estimate: bool = False) -> None:
    """Train as requested and print the outcome, or print the memory estimate.

    Raises:
        UserError: see `settings_of` and `carry_out`.
    """
    # An estimate reads no data.
    resolved = settings_of(replace(request, data=(), images=None) if estimate else request)
    from mllm_adapters.training.prepare import rank

    if rank():  # only rank 0 shows progress; all ranks report errors
        cli.stdout.quiet = True
    if estimate:
        _print_estimate(request, resolved)
        return

    def planned(job: "Job") -> None:
        _show(job)
        if request.dry_run:
            cli.stdout.print(f"Recipe:\n{resolved.as_yaml()}", markup=False, highlight=False)

    watcher = Watcher(
        finished=lambda out: cli.note(f"{out} is finished"),
        planned=planned,
        begins=lambda work: cli.note(
            f"checkpoints and logs: {work} (if interrupted: the same command with --resume)"
        ),
        ended=_tell,
    )
    carry_out(request, resolved, watcher)


def _print_estimate(request: TrainingRequest, resolved: "Resolved") -> None:
    recipe = resolved.recipe
    table = TerminalTable(
        f"Memory per device in GB: stage {recipe.stage}, "
        f"{recipe.batch_size} examples of {recipe.max_length} tokens"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "device", "host")
    table.add_words("").add_figures(*parts[:-2], "all", "host's")
    for place, found in estimate_memory(request, resolved).items():
        table.add_row(place, *(f"{getattr(found, part) / 1e9:.2f}" for part in parts))
    cli.stdout.print(table)
    cli.stdout.print("Not included: the CUDA context (about 0.5 GB), buffers of collectives, fragmentation.")


def _show(job: "Job") -> None:
    """Print the trained parameters and the data."""
    from mllm_adapters.core.stages import STAGES, describe
    from mllm_adapters.training.prepare import ranks

    table = TerminalTable(f"Stage: {job.stage.stage} ({STAGES[job.stage.stage].about})")
    table.add_words("component").add_figures("trains", "frozen")
    for part in job.stage.components:
        table.add_row(part.component, f"{part.trainable:,}", f"{part.frozen:,}")
    cli.stdout.print(table)
    share = f"{job.stage.trainable:,} of {job.stage.total:,} parameters ({job.stage.share:.2%})"
    cli.stdout.print(f"Training {share}; the rest is frozen")
    whole = [name for name in job.stage.names if ".lora_" not in name]
    for what, names in (("Trained whole", whole), ("Adapters on", job.stage.adapted)):
        if names:
            cli.say(f"{what}: {', '.join(describe(names))}")
    counts, recipe = job.counts, job.recipe
    left_out = f"{counts.text_only} without image, {counts.too_long} longer than {job.max_length} tokens"
    left_out += f", {counts.damaged} with unreadable images" if counts.damaged else ""
    left_out += f", {counts.other_split} of other splits" if counts.other_split else ""
    cli.stdout.print(f"Rows: {counts.kept} of {counts.rows} (left out: {left_out}); {counts.images} images")
    devices = f" x {ranks()} processes" if ranks() > 1 else ""
    batch = f"batch {recipe.batch_size} x {recipe.gradient_accumulation}{devices}"
    cli.stdout.print(f"Steps: {job.steps} ({batch}), precision {job.precision}")


def _tell(outcome: "Outcome") -> None:
    """Print the outcome."""
    first, last = outcome.losses[0][1], outcome.losses[-1][1]
    cli.stdout.print(f"Loss: {first:.4f} at step {outcome.losses[0][0]}, {last:.4f} at step {outcome.steps}")
    if outcome.best_step is not None:
        score = dict(outcome.scores)[outcome.best_step]
        cli.stdout.print(f"Best score: {score:.4f} at step {outcome.best_step}, whose weights are written")
    cli.say(f"Written: {outcome.out}")
    if outcome.merged:
        cli.say(f"Merged: {outcome.merged}")
    model = outcome.merged or outcome.out
    cli.say(cli.next_line("eval-mcq run --model {} --bench bench.jsonl", model))
