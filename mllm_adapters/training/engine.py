"""Trains a multimodal LLM with transformers' Trainer: one engine for all stages; the results are ordinary folders."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from mgll_encoder.common.deepspeed import read_deepspeed
from mgll_encoder.common.errors import InvalidArgumentError, TrainingError, UserError
from mgll_encoder.common.faults import writing
from mgll_encoder.common.files import check_free
from mgll_encoder.common.progress import counter
from mgll_encoder.common.resuming import (
    ResumeError,
    check_states,
    last_checkpoint,
    only_run,
    saving_on_signal,
)
from mgll_encoder.common.trained_on import TRAINED_ON, trainings_of, trainings_text
from mllm_adapters.core.provenance import named
from mllm_adapters.core.stages import STAGES
from mllm_adapters.data.dataset import AnswerCollator, ConversationDataset
from mllm_adapters.feature_cache.cache import Cached, cache_features
from mllm_adapters.feature_cache.precompute import ComputeSettings
from mllm_adapters.swap.replace_tensors import replace_tensors
from mllm_adapters.training.callbacks import BestKeeper, DivergedError, Evaluator, Watchdog, loss_plot
from mllm_adapters.training.dummy_images import FillingCollator, filler_row
from mllm_adapters.training.lora import merged, write_adapter
from mllm_adapters.training.prepare import Job, ranks
from mllm_adapters.training.recipe import Recipe, RunOptions
from mllm_adapters.training.trainer import WEIGHTS, FrozenTrainer
from mllm_adapters.training.work_folder import check_work_folder, claim, work_folder

RECORD = "training.json"
"""Record of the training, in the output folder."""

PLOT = "loss.png"
"""The loss over the steps, in the output folder."""

OUT_OF_MEMORY = (
    "out of memory at `batch_size={batch}`: halve it and double `gradient_accumulation`, or add "
    "`gradient_checkpointing=True`; if that is not enough, use `deepspeed` with ZeRO-3, or `qlora=True`; "
    "`estimate_memory()` estimates each"
)


@dataclass(frozen=True)
class Extras:
    """Additional tasks of a training run.

    Attributes:
        evaluate: Scores the model, to keep the best weights.
        eval_every: Steps between two scores.
        merge: Whether a stage with adapters also writes ``<out>-merged``, a full checkpoint.
        record: Additional fields of the record.
        files: Additional files of the output, name -> text.
    """

    evaluate: Evaluator | None = None
    eval_every: int = 200
    merge: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
        out: The checkpoint or adapter folder written.
        work: Folder of Trainer checkpoints and logs.
        steps: Optimizer steps done.
        losses: (step, mean loss since the previous entry).
        scores: (step, score) of the evaluations.
        best_step: The step whose weights were written.
        merged: The full checkpoint next to an adapter folder, if there is one.
    """

    out: Path
    work: Path
    steps: int
    losses: tuple[tuple[int, float], ...]
    scores: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    merged: Path | None = None


def merged_folder(out: Path) -> Path:
    """Return the folder of the full checkpoint of an adapter folder."""
    return out.with_name(f"{out.name}-merged")


def check_run(
    out: Path, recipe: Recipe, options: RunOptions, *, resume: bool, force: bool, merge: bool = False
) -> None:
    """Check, before anything is loaded, that a run may write to ``out`` and that its settings are consistent.

    Raises:
        UserError: see `check_output` and `check_states`; DeepSpeed's configuration cannot be read; 4-bit
            weights would be sharded; or there would be nothing to merge.
    """
    check_work_folder(out, resume=resume, force=force)
    if resume and (saved := last_checkpoint(work_folder(out))):
        check_states(saved, weights=WEIGHTS, ranks=ranks(), deepspeed=bool(options.deepspeed))
    if merge and not STAGES[recipe.stage].lora:
        raise InvalidArgumentError(
            f"`merge=True`: stage '{recipe.stage}' has no adapters to merge: leave it out"
        )
    if merge:
        check_free(merged_folder(out), force)
    if options.deepspeed:
        zero = read_deepspeed(options.deepspeed).zero_optimization
        if recipe.qlora and zero.stage == 3:
            raise InvalidArgumentError(
                f"deepspeed: {options.deepspeed}: ZeRO-3 cannot shard 4-bit weights: use ZeRO-2 with `qlora=True`"
            )


def check_launcher(options: RunOptions) -> None:
    """Check that a launcher has set up DeepSpeed's processes; otherwise DeepSpeed would use MPI.

    Raises:
        UserError: the process was not started by a launcher.
    """
    if options.deepspeed and "RANK" not in os.environ:
        raise InvalidArgumentError(
            f"deepspeed: {options.deepspeed} needs a launcher: start with torchrun, deepspeed "
            "--no_local_rank or accelerate launch --multi_gpu, or add deepspeed=null to train on one device"
        )


def train(
    job: Job,
    out: Path,
    options: RunOptions,
    *,
    resume: bool = False,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    extras: Extras | None = None,
) -> Outcome:
    """Train, then write ``out``: a checkpoint like the source, or an adapter folder; with a record and a loss plot.

    Trainer checkpoints and logs go to ``<out>.training``, which is kept. A resumed run gives the same
    weights as an uninterrupted one. Under torchrun, deepspeed or accelerate every process calls this, and
    the first one writes.

    Raises:
        UserError: see `check_run` and `check_launcher`; or the run to resume is another one, another process
            trains into ``out``, an image is damaged, memory or the disk is full, or the loss is NaN or
            infinite.
        Terminated: a signal was received, and a checkpoint has been saved (``options.save_on_signal``).
    """
    extras = extras or Extras()
    check_run(out, job.recipe, options, resume=resume, force=force, merge=extras.merge)
    check_launcher(options)
    work = work_folder(out)
    began = time.monotonic()
    arguments = _arguments(job, options, work)
    identity = {**job.identity, **(extras.evaluate.identity if extras.evaluate else {})}
    with only_run(out) if arguments.process_index == 0 else contextlib.nullcontext():
        with arguments.main_process_first(local=False):
            if arguments.process_index == 0:
                claim(work, identity, resume)
        cached = _cached(job, options, arguments) if options.feature_cache else None
        trainer = _trainer(job, arguments, cached, [Watchdog(work), *callbacks])
        keeper = None
        if extras.evaluate:
            seeing = cached.cast.towers_back if cached else contextlib.nullcontext
            keeper = BestKeeper(trainer, job.processor, extras.evaluate, extras.eval_every, work, seeing)
            trainer.add_callback(keeper)
        _run(trainer, job, work, resume, save_on_signal=options.save_on_signal)
        values = trainer.trained_values()
        losses = tuple((int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row)
        best = keeper.best if keeper else None
        outcome = Outcome(
            out, work, trainer.state.global_step, losses,
            scores=best.scores if best else (), best_step=best.step if best else None,
            merged=merged_folder(out) if extras.merge else None,
        )  # fmt: skip
        if trainer.is_world_process_zero():
            seconds = time.monotonic() - began
            record = {**_record(job, identity, outcome, seconds), **extras.record}
            training = job.training(record["command"]).with_curves(outcome.losses, outcome.scores)
            trained_on = [*trainings_of(job.source), training]
            files: dict[str, str | bytes] = {
                **extras.files,
                TRAINED_ON: trainings_text(trained_on),
                RECORD: json.dumps(record, indent=2) + "\n",
                PLOT: loss_plot(outcome.losses, outcome.scores),
            }
            _write(job, outcome, keeper.values() if keeper else values, files, force)
    if options.deepspeed:
        _forget_deepspeed()
    return outcome


def _cached(job: Job, options: RunOptions, arguments: TrainingArguments) -> Cached | None:
    """Replace the tower by its cached features, if possible."""
    place = ComputeSettings(
        device=arguments.device,
        precision=job.precision,
        dtype=options.feature_precision,
        rank=arguments.process_index,
        ranks=arguments.world_size,
        workers=options.workers,
    )
    if not getattr(job.model, "is_quantized", False):  # quantized models are already on their device
        job.model.to(place.device)
    return cache_features(job.model, job.examples, job.corpus, job.processor, place)


def _trainer(
    job: Job, arguments: TrainingArguments, cached: Cached | None, callbacks: list[TrainerCallback]
) -> FrozenTrainer:
    dataset: Any = ConversationDataset(job.examples, job.corpus.folder, job.processor)
    collator: Any = AnswerCollator(job.processor.tokenizer.pad_token_id or 0)
    if cached:
        dataset, collator = cached.dataset, cached.collator
    if job.examples.text_only and (row := filler_row(dataset, job.examples)):
        collator = FillingCollator(collator, row)
    return FrozenTrainer(
        model=job.model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=callbacks,
    )


def _run(trainer: FrozenTrainer, job: Job, work: Path, resume: bool, *, save_on_signal: bool) -> None:
    """Train, and report errors in one line."""
    begin = str(last_checkpoint(work)) if resume else None
    try:
        with writing(work), saving_on_signal(trainer, wanted=save_on_signal):
            trainer.train(resume_from_checkpoint=begin)
    except torch.OutOfMemoryError:
        raise TrainingError(OUT_OF_MEMORY.format(batch=job.recipe.batch_size)) from None
    except (DivergedError, ResumeError):
        raise
    except UserError as error:
        # A data loader's worker wraps the message in a traceback.
        cause = str(error).rpartition(f"{type(error).__name__}: ")[2]
        saved = last_checkpoint(work)
        hint = f"; after fixing this, `resume=True` continues from {saved.name}" if saved else ""
        raise TrainingError(f"{cause} (training stopped at step {trainer.state.global_step}{hint})") from None
    except (ValueError, ValidationError) as error:
        if trainer.is_deepspeed_enabled and trainer.state.global_step == 0:
            raise InvalidArgumentError(f"DeepSpeed refuses its configuration: {error}") from error
        raise


def _forget_deepspeed() -> None:
    """Clear DeepSpeed's global configuration: otherwise the next model would be loaded in shards."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()


def _write(
    job: Job, outcome: Outcome, values: Mapping[str, Tensor], files: Mapping[str, str | bytes], force: bool
) -> None:
    """Write the result of the stage: a full checkpoint, or an adapter folder, or both if requested."""
    adapted = job.stage.adapted
    if adapted:
        write_adapter(
            job.source,
            outcome.out,
            job.model,
            values,
            adapted,
            job.recipe.lora,
            force=force,
            extra_files=files,
        )
    full = outcome.merged if adapted else outcome.out
    if full:
        source = job.checkpoint
        tensors = merged(values, job.recipe.lora, adapted, lambda name: source.read(job.disk_names[name]))
        stored = {job.disk_names[name]: value for name, value in tensors.items()}
        replace_tensors(source, full, stored, force=force, extra_files=files)


def _arguments(job: Job, options: RunOptions, work: Path) -> TrainingArguments:
    recipe = job.recipe
    settings: dict[str, Any] = {
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "activation_checkpointing": options.gradient_checkpointing,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": 0.0,
        "seed": recipe.seed,
        "use_cpu": job.use_cpu,
        "logging_steps": options.logging_steps,
        "logging_first_step": True,
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "report_to": list(options.report_to) or "none",
        "disable_tqdm": counter() is None,
        "dataloader_num_workers": options.workers,
        "dataloader_persistent_workers": options.workers > 0,
        "dataloader_pin_memory": torch.cuda.is_available() and not job.use_cpu,
        # Layers after the one that is read, and the text branches of Q-Formers, get no gradients.
        "ddp_find_unused_parameters": True,
        "deepspeed": str(options.deepspeed) if options.deepspeed else None,
    }
    fixed: dict[str, Any] = {
        "output_dir": str(work),
        "run_name": work.stem,
        "bf16": job.precision == "bfloat16",
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
    }
    try:
        return TrainingArguments(**{**settings, **recipe.arguments, **fixed})
    except (ValueError, ImportError) as error:
        raise InvalidArgumentError(f"transformers refuses the recipe: {error}") from error


def _record(job: Job, identity: Mapping[str, Any], outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "command": "retrain-projector",
        "source": named(job.source, {}).name,
        "data": [file.name for file in job.corpus.files],
        "images": job.corpus.folder.name,
        "splits": job.corpus.splits(),
        **identity,
        "rows": asdict(job.counts),
        "trained": list(job.disk_names.values()),
        "adapted": list(job.stage.adapted),
        "trained_parameters": job.stage.trainable,
        "all_parameters": job.stage.total,
        "steps": outcome.steps,
        "final_loss": outcome.losses[-1][1],
        "losses": outcome.losses,
        "scores": outcome.scores,
        "best_step": outcome.best_step,
        "seconds": round(seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
