"""Retraining the projector: plan it, train it with transformers' Trainer, write an ordinary checkpoint."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import check_free, write_text
from mllm_adapters.configs import build_config
from mllm_adapters.conversations import Corpus, DataOptions, read_corpus
from mllm_adapters.examples import (
    AnswerCollator,
    ConversationDataset,
    DataCounts,
    ExampleTable,
    prepare_examples,
)
from mllm_adapters.feature_cache import Cached, cache_features
from mllm_adapters.feature_fill import DTYPES, Place
from mllm_adapters.loading import load_mllm
from mllm_adapters.registry import open_checkpoint
from mllm_adapters.rewrite import replace_tensors
from mllm_adapters.stages import STAGES, StageReport, apply_stage, components
from mllm_adapters.trainer import DivergedError, FrozenTrainer, Watchdog, last_checkpoint

STAGE = "projector"
RECORD = "training.json"
"""Record of the training, in the output folder."""

PRECISIONS = ("auto", "float32", "bfloat16")

RUN = "run.json"
"""What identifies a run, in its work folder."""


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a retraining.

    Learning rate, schedule, warm-up and length are those of LLaVA's first stage (haotian-liu/LLaVA,
    scripts/v1_5/pretrain.sh), which also averages over 256 examples per step.

    Attributes:
        epochs: Passes over the data.
        batch_size: Examples per device and forward pass.
        gradient_accumulation: Forward passes per step.
        learning_rate: Peak of the cosine schedule.
        max_steps: Stop after so many steps, whatever ``epochs`` says.
        seed: Of the order of the examples.
        max_length: Longest example in tokens, image tokens included.
        warmup_ratio: Share of the steps with a rising learning rate.
        precision: Of the frozen weights and the forward pass: ``float32``, ``bfloat16``, or ``auto`` (bfloat16 on a
            GPU that has it). What trains is always float32.
    """

    epochs: float = 1.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    max_steps: int | None = None
    seed: int = 0
    max_length: int = 2048
    warmup_ratio: float = 0.03
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                field.name not in ("seed", "warmup_ratio", "precision")
                and value is not None
                and not value > 0
            ):
                option = f"--{field.name.replace('_', '-')}"
                raise UserError(f"{option} is {value}: it must be greater than 0")


@dataclass(frozen=True)
class RunOptions:
    """What does not change the result.

    Attributes:
        logging_steps: Steps between two log entries.
        save_steps: Steps between two checkpoints.
        report_to: Where the Trainer logs to: ``tensorboard``, ``wandb`` ...; empty for nowhere.
        workers: Processes that open images; 0 for the training process itself.
        gradient_checkpointing: Compute the language model's activations twice instead of keeping them.
        feature_cache: Let a frozen tower see every image once, and keep what it saw on disk.
        feature_dtype: What it is kept in: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the precision of
            the forward pass, which changes nothing.
    """

    logging_steps: int = 10
    save_steps: int = 200
    report_to: tuple[str, ...] = ("tensorboard",)
    workers: int = 0
    gradient_checkpointing: bool = False
    feature_cache: bool = True
    feature_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.feature_dtype not in ("auto", *DTYPES):
            raise unknown_name("--feature-dtype", self.feature_dtype, ("auto", *DTYPES))
        known = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in known:
                raise unknown_name("--report-to (or its package is not installed)", name, known)


@dataclass(frozen=True)
class Job:
    """A retraining that has been checked and not begun.

    Attributes:
        source: Checkpoint folder of the model.
        corpus: The conversations.
        recipe: See `Recipe`.
        model: The model, frozen but for its projector.
        processor: Its processor.
        stage: What trains.
        examples: What is trained on.
        counts: What became of the rows.
        disk_names: Name of each trained parameter -> its tensor's name in ``source``.
        max_length: Longest example in tokens: the recipe's, or the language model's context where that is shorter.
        precision: Of the forward pass; trained parameters are always float32.
    """

    source: Path
    corpus: Corpus
    recipe: Recipe
    model: Any
    processor: Any
    stage: StageReport
    examples: ExampleTable
    counts: DataCounts
    disk_names: Mapping[str, str]
    max_length: int
    precision: str

    @property
    def steps(self) -> int:
        """Optimizer steps on one device."""
        batches = math.ceil(len(self.examples) / self.recipe.batch_size)
        per_epoch = math.ceil(batches / self.recipe.gradient_accumulation)
        return self.recipe.max_steps or math.ceil(self.recipe.epochs * per_epoch)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be continued: recipe, data, precision, tower and projector."""
        digest = hashlib.sha256((self.source / "config.json").read_bytes())
        parts = components(self.model)
        for name, parameter in self.model.named_parameters():
            if parts[name] != "language_model":
                digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return {
            "precision": self.precision,
            "data_sha256": self.corpus.digest(),
            "data_options": asdict(self.corpus.options),
            "model_sha256": digest.hexdigest(),
            **asdict(self.recipe),
        }


@dataclass(frozen=True)
class Outcome:
    """A finished retraining.

    Attributes:
        out: The checkpoint written.
        work: Folder of Trainer checkpoints and logs.
        steps: Optimizer steps done.
        losses: (step, mean loss since the entry before).
    """

    out: Path
    work: Path
    steps: int
    losses: tuple[tuple[int, float], ...]


def retrain_projector(
    source: Path,
    data: Path | Sequence[Path],
    images: Path | None,
    out: Path,
    recipe: Recipe | None = None,
    options: RunOptions | None = None,
    *,
    data_options: DataOptions | None = None,
    resume: bool = False,
    force: bool = False,
) -> Outcome:
    """Retrain a model's projector on conversations about images: `plan_training`, then `train`.

    Args:
        source: Checkpoint folder in the transformers layout.
        data: One file or several, see `mllm_adapters.training_rows`.
        images: What the image paths of conversations are relative to.
        out: Checkpoint folder to write.
        recipe: What decides the result.
        options: What does not.
        data_options: How rows are made of files.
        resume: Continue the interrupted run of the same ``out``.
        force: Replace ``out``, and forget an interrupted run.

    Raises:
        UserError: see `plan_training` and `train`.
    """
    check_output(out, resume=resume, force=force)
    job = plan_training(source, data, images, recipe or Recipe(), data_options)
    return train(job, out, options or RunOptions(), resume=resume, force=force)


def plan_training(
    source: Path,
    data: Path | Sequence[Path],
    images: Path | None,
    recipe: Recipe,
    data_options: DataOptions | None = None,
) -> Job:
    """Check everything, load the model, freeze all but its projector. Writes nothing.

    Raises:
        UserError: the data or the model are not usable (see `read_corpus`, `prepare_examples`, `load_mllm`), or the
            language model has an encoder.
    """
    checkpoint, _, layout = open_checkpoint(source)
    if layout != "transformers":
        raise UserError(
            f"{source} is in its original layout: first "
            f"`swap-encoder convert --mllm {source} --out {source.name}-hf`, then retrain that"
        )
    _check_decoder(build_config(checkpoint.config, f"{source}/config.json"), source)
    stored = checkpoint.tensors
    corpus = read_corpus(data, images, data_options)
    precision = recipe.precision
    if precision == "auto":
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if half else "float32"
    model, processor = load_mllm(source, dtype=getattr(torch, precision))
    stage = apply_stage(model, STAGE)
    disk_names = names_on_disk(stage.names, stored)
    for name, source_name in disk_names.items():
        parameter = model.get_parameter(name)
        parameter.data = checkpoint.read(source_name).to(parameter.device, torch.float32)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", recipe.max_length)
    max_length = min(recipe.max_length, context)
    examples, counts = prepare_examples(corpus, processor, max_length, STAGES[STAGE].learns_from_text)
    return Job(
        source=source,
        corpus=corpus,
        recipe=recipe,
        model=model,
        processor=processor,
        stage=stage,
        examples=examples,
        counts=counts,
        disk_names=disk_names,
        max_length=max_length,
        precision=precision,
    )


def train(
    job: Job,
    out: Path,
    options: RunOptions,
    *,
    resume: bool = False,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Train, then write ``out``: the source checkpoint with new projector tensors and a training record.

    Trainer checkpoints and logs go to ``<out>.training``, which stays. An interrupted run that is resumed
    ends with the same weights as one that was not interrupted.

    Raises:
        UserError: see `check_output`; or the run to resume is another one, an image turns out to be damaged,
            memory is full, or the loss is no longer a number.
    """
    check_output(out, resume=resume, force=force)
    work = work_folder(out)
    _claim(work, job.identity, resume)
    began = time.monotonic()
    arguments = _arguments(job, options, work)
    cached = _cached(job, options, arguments) if options.feature_cache else None
    trainer = FrozenTrainer(
        model=job.model,
        args=arguments,
        train_dataset=cached.dataset
        if cached
        else ConversationDataset(job.examples, job.corpus.folder, job.processor),
        data_collator=cached.collator
        if cached
        else AnswerCollator(job.processor.tokenizer.pad_token_id or 0),
        callbacks=[Watchdog(), *callbacks],
    )
    try:
        trainer.train(resume_from_checkpoint=str(last_checkpoint(work)) if resume else None)
    except torch.OutOfMemoryError:
        raise UserError(
            f"memory is full at --batch-size {job.recipe.batch_size}: halve it and double "
            "--gradient-accumulation, or add --gradient-checkpointing"
        ) from None
    except DivergedError:
        raise
    except UserError as error:
        # From a data loader's worker the message arrives wrapped in a traceback.
        cause = str(error).rpartition("UserError: ")[2]
        saved = last_checkpoint(work)
        hint = f"; once mended, --resume continues from {saved.name}" if saved else ""
        raise UserError(f"{cause} (training stopped at step {trainer.state.global_step}{hint})") from None
    losses = tuple((int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row)
    outcome = Outcome(out, work, trainer.state.global_step, losses)
    if trainer.is_world_process_zero():
        trained = {
            stored: job.model.get_parameter(name).detach().cpu() for name, stored in job.disk_names.items()
        }
        record = json.dumps(_record(job, outcome, time.monotonic() - began), indent=2)
        replace_tensors(job.source, out, trained, force=force, extra_files={RECORD: f"{record}\n"})
    return outcome


def work_folder(out: Path) -> Path:
    """Where the Trainer checkpoints and logs of an output folder go."""
    return out.with_name(f"{out.name}.training")


def check_output(out: Path, *, resume: bool, force: bool) -> None:
    """See to it that a run may write to ``out``; nothing is written or removed.

    Raises:
        UserError: ``out`` exists, an interrupted run is in the way, or there is none to resume.
    """
    check_free(out, force)
    work = work_folder(out)
    saved = last_checkpoint(work)
    if resume and saved is None:
        raise UserError(f"{work} holds no checkpoint to resume from: start without --resume")
    if saved and not (resume or force):
        raise UserError(
            f"{work} holds {saved.name} of an earlier run: go on with --resume, or start anew with --force"
        )


def names_on_disk(parameters: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """Find the stored tensor of each parameter: the one whose name is the parameter's, or a suffix of it.

    transformers renames on loading (``multi_modal_projector.linear_1.weight`` becomes
    ``model.multi_modal_projector.linear_1.weight``).

    Raises:
        UserError: a parameter has no such tensor, or several.
    """
    stored = set(tensors)
    found: dict[str, str] = {}
    for name in parameters:
        parts = name.split(".")
        matches = [suffix for start in range(len(parts)) if (suffix := ".".join(parts[start:])) in stored]
        if len(matches) != 1:
            raise UserError(
                f"{len(matches)} stored tensors for parameter {name}, expected 1: {', '.join(matches)}"
            )
        found[name] = matches[0]
    return found


def _check_decoder(config: Any, source: Path) -> None:
    text = config.get_text_config()
    if text.is_encoder_decoder:
        raise UserError(
            f"{source}: its language model ({text.model_type}) reads the prompt with an encoder, and retrain-projector "
            "trains models that write the answer after the prompt: take one on a decoder, such as Vicuna"
        )


def _claim(work: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Make the work folder this run's own."""
    note = work / RUN
    if resume:
        began_with = json.loads(note.read_text(encoding="utf-8"))
        for field, value in identity.items():
            if began_with.get(field) != value:
                raise UserError(
                    f"{work} is of another run: its {field} is {began_with.get(field)}, now it is {value}: "
                    "repeat the first command with --resume, or start anew with --force"
                )
        return
    if note.is_file():
        shutil.rmtree(work)
    write_text(note, json.dumps(identity, indent=2))


def _arguments(job: Job, options: RunOptions, work: Path) -> TrainingArguments:
    recipe = job.recipe
    return TrainingArguments(
        output_dir=str(work),
        run_name=work.stem,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        activation_checkpointing=options.gradient_checkpointing,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_ratio,
        weight_decay=0.0,
        seed=recipe.seed,
        bf16=job.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to=list(options.report_to) or "none",
        dataloader_num_workers=options.workers,
        dataloader_persistent_workers=options.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def _cached(job: Job, options: RunOptions, arguments: TrainingArguments) -> Cached | None:
    """The tower's features in its place, where that is possible."""
    place = Place(
        device=arguments.device,
        precision=job.precision,
        dtype=options.feature_dtype,
        rank=arguments.process_index,
        ranks=arguments.world_size,
        workers=options.workers,
    )
    if not getattr(job.model, "is_quantized", False):  # what is quantised lies where it belongs
        job.model.to(place.device)
    return cache_features(job.model, job.examples, job.corpus, job.processor, place)


def _record(job: Job, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "command": "retrain-projector",
        "source": str(job.source),
        "data": [str(file) for file in job.corpus.files]
        if len(job.corpus.files) > 1
        else str(job.corpus.path),
        "images": str(job.corpus.folder),
        **job.identity,
        "rows": asdict(job.counts),
        "trained": list(job.disk_names.values()),
        "trained_parameters": job.stage.trainable,
        "all_parameters": job.stage.total,
        "steps": outcome.steps,
        "final_loss": outcome.losses[-1][1],
        "losses": outcome.losses,
        "seconds": round(seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
