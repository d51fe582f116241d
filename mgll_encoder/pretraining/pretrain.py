"""Pretraining an MGLL tower, or its plain CLIP control, with transformers' Trainer."""

import json
import logging
import math
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import SAFE_WEIGHTS_NAME

from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    TrainingError,
)
from mgll_encoder.common.faults import writing
from mgll_encoder.common.files import check_free, sha256, write_text
from mgll_encoder.common.hub import at_hand
from mgll_encoder.common.picture_bytes import picture_digests
from mgll_encoder.common.resuming import (
    ResumeError,
    check_states,
    clear_unfinished,
    forget,
    last_checkpoint,
    only_run,
    saving_on_signal,
)
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.texts import read_json
from mgll_encoder.common.trained_on import TOWER, Training, trainings_of
from mgll_encoder.data.batches import ManifestCollator, ManifestImages, SplitRows, plan_splits
from mgll_encoder.data.manifest import read_header, split_of
from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES, TwoTowers
from mgll_encoder.pretraining.initialization import OPENAI, starting_towers
from mgll_encoder.pretraining.options import PretrainOptions, Select
from mgll_encoder.pretraining.trainer import TowerTrainer, Validation
from mgll_encoder.pretraining.training_args import kept_epoch, training_arguments
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.save import save_tower

_logger = logging.getLogger(__name__)

RUN_FILE = "run.json"

_SAMPLED = 2000
"""Rows whose texts are checked for truncation before training."""


def checkpoint_folder(out: Path) -> Path:
    """Return the folder of a run's checkpoints, used until its tower is written."""
    return out.absolute().parent / f".{out.name}.training"


@dataclass(frozen=True)
class PretrainResult:
    """Summary of a training run.

    Attributes:
        out: The tower's folder.
        images: Images trained on.
        steps: Optimizer steps.
        losses: Mean training loss of each epoch.
        temperature: The learned τ.
        skipped: Skipped rows, by reason.
        kept: The epoch whose weights were saved, from 1.
        validation: Its metrics on the ``val`` rows; empty if there are none.
        first: Whether this is the main process, under torchrun.
    """

    out: Path
    images: int
    steps: int
    losses: list[float]
    temperature: float
    skipped: Skipped
    kept: int
    validation: dict[str, float]
    first: bool


def pretrain(
    manifest: Path,
    out: Path,
    options: PretrainOptions,
    *,
    images: Path | None = None,
    workers: int = 2,
    strict: bool = False,
    resume: bool = False,
    force: bool = False,
    save_on_signal: bool = False,
    device: str = AUTO,
) -> PretrainResult:
    """Train on the manifest's ``train`` rows and write the tower's folder.

    Checkpoints are in ``.<out>.training`` next to ``out`` until the tower is written. A killed run resumes from the
    last complete epoch, with the same result as an uninterrupted run.

    Args:
        manifest: The manifest.
        out: Folder of the tower.
        options: Settings that determine the result.
        images: The image folder; None for the one named in the manifest.
        workers: Processes that open images; 0 for none.
        strict: Stop at the first row that would be skipped.
        resume: Continue from the checkpoints of a killed run with the same options and manifest.
        force: Replace ``out``.
        save_on_signal: Save a checkpoint before ending on SIGTERM or Ctrl-C.
        device: See `mgll_encoder.common.devices.train_on`.

    Raises:
        UserError: invalid input (see ``plan_rows``, ``starting_towers``), ``out`` exists, another process trains into
            it, there is nothing to resume, or the disk is full.
        Terminated: a signal arrived, and a checkpoint was saved.
    """
    check_free(out, force)
    skipped = Skipped(strict)
    splits = ("train",) if options.select == "last" else ("train", "val")
    plans = plan_splits(manifest, images, options.granularities, splits, options.loss == "clip", skipped)
    plan = plans["train"]
    if len(plan) < 2:
        reasons = "; ".join(skipped.lines()) or "no other row has split 'train'"
        raise BadDataError(
            f"manifest {manifest} has {len(plan)} train images: contrastive training needs at least 2; {reasons}"
        )
    arguments = training_arguments(checkpoint_folder(out), options, len(plan), workers, device)
    set_seed(options.seed)
    model = starting_towers(
        TOWER_SIZES[options.tower_size],
        None if options.init is None else str(options.init),
        options.activation,
        options.text_tower,
        plan,
        options.weights,
        options.freeze_text,
        options.init_weights,
        options.image_size,
        options.pooling,
        options.train_blocks,
    )
    if arguments.process_index == 0:
        _report_truncation(model.text, plan)
    validation = _validation(plans.get("val"), options.select, model, workers)
    if validation is not None:
        arguments.eval_strategy = IntervalStrategy.EPOCH
        arguments.load_best_model_at_end = True
        arguments.metric_for_best_model, arguments.greater_is_better = "eval_mAP", True
    identity = _identity(manifest, options, plan)
    with only_run(out) if arguments.process_index == 0 else nullcontext():
        trainer = TowerTrainer(
            model,
            skipped,
            validation,
            options.tower_learning_rate,
            args=arguments,
            train_dataset=ManifestImages(plan, model.spec, options.seed, flip=options.flip),
            data_collator=ManifestCollator(model.text.tokenize),
        )
        trainings = _trainings(plan, options.init) if arguments.process_index == 0 else ()
        steps = _run(trainer, checkpoint_folder(out), identity, resume=resume, save_on_signal=save_on_signal)
        more = {
            "split": split_of(read_header(manifest).built),
            "steps": steps,
            "validation_images": len(validation) if validation else 0,
        }
        return _write(trainer, out, {**identity, **more}, trainings, force)


def _run(
    trainer: TowerTrainer, folder: Path, identity: dict[str, Any], *, resume: bool, save_on_signal: bool
) -> int:
    """Train, and return the number of steps."""
    last = _prepare_checkpoints(folder, identity, resume, trainer.args)
    with writing(folder), saving_on_signal(trainer, wanted=save_on_signal):
        outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.gather_skipped()
    if (logged := len(trainer.epoch_losses)) != trainer.args.num_train_epochs:
        raise ResumeError(
            f"cannot resume from {last}: its trainer_state.json lacks the loss of an epoch (it has {logged} of "
            f"{trainer.args.num_train_epochs:.0f}): remove {folder} to start over"
        )
    if not all(map(math.isfinite, (outcome.training_loss, *trainer.epoch_losses))):
        raise TrainingError(
            f"the loss is not finite after {outcome.global_step} steps: use a smaller `learning_rate`"
        )
    return outcome.global_step


def _write(
    trainer: TowerTrainer, out: Path, about: dict[str, Any], trainings: tuple[Training, ...], force: bool
) -> PretrainResult:
    """Write the tower, and return the summary."""
    kept, figures = kept_epoch(trainer)
    model, losses = trainer.towers, trainer.epoch_losses
    temperature = model.text_tower().temperature
    if trainer.is_world_process_zero():
        record = {
            **about,
            "epoch_losses": [round(loss, 6) for loss in losses],
            "final_loss": round(losses[-1], 6),
            "kept_epoch": kept,
            "validation": {name: round(value, 6) for name, value in figures.items()},
            "temperature": round(temperature, 6),
            **trainer.skipped.record(),
            "processes": trainer.args.world_size,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        *before, own = trainings
        curve = tuple(
            (round(about["steps"] * n / len(losses)), loss) for n, loss in enumerate(losses, start=1)
        )
        trained_on = (*before, own.with_curves(curve))
        save_tower(model.tower(), out, force, {"pretraining": record}, model.text_tower(), trained_on)
        shutil.rmtree(checkpoint_folder(out))
    return PretrainResult(
        out,
        about["images"],
        about["steps"],
        losses,
        temperature,
        trainer.skipped,
        kept,
        figures,
        trainer.is_world_process_zero(),
    )


def _trainings(plan: SplitRows, init: Path | str | None) -> tuple[Training, ...]:
    """Return the training records of the tower: those of its initial weights, and that of this run."""
    before = () if init is None or init == OPENAI else trainings_of(at_hand(init))
    digests = picture_digests(plan.images, "Hashing the training images").values()
    return (*before, Training.of((TOWER,), "pretrain", digests, [split_of(read_header(plan.path).built)]))


def _report_truncation(text: TextTower, plan: SplitRows) -> None:
    """Log how many texts are longer than the text tower's context, in a sample of rows."""
    distinct = sorted(set(plan.sample(_SAMPLED).all_texts()))
    lengths = text.lengths(distinct)
    if many := sum(length > text.context for length in lengths):
        longest = max(range(len(distinct)), key=lengths.__getitem__)
        _logger.info(
            f"{many} of {len(distinct)} texts have more tokens than the text tower's context of {text.context} and are "
            f"truncated. The longest has {lengths[longest]}: '{distinct[longest][:80]}'. To avoid this, use shorter "
            "texts, fewer granularities, or a `text_tower` with a longer context"
        )


def _validation(plan: SplitRows | None, select: Select, model: TwoTowers, workers: int) -> Validation | None:
    """Return the validation data for choosing an epoch, if the manifest has it and it is wanted."""
    if plan is None:
        return None
    validation = Validation(plan, model.spec, workers)
    if validation.informative:
        return validation
    found = f"manifest {plan.path} has {len(plan)} usable val images, and no text that is true of only some of them"
    if select == "best":
        raise InvalidArgumentError(
            f"`select=best`: {found}; set some aside with `build_fundus(val_share=0.1)`, or leave `select` out"
        )
    if len(plan):
        _logger.info(f"{found}: the last epoch is kept")
    return None


def _identity(manifest: Path, options: PretrainOptions, plan: SplitRows) -> dict[str, Any]:
    """Return the settings that must be equal to resume a run."""
    settings = asdict(options) | {
        "alphas": asdict(options.weights),
        "granularities": list(plan.granularities),
    }
    for name in ("init", "deepspeed"):
        settings[name] = None if settings[name] is None else str(settings[name])
    return {
        "manifest": manifest.name,
        "manifest_sha256": sha256(manifest),
        "images": len(plan),
        "texts": plan.texts_per_granularity,
        **settings,
    }


def _prepare_checkpoints(
    folder: Path, identity: dict[str, Any], resume: bool, arguments: TrainingArguments
) -> Path | None:
    """Create an empty folder with the run's identity, or find the checkpoint to resume from."""
    last = _last_checkpoint(folder, identity) if resume else None
    if last:
        check_states(
            last, weights=SAFE_WEIGHTS_NAME, ranks=arguments.world_size, deepspeed=bool(arguments.deepspeed)
        )
    if arguments.process_index == 0 and resume:
        clear_unfinished(folder)
    elif arguments.process_index == 0:
        forget(folder, RUN_FILE)
        write_text(folder / RUN_FILE, json.dumps(identity, indent=2))
    return last


def _last_checkpoint(folder: Path, identity: dict[str, Any]) -> Path:
    """Return the newest complete checkpoint of the same run."""
    last = last_checkpoint(folder)
    if last is None or not (folder / RUN_FILE).is_file():
        raise NotFoundError(
            f"nothing to resume: {folder} has no complete checkpoint; run again without `resume`"
        )
    before = read_json(folder / RUN_FILE)
    changed = [name for name in identity if before.get(name) != identity[name]]
    if changed:
        name = changed[0]
        raise MismatchError(
            f"cannot resume: '{name}' was {before.get(name)} in the interrupted run and is {identity[name]} now; "
            "give the same options, or run again without `resume`"
        )
    return last
