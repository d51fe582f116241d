"""``mgll-encoder pretrain``: train a tower on images and multi-granular texts."""

from pathlib import Path

import typer

from mgll_encoder import api
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common.cli import next_line, say
from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.extras import needs
from mgll_encoder.weights.locate import check_manifest


@needs("pretrain")
def pretrain(
    manifest: Path = typer.Option(
        ..., help="Manifest (.jsonl or .parquet), as written by 'mgll-encoder data fundus'."
    ),
    out: Path = typer.Option(..., help="New folder for the tower."),
    images: Path | None = typer.Option(None, help="Image folder (default: the one named in the manifest)."),
    loss: str = typer.Option("mgll", help="mgll, or clip: the control, with all texts of an image joined."),
    tower_size: str = typer.Option(
        "small", help="Size of a new tower: nano, tiny or small (64 px, for CPUs)."
    ),
    init: str | None = typer.Option(
        None,
        help="Initial weights: 'openai' (CLIP ViT-L/14), a tower's file, or its folder or hub id.",
    ),
    activation: str | None = typer.Option(
        None, help="Activation of --init, if it does not specify it: gelu or quick_gelu."
    ),
    init_weights: str | None = typer.Option(
        None,
        "--weights",
        help="Weights of --init, if it is stored with a moving average of them: raw or ema.",
    ),
    image_size: int | None = typer.Option(
        None, help="Image size in pixels that --init is trained at (default: its own)."
    ),
    pooling: str | None = typer.Option(
        None,
        help="Image features of --init: 'class' (class token) or 'mean' (mean of the patch tokens, not of a CLIP).",
    ),
    text_tower: str = typer.Option(
        "auto",
        help="Text tower: 'new', a transformers folder or hub id, or 'auto': that of --init, else a new one.",
    ),
    freeze_text: bool = typer.Option(
        False, "--freeze-text", help="Freeze the text tower except its projection."
    ),
    train_blocks: int | None = typer.Option(
        None,
        help="Train only this many of the last blocks of --init; 0: its projection and the text tower alone (default: "
        "the whole image tower).",
    ),
    granularities: str = typer.Option("", help="Granularities to use, separated by commas (default: all)."),
    alphas: str = typer.Option(
        "1,0.02,0.1",
        "--alpha",
        help="Weights of soft CLIP, point-wise loss and smooth KL; 0 disables a term.",
    ),
    epochs: int = typer.Option(20, help="Passes over the training images."),
    batch_size: int = typer.Option(32, help="Images per step."),
    learning_rate: float = typer.Option(5e-4, help="Peak learning rate."),
    tower_learning_rate: float | None = typer.Option(
        None,
        help="Peak learning rate of the image tower, such as 5e-5 for a trained one (default: --learning-rate).",
    ),
    weight_decay: float = typer.Option(0.05, help="Weight decay of the weight matrices."),
    select: str = typer.Option(
        "auto",
        help="Epoch to keep: best (by mAP on the val rows), last, or auto: best if there are val rows.",
    ),
    device: compute.Device = AUTO,
    precision: compute.Computed = AUTO,
    gradient_checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", help="Save memory at a third more time."
    ),
    deepspeed: Path | None = typer.Option(None, help="DeepSpeed configuration (.json), ZeRO 0 to 2."),
    flip: bool = typer.Option(
        False, "--flip", help="Mirror half of the training images, except those whose texts name a side."
    ),
    seed: int = typer.Option(0, help="Seed of weights, order and augmentation."),
    workers: int = typer.Option(2, help="Processes that open images."),
    strict: bool = typer.Option(False, "--strict", help="Stop at the first row that would be skipped."),
    resume: bool = typer.Option(False, "--resume", help="Continue a killed run with the same options."),
    save_on_signal: bool = typer.Option(
        False,
        "--save-on-signal",
        help="Save a checkpoint before ending on SIGTERM (Slurm) or Ctrl-C; --resume continues from it.",
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing tower."),
) -> None:
    """Train a tower with the MGLL losses, or its plain CLIP control, on the manifest's training split.

    Example: mgll-encoder pretrain --manifest manifest.jsonl --loss mgll --epochs 20 --out mgll-fundus

    On GPUs: torchrun --nproc-per-node 4 --no-python mgll-encoder pretrain --manifest manifest.parquet --init openai
    --learning-rate 1e-5 --batch-size 64 --gradient-checkpointing --out mgll-fundus
    """
    check_manifest(manifest)
    from mgll_encoder.pretraining.losses import Alphas

    try:
        soft_clip, pointwise, smooth_kl = (float(part) for part in alphas.split(","))
    except ValueError:
        raise InvalidArgumentError(f"--alpha is '{alphas}': give three numbers, such as 1,0.02,0.1") from None
    result = api.pretrain(
        manifest,
        out,
        loss=loss,
        tower_size=tower_size,
        init=init,
        activation=activation,
        init_weights=init_weights,
        image_size=image_size,
        pooling=pooling,
        text_tower=text_tower,
        freeze_text=freeze_text,
        train_blocks=train_blocks,
        granularities=tuple(name.strip() for name in granularities.split(",") if name.strip()),
        alphas=Alphas(soft_clip, pointwise, smooth_kl),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        tower_learning_rate=tower_learning_rate,
        weight_decay=weight_decay,
        select=select,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        deepspeed=deepspeed,
        flip=flip,
        seed=seed,
        images=images,
        workers=workers,
        device=device,
        strict=strict,
        resume=resume,
        force=force,
        save_on_signal=save_on_signal,
    )
    if not result.first:
        return
    result.skipped.say()
    say(
        f"{result.images} images, {result.steps} steps: training loss {result.losses[0]:.4f} -> "
        f"{result.losses[-1]:.4f}, temperature {result.temperature:.4f}"
    )
    if result.validation:
        say(f"kept epoch {result.kept} of {epochs}: validation mAP {result.validation['mAP']:.4f}")
    say(f"tower: {out}")
    say(next_line("swap-encoder --mllm llava-med --encoder {}", out))
