"""Training arguments of pretraining: precision, DeepSpeed, devices."""

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from mgll_encoder.common.devices import train_on
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.progress import counter
from mgll_encoder.pretraining.options import PretrainOptions


def training_arguments(
    folder: Path, options: PretrainOptions, rows: int, workers: int, device: str
) -> TrainingArguments:
    """Build the arguments of transformers' Trainer.

    Args:
        folder: Folder for checkpoints.
        options: The user's options.
        rows: Number of training images.
        workers: Processes that open images.
        device: See `mgll_encoder.common.devices.train_on`.

    Raises:
        UserError: the precision or the device is not available here, or several GPUs are visible to one process.
    """
    use_cpu = train_on(device)
    cuda = torch.cuda.is_available() and not use_cpu
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32"
    if precision == "float16" and not cuda:
        raise InvalidArgumentError("`precision=float16` needs a GPU: use bfloat16 or float32")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        dataloader_drop_last=rows >= options.batch_size,
        dataloader_num_workers=workers,
        dataloader_pin_memory=cuda,
        learning_rate=options.learning_rate,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        weight_decay=options.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        deepspeed=str(options.deepspeed) if options.deepspeed else None,
        use_cpu=use_cpu,
        seed=options.seed,
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=counter() is None,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        raise InvalidArgumentError(
            f"{arguments.n_gpu} GPUs are visible to one process: start one process per GPU with "
            f"torchrun --nproc-per-node {arguments.n_gpu} --no-python COMMAND ..., or choose one with `device=cuda:0`"
        )
    return arguments


def kept_epoch(trainer: Trainer) -> tuple[int, dict[str, float]]:
    """Return the epoch whose weights the model has after training, and its validation metrics, if any."""
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    entries = [entry for entry in state.log_history if entry.get("step") == step]
    figures = {
        name.removeprefix("eval_"): float(value)
        for entry in entries
        for name, value in entry.items()
        if name.startswith(("eval_mAP", "eval_recall"))
    }
    # Sorted by name, as transformers saves them, so that a resumed run writes the same as an uninterrupted one.
    return round(max(entry["epoch"] for entry in entries)), dict(sorted(figures.items()))
