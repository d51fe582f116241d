"""What the training commands do once their options are read: plan, show, train, say what comes next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mgll_encoder.common import cli
from mgll_encoder.common.deepspeed import read_deepspeed
from mgll_encoder.common.errors import unknown_name
from mgll_encoder.common.extras import require
from mgll_encoder.common.files import regular_file
from mllm_adapters.locate import check_checkpoint, check_image_folder

if TYPE_CHECKING:
    from mllm_adapters.training.engine import Job, Outcome
    from mllm_adapters.training.recipe_file import Resolved

RECIPE = "recipe.yaml"
"""The recipe with every key written out, in the output folder."""


@dataclass(frozen=True)
class Request:
    """A training as it was typed.

    Attributes:
        command: Name of the command.
        model: Checkpoint folder.
        data: Training files.
        images: What the image paths of conversations are relative to.
        out: Folder to write.
        recipe: Recipe file.
        overrides: ``key=value``.
        flags: Field -> value, None where it was not typed.
        defaults: Field -> default of this command.
        stages: The stages that the command is for.
        control: Unswapped checkpoint to train in the same way.
        merge: Whether adapters are written merged, too.
        resume: Continue an interrupted run.
        force: Replace what is there.
        dry_run: Stop before training.
        estimate: Print what it takes of memory, and do nothing else.
    """

    command: str
    model: Path
    data: Sequence[Path]
    images: Path | None
    out: Path
    recipe: Path | None = None
    overrides: Sequence[str] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[str] = ()
    control: Path | None = None
    merge: bool = False
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    estimate: bool = False


def launch(request: Request) -> None:
    """Train as requested.

    Raises:
        UserError: see `resolve`, `plan_training`, `train` and `check_control`.
    """
    _check_early(request)
    from mllm_adapters.training.arms import control_folder, finished
    from mllm_adapters.training.plan import rank
    from mllm_adapters.training.recipe_file import resolve

    if rank():  # of several processes only the first one shows what is going on; errors are heard from all
        cli.stdout.quiet = True
    resolved = resolve(request.recipe, request.overrides, request.flags, **request.defaults)
    if resolved.recipe.stage not in request.stages:
        raise unknown_name(f"stage for {request.command}", resolved.recipe.stage, request.stages)
    if request.estimate:
        _estimate(request.model, resolved)
        return
    if resolved.recipe.qlora:
        require("qlora", "--qlora")
    arms = [request]
    if request.control:
        arms.append(replace(request, model=request.control, out=control_folder(request.out)))
    todo = [arm for arm in arms if not (request.resume and finished(arm.out, arm.model))]
    for arm in arms:
        if arm not in todo:
            cli.note(f"{arm.out} is finished")
    _check(request, resolved, todo)
    for arm in todo:
        _train(arm, request, resolved)
        if request.dry_run:
            return


def _check_early(request: Request) -> None:
    """Refuse missing packages and paths before torch is imported."""
    if request.flags.get("qlora"):
        require("qlora", "--qlora")
    if deepspeed := request.flags.get("deepspeed"):
        read_deepspeed(deepspeed)
    for model in filter(None, (request.model, request.control)):
        check_checkpoint(model)
    for file in request.data:
        regular_file(file, "data file")
    if request.images:
        check_image_folder(request.images)
    if request.recipe:
        regular_file(request.recipe, "recipe")


def _estimate(model: Path, resolved: "Resolved") -> None:
    from mllm_adapters.training.memory import estimates
    from mllm_adapters.training.plan import check_source

    recipe = resolved.recipe
    table = Table(
        title=f"Memory per device in GB: stage {recipe.stage}, "
        f"{recipe.batch_size} examples of {recipe.max_length} tokens",
        title_justify="left",
    )
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "device", "host")
    for heading in ("", *parts[:-2], "all", "host's"):
        table.add_column(heading, justify="right" if heading else "left")
    for place, found in estimates(check_source(model).config, recipe, resolved.options).items():
        table.add_row(place, *(f"{getattr(found, part) / 1e9:.2f}" for part in parts))
    cli.stdout.print(table)
    cli.stdout.print("Not in it: the CUDA context (about 0.5 GB), buffers of collectives, fragmentation.")


def _check(request: Request, resolved: "Resolved", todo: Sequence[Request]) -> None:
    """All that can be refused before anything is loaded, for every arm."""
    from mgll_encoder.resuming import last_checkpoint
    from mllm_adapters.training.arms import check_control
    from mllm_adapters.training.checkpoints import work_folder
    from mllm_adapters.training.engine import check_launcher, check_run

    for arm in todo:
        # A control that has not begun is no reason to refuse to go on.
        begun = last_checkpoint(work_folder(arm.out)) is not None
        resume = request.resume and (arm is request or begun)
        check_run(arm.out, resolved.recipe, resolved.options, resume=resume, force=arm.force, merge=arm.merge)
    if not request.dry_run:
        check_launcher(resolved.options)
    if request.control:
        check_control(request.model, request.control, request.data, request.images, resolved.recipe)


def _train(arm: Request, request: Request, resolved: "Resolved") -> None:
    """One arm, from the plan to what comes next."""
    from mgll_encoder.resuming import last_checkpoint
    from mllm_adapters.training.arms import record_of
    from mllm_adapters.training.checkpoints import work_folder
    from mllm_adapters.training.engine import Extras, plan_training, train
    from mllm_adapters.training.watch import find_evaluator

    evaluation = resolved.evaluation
    evaluate = find_evaluator(evaluation.eval_bench) if evaluation.eval_bench else None
    job = plan_training(arm.model, arm.data, arm.images, resolved.recipe)
    _show(job)
    if arm.dry_run:
        cli.stdout.print(f"Recipe:\n{resolved.as_yaml()}", markup=False, highlight=False)
        return
    work = work_folder(arm.out)
    cli.note(f"checkpoints and logs: {work} (if interrupted: the same command with --resume)")
    extras = Extras(
        evaluate=evaluate,
        eval_every=evaluation.eval_every,
        merge=arm.merge,
        record={"command": arm.command, **record_of(request.out, request.model, request.control)},
        files={RECIPE: resolved.as_yaml()},
    )
    resume = arm.resume and last_checkpoint(work) is not None
    outcome = train(job, arm.out, resolved.options, resume=resume, force=arm.force, extras=extras)
    _tell(outcome)


def _show(job: "Job") -> None:
    """Print what trains and on what."""
    from mllm_adapters.training.plan import ranks
    from mllm_adapters.training.stages import STAGES, describe

    table = Table(title=f"Stage: {job.stage.stage} ({STAGES[job.stage.stage].about})")
    for heading in ("component", "trains", "frozen"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    for part in job.stage.components:
        table.add_row(part.component, f"{part.trainable:,}", f"{part.frozen:,}")
    cli.stdout.print(table)
    share = f"{job.stage.trainable:,} of {job.stage.total:,} parameters ({job.stage.share:.2%})"
    cli.stdout.print(f"Training {share}; the rest is frozen")
    whole = [name for name in job.stage.names if ".lora_" not in name]
    for what, names in (("Trained whole", whole), ("Adapters on", job.stage.adapted)):
        if names:
            cli.stdout.print(f"{what}: {', '.join(describe(names))}", soft_wrap=True, highlight=False)
    counts, recipe = job.counts, job.recipe
    left_out = f"{counts.text_only} without image, {counts.too_long} longer than {job.max_length} tokens"
    left_out += f", {counts.damaged} with unreadable images" if counts.damaged else ""
    left_out += f", {counts.other_split} of other splits" if counts.other_split else ""
    cli.stdout.print(f"Rows: {counts.kept} of {counts.rows} (left out: {left_out}); {counts.images} images")
    devices = f" x {ranks()} processes" if ranks() > 1 else ""
    batch = f"batch {recipe.batch_size} x {recipe.gradient_accumulation}{devices}"
    cli.stdout.print(f"Steps: {job.steps} ({batch}), precision {job.precision}")


def _tell(outcome: "Outcome") -> None:
    """Print what has become of it."""
    first, last = outcome.losses[0][1], outcome.losses[-1][1]
    cli.stdout.print(f"Loss: {first:.4f} at step {outcome.losses[0][0]}, {last:.4f} at step {outcome.steps}")
    if outcome.best_step is not None:
        score = dict(outcome.scores)[outcome.best_step]
        cli.stdout.print(f"Best score: {score:.4f} at step {outcome.best_step}, whose weights are written")
    cli.stdout.print(f"Written: {outcome.out}", soft_wrap=True)
    if outcome.merged:
        cli.stdout.print(f"Merged: {outcome.merged}", soft_wrap=True)
    model = outcome.merged or outcome.out
    cli.stdout.print(f"Next: eval-mcq run --model {model} --bench bench.jsonl", soft_wrap=True)
