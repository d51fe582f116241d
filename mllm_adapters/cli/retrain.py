"""``retrain-projector``: retrain a model's projector on its vision tower's features."""

from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder.common import cli
from mgll_encoder.common.extras import needs
from mllm_adapters.checkpoints.locate import beside
from mllm_adapters.cli import options as o
from mllm_adapters.cli.launch import launch
from mllm_adapters.training.runs import TrainingRequest

app = cli.new_app(
    """Retrain the projector of a multimodal LLM, with tower and language model frozen.

    Example: retrain-projector --model llava-med-mgll-fundus --data train.json --images images/
    """
)


@app.command()
@needs("train")
def retrain(
    model: o.Model,
    data: o.Data,
    images: o.Images = None,
    overrides: o.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: <model>-aligned.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="The unswapped checkpoint: train it in the same way to <out>-control.")
    ] = None,
    recipe: o.RecipeFile = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    gradient_accumulation: o.Accumulation = None,
    learning_rate: o.LearningRate = None,
    max_steps: o.MaxSteps = None,
    max_length: o.MaxLength = None,
    seed: o.Seed = None,
    logging_steps: o.LoggingSteps = None,
    save_steps: o.SaveSteps = None,
    save_on_signal: o.SaveOnSignal = None,
    report_to: o.ReportTo = None,
    workers: o.Workers = None,
    device: o.Device = None,
    precision: o.Precision = None,
    gradient_checkpointing: o.GradientCheckpointing = None,
    deepspeed: o.DeepSpeed = None,
    answer: o.Answer = None,
    caption: o.Caption = None,
    strict: o.Strict = None,
    feature_cache: o.FeatureCache = None,
    feature_precision: o.FeaturePrecision = None,
    eval_bench: o.EvalBench = None,
    eval_every: o.EvalEvery = None,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    estimate: o.EstimateMemory = False,
    force: o.Force = False,
) -> None:
    """Retrain the projector of a multimodal LLM, with tower and language model frozen.

    The result is a checkpoint in the input's layout, with new projector tensors.
    Logs and checkpoints for --resume are written to <out>.training.

    Example: retrain-projector --model llava-med-mgll-fundus --data train.json --images images/
    """
    launch(
        TrainingRequest(
            command="retrain-projector",
            model=model,
            data=data,
            images=images,
            out=out or beside(model, "aligned"),
            recipe=recipe,
            overrides=overrides or (),
            flags={
                "epochs": epochs,
                "batch_size": batch_size,
                "gradient_accumulation": gradient_accumulation,
                "learning_rate": learning_rate,
                "max_steps": max_steps,
                "max_length": max_length,
                "seed": seed,
                "logging_steps": logging_steps,
                "save_steps": save_steps,
                "save_on_signal": save_on_signal,
                "report_to": report_to or None,
                "workers": workers,
                "device": device,
                "precision": precision,
                "gradient_checkpointing": gradient_checkpointing,
                "deepspeed": deepspeed,
                "answer": answer,
                "caption": caption,
                "strict": strict or None,
                "feature_cache": feature_cache,
                "feature_precision": feature_precision,
                "eval_bench": eval_bench,
                "eval_every": eval_every,
            },
            defaults={"workers": 2},
            stages=("projector",),
            control=control,
            resume=resume,
            force=force,
            dry_run=dry_run,
        ),
        estimate=estimate,
    )


def main() -> None:
    """Entry point of ``retrain-projector``."""
    cli.run(app, "retrain-projector")


if __name__ == "__main__":  # started by torchrun, deepspeed and accelerate
    main()
