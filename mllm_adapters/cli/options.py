"""Options shared by the training commands."""

from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder.common.compute_options import HELP
from mgll_encoder.common.devices import Precision as Format

Model = Annotated[Path, typer.Option(help="Checkpoint folder, as written by swap-encoder.")]
Data = Annotated[
    list[Path],
    typer.Option(
        help="LLaVA conversations (JSON or JSON Lines), benchmark of eval-mcq or manifest of mgll-encoder "
        "data. Repeatable."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder that image paths of conversations start from; other formats store their own paths."
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(help="Training target for multiple-choice rows: letter, text or both. Default: letter."),
]
Caption = Annotated[
    str | None,
    typer.Option(help="Granularity of a manifest to use as caption, or all in order. Default: all."),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Stop at unreadable images instead of leaving them out.",
        show_default=False,
    ),
]
FeatureCache = Annotated[
    bool | None,
    typer.Option(
        "--feature-cache/--no-feature-cache",
        help="Cache the frozen tower's features (default), or not.",
        show_default=False,
    ),
]
FeaturePrecision = Annotated[
    Format | None,
    typer.Option(help=f"Of cached features. {HELP.format(auto='auto (as computed)')} Default: auto."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe keys as key=value, such as weight_decay=0.01.", show_default=False),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="YAML file with fields of transformers' TrainingArguments, and ours. Options override it.",
    ),
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data. Default: 1.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per device and forward pass. Default: 16.")]
Accumulation = Annotated[int | None, typer.Option(help="Forward passes per step. Default: 1.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate. Default: LLaVA's for the stage.")
]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this number of steps instead of epochs.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Maximum length in tokens, image included; longer examples are left out. Default: 2048."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the order of the examples. Default: 0.")]
LoggingSteps = Annotated[int | None, typer.Option(help="Steps between two log entries. Default: 10.")]
SaveSteps = Annotated[
    int | None, typer.Option(help="Steps between two checkpoints for --resume. Default: 200.")
]
SaveOnSignal = Annotated[
    bool | None,
    typer.Option(
        "--save-on-signal",
        help="Save a checkpoint on SIGTERM (Slurm) or Ctrl-C before exiting; --resume continues from it.",
        show_default=False,
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="tensorboard, wandb ..., or none. Repeatable. Default: tensorboard."),
]
Workers = Annotated[int | None, typer.Option(help="Processes that open images. Default: 2.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device to compute on: cpu, cuda, cuda:1 ...; auto uses the GPU if there is one. Default: auto."
    ),
]
Precision = Annotated[
    Format | None,
    typer.Option(
        help=HELP.format(auto="auto (bfloat16 on a GPU that supports it, float32 elsewhere)")
        + " Default: auto."
    ),
]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing", help="Save memory; about a third slower.", show_default=False),
]
DeepSpeed = Annotated[Path | None, typer.Option("--deepspeed", help="DeepSpeed configuration, a JSON file.")]
EvalBench = Annotated[
    Path | None,
    typer.Option(
        help="Benchmark of a validation split: score it during training, and keep the best weights."
    ),
]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between two evaluations on --eval-bench. Default: 200.")
]
EstimateMemory = Annotated[bool, typer.Option("--estimate", help="Estimate memory per device, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print recipe and plan, and stop.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the output folder and discard an interrupted run.")
]
