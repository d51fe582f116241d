"""Pretraining an MGLL tower, or its plain CLIP control, with transformers' Trainer."""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mgll_encoder.common.cli import note, stderr
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import check_free, sha256, write_text
from mgll_encoder.data.batches import Collator, ManifestImages, Plan, plan_rows
from mgll_encoder.data.skipped import Skipped
from mgll_encoder.losses import PLAIN_CLIP, Alphas
from mgll_encoder.save import save_tower
from mgll_encoder.text_tower import TextTower
from mgll_encoder.tower import load_tower
from mgll_encoder.two_towers import PRESETS, Preset, TwoTowers, image_projection

Loss = Literal["mgll", "clip"]
RUN_FILE = "run.json"


@dataclass(frozen=True)
class PretrainOptions:
    """What decides the outcome of a training.

    Attributes:
        loss: ``mgll``, or ``clip``: the control, with all texts of an image joined in one string.
        preset: Geometry from scratch, out of ``PRESETS``; with ``init``, the text tower's.
        init: A tower to start from (anything that ``load_tower`` reads).
        granularities: Which to use; empty for all.
        alphas: Weights of the terms of ``mgll``.
        epochs: Passes over the training rows.
        batch_size: Images per step and process.
        lr: Peak learning rate, after 5 % of warm-up; cosine decay to 0.
        weight_decay: On weight matrices; not on norms, biases, embeddings and the temperature.
        seed: Draws weights, order and augmentation.
    """

    loss: Loss = "mgll"
    preset: str = "small"
    init: Path | None = None
    granularities: tuple[str, ...] = ()
    alphas: Alphas = field(default_factory=Alphas)
    epochs: int = 20
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        if self.loss not in ("mgll", "clip"):
            raise unknown_name("loss", self.loss, ("mgll", "clip"))
        for name, value in (("--epochs", self.epochs), ("--batch-size", self.batch_size), ("--lr", self.lr)):
            if value <= 0 or not math.isfinite(value):
                raise UserError(f"{name} is {value}: it must be greater than 0")

    @property
    def weights(self) -> Alphas:
        """The weights that are in force."""
        return PLAIN_CLIP if self.loss == "clip" else self.alphas


@dataclass(frozen=True)
class PretrainResult:
    """How a training went.

    Attributes:
        out: The tower's folder.
        images: Images trained on.
        steps: Optimiser steps.
        losses: Mean training loss of each epoch.
        temperature: The learnt τ.
        skipped: Rows left out, by reason.
    """

    out: Path
    images: int
    steps: int
    losses: list[float]
    temperature: float
    skipped: Skipped


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
) -> PretrainResult:
    """Train on the manifest's ``train`` rows and write the tower's folder.

    Checkpoints lie in ``.<out>.training`` beside ``out`` until the tower is written. A killed training
    resumes from the last whole epoch, and ends as if it had not been killed.

    Args:
        manifest: The manifest.
        out: Folder of the tower.
        options: What decides the outcome.
        images: The image folder; None for the one that the manifest names.
        workers: Processes that open images; 0 for none.
        strict: Stop at the first row that would be left out.
        resume: Go on with the checkpoints of a killed run of the same options and manifest.
        force: Replace ``out``.

    Raises:
        UserError: bad input (see ``plan_rows``, ``load_tower``), ``out`` exists, or there is nothing to
        resume.
    """
    check_free(out, force)
    skipped = Skipped(strict)
    plan = plan_rows(manifest, images, options.granularities, "train", options.loss == "clip", skipped)
    if len(plan.offsets) < 2:
        raise UserError(f"manifest {manifest} has {len(plan.offsets)} train image: contrast needs at least 2")
    set_seed(options.seed)
    model = _towers(options, plan)
    checkpoints = out.absolute().parent / f".{out.name}.training"
    identity = _identity(manifest, options, plan)
    data = ManifestImages(plan, model.spec, options.seed)
    arguments = _arguments(checkpoints, options, len(data), workers)
    if resume:
        last = _last_checkpoint(checkpoints, identity)
    else:
        last = None
        if arguments.process_index == 0:
            shutil.rmtree(checkpoints, ignore_errors=True)
            write_text(checkpoints / RUN_FILE, json.dumps(identity, indent=2))
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=Collator(model.text.tokenize),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.args.n_gpu > 1:
        raise UserError(
            f"{trainer.args.n_gpu} GPUs are visible to one process: start one process per GPU with "
            f"torchrun --nproc-per-node {trainer.args.n_gpu} --no-python mgll-encoder pretrain ..."
        )
    outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not math.isfinite(outcome.training_loss) or not all(map(math.isfinite, losses)):
        raise UserError(f"the loss is not finite after {outcome.global_step} steps: take a smaller --lr")
    temperature = float(1 / model.loss.scale.detach())
    if trainer.is_world_process_zero():
        record = {
            **identity,
            "steps": outcome.global_step,
            "epoch_losses": [round(loss, 6) for loss in losses],
            "final_loss": round(losses[-1], 6),
            "temperature": round(temperature, 6),
            "skipped": dict(skipped.counts),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        save_tower(model.tower(), out, force, {"pretraining": record}, model.text_tower())
        shutil.rmtree(checkpoints)
    return PretrainResult(out, len(data), outcome.global_step, losses, temperature, skipped)


class _Trainer(Trainer):
    """transformers' Trainer, with weight decay on weight matrices only (CLIP's rule) and the loss terms logged."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._terms: list[dict[str, Tensor]] = []

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, terms = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._terms.append({name: value for name, value in terms.items() if name != "loss"})
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._terms and "loss" in logs:
            for name in self._terms[0]:
                logs[name] = round(float(torch.stack([terms[name] for terms in self._terms]).mean()), 4)
            self._terms.clear()
        super().log(logs, start_time)
        if "loss" in logs and self.args.disable_tqdm and self.is_world_process_zero():
            terms = ", ".join(f"{name} {logs[name]:.4f}" for name in asdict(Alphas()) if name in logs)
            epochs = round(self.args.num_train_epochs)
            note(f"epoch {round(self.state.epoch or 0)}/{epochs}: training loss {logs['loss']:.4f} ({terms})")


def _towers(options: PretrainOptions, plan: Plan) -> TwoTowers:
    preset: Preset = PRESETS[options.preset]
    if options.init is None:
        return TwoTowers.from_preset(preset, plan.all_texts(), options.weights)
    tower = load_tower(options.init)
    projection = image_projection(tower)
    text = TextTower.new(plan.all_texts(), preset.text_width, preset.text_depth, projection.out_features)
    return TwoTowers(tower, projection, text, options.weights)


def _arguments(folder: Path, options: PretrainOptions, rows: int, workers: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        dataloader_drop_last=rows >= options.batch_size,
        dataloader_num_workers=workers,
        dataloader_pin_memory=cuda,
        learning_rate=options.lr,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        weight_decay=options.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        seed=options.seed,
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not stderr.is_terminal,
        report_to=[],
    )


def _identity(manifest: Path, options: PretrainOptions, plan: Plan) -> dict[str, Any]:
    """What must be equal for a run to be resumed."""
    settings = asdict(options) | {
        "alphas": asdict(options.weights),
        "granularities": list(plan.granularities),
    }
    settings["init"] = str(options.init) if options.init else None
    return {
        "manifest": manifest.name,
        "manifest_sha256": sha256(manifest),
        "images": len(plan.offsets),
        **settings,
    }


def _last_checkpoint(folder: Path, identity: dict[str, Any]) -> Path:
    """The newest whole checkpoint of the same run."""
    stored = folder / RUN_FILE
    whole = [
        path.parent for path in folder.glob("checkpoint-*/trainer_state.json")
    ]  # written last by the Trainer
    if not whole or not stored.is_file():
        raise UserError(f"nothing to resume: {folder} holds no whole checkpoint; run again without --resume")
    before = json.loads(stored.read_text(encoding="utf-8"))
    changed = [name for name in identity if before.get(name) != identity[name]]
    if changed:
        name = changed[0]
        raise UserError(
            f"cannot resume: '{name}' was {before.get(name)} in the interrupted run and is {identity[name]} now; "
            "give the same options, or run again without --resume"
        )
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
