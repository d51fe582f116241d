"""Carries out a training request, from its settings to the output folders, including the control arm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.deepspeed import read_deepspeed
from mgll_encoder.common.errors import unknown_name
from mgll_encoder.common.extras import require
from mgll_encoder.common.files import regular_file
from mllm_adapters.checkpoints.locate import check_checkpoint, check_image_folder

if TYPE_CHECKING:
    from mllm_adapters.training.engine import Outcome
    from mllm_adapters.training.memory import MemoryEstimate
    from mllm_adapters.training.prepare import Job
    from mllm_adapters.training.recipe_file import Resolved

RECIPE = "recipe.yaml"
"""The complete recipe, in the output folder."""


@dataclass(frozen=True)
class TrainingRequest:
    """A requested training.

    Attributes:
        command: Name of the command.
        model: Checkpoint folder.
        data: Training files.
        images: Folder that image paths of conversations are relative to.
        out: Folder to write.
        recipe: Recipe file.
        overrides: ``key=value``.
        flags: Field -> value, None if it was not given.
        defaults: Field -> default of this command.
        stages: The stages that the command supports.
        control: Unswapped checkpoint to train in the same way.
        merge: Whether adapters are also written merged.
        resume: Continue an interrupted run.
        force: Replace existing output.
        dry_run: Stop before training.
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


@dataclass(frozen=True)
class Watcher:
    """Callbacks while a request is carried out; by default they do nothing.

    Attributes:
        finished: Called with an output folder that is already complete.
        planned: Called with a prepared training.
        begins: Called with the folder of its checkpoints and logs.
        ended: Called with its outcome.
    """

    finished: Callable[[Path], None] = lambda _: None
    planned: "Callable[[Job], None]" = lambda _: None
    begins: Callable[[Path], None] = lambda _: None
    ended: "Callable[[Outcome], None]" = lambda _: None


def check_early(request: TrainingRequest) -> None:
    """Refuse missing packages and paths before torch is imported.

    Raises:
        UserError: one is missing.
    """
    if request.flags.get("qlora"):
        require("qlora", "`qlora=True`")
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


def settings_of(request: TrainingRequest) -> "Resolved":
    """Combine file, overrides and options to the recipe of a request.

    Raises:
        UserError: see `check_early` and `recipe_file.resolve`; or the stage belongs to another command.
    """
    check_early(request)
    from mllm_adapters.training.recipe_file import resolve

    resolved = resolve(request.recipe, request.overrides, request.flags, **request.defaults)
    if resolved.recipe.stage not in request.stages:
        raise unknown_name(f"stage for {request.command}", resolved.recipe.stage, request.stages)
    return resolved


def estimate(request: TrainingRequest, resolved: "Resolved") -> "dict[str, MemoryEstimate]":
    """Estimate the memory per device of a training, by target machine.

    Raises:
        UserError: the model cannot be read or trained.
    """
    from mllm_adapters.training.memory import estimates
    from mllm_adapters.training.prepare import check_source

    return estimates(check_source(request.model).config, resolved.recipe, resolved.options)


def carry_out(
    request: TrainingRequest, resolved: "Resolved", watcher: Watcher | None = None
) -> "list[Outcome]":
    """Train as requested, including the control.

    Returns:
        The outcome of each trained arm; empty for a dry run.

    Raises:
        UserError: see `prepare_training`, `train` and `check_control`.
    """
    from mllm_adapters.training.control import control_folder, finished

    watcher = watcher or Watcher()
    if resolved.recipe.qlora:
        require("qlora", "`qlora=True`")
    arms = [request]
    if request.control:
        arms.append(replace(request, model=request.control, out=control_folder(request.out)))
    todo = [arm for arm in arms if not (request.resume and finished(arm.out, arm.model))]
    for arm in arms:
        if arm not in todo:
            watcher.finished(arm.out)
    _check(request, resolved, todo)
    outcomes: list[Outcome] = []
    for arm in todo:
        if (outcome := _train(arm, request, resolved, watcher)) is None:
            break
        outcomes.append(outcome)
    return outcomes


def _check(request: TrainingRequest, resolved: "Resolved", todo: Sequence[TrainingRequest]) -> None:
    """Check every arm before anything is loaded."""
    from mgll_encoder.common.resuming import last_checkpoint
    from mllm_adapters.training.control import check_control
    from mllm_adapters.training.engine import check_launcher, check_run
    from mllm_adapters.training.work_folder import work_folder

    for arm in todo:
        # A control that has not started does not prevent resuming.
        begun = last_checkpoint(work_folder(arm.out)) is not None
        resume = request.resume and (arm is request or begun)
        check_run(arm.out, resolved.recipe, resolved.options, resume=resume, force=arm.force, merge=arm.merge)
    if not request.dry_run:
        check_launcher(resolved.options)
    if request.control:
        check_control(request.model, request.control, request.data, request.images, resolved.recipe)


def _train(
    arm: TrainingRequest, request: TrainingRequest, resolved: "Resolved", watcher: Watcher
) -> "Outcome | None":
    """Train one arm; return None for a dry run."""
    from mgll_encoder.common.resuming import last_checkpoint
    from mllm_adapters.training.callbacks import find_evaluator
    from mllm_adapters.training.control import control_record
    from mllm_adapters.training.engine import Extras, train
    from mllm_adapters.training.prepare import prepare_training
    from mllm_adapters.training.work_folder import work_folder

    evaluation = resolved.evaluation
    evaluate = find_evaluator(evaluation.eval_bench) if evaluation.eval_bench else None
    job = prepare_training(arm.model, arm.data, arm.images, resolved.recipe, resolved.options.device)
    watcher.planned(job)
    if arm.dry_run:
        return None
    work = work_folder(arm.out)
    watcher.begins(work)
    extras = Extras(
        evaluate=evaluate,
        eval_every=evaluation.eval_every,
        merge=arm.merge,
        record={"command": arm.command, **control_record(request.out, request.model, request.control)},
        files={RECIPE: resolved.as_yaml()},
    )
    resume = arm.resume and last_checkpoint(work) is not None
    outcome = train(job, arm.out, resolved.options, resume=resume, force=arm.force, extras=extras)
    watcher.ended(outcome)
    return outcome
