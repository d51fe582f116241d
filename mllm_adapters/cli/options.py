"""Options that the training commands share, each worded once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Option(help="Checkpoint folder, as swap-encoder writes it.")]
Data = Annotated[
    list[Path],
    typer.Option(
        help="LLaVA conversations (JSON or JSON Lines), a bench of eval-mcq or a manifest of mgll-encoder data; "
        "may be given several times."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder that the image paths of conversations start from; the others know theirs."),
]
Answer = Annotated[
    str | None,
    typer.Option(help="What is learnt of a multiple-choice question: letter, text or both. Default: letter."),
]
Caption = Annotated[
    str | None,
    typer.Option(
        help="Granularity of a manifest that becomes the caption; all: one after another (default)."
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Stop at images that cannot be read, instead of leaving them out.",
        show_default=False,
    ),
]
FeatureCache = Annotated[
    bool | None,
    typer.Option(
        "--feature-cache/--no-feature-cache",
        help="Let a frozen tower see every image once, and keep the features (default), or not.",
        show_default=False,
    ),
]
FeatureDtype = Annotated[
    str | None,
    typer.Option(help="What they are kept in: float32, bfloat16, float16, or auto: as computed (default)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe keys as key=value, such as weight_decay=0.01.", show_default=False),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="YAML: fields of transformers' TrainingArguments, and ours. Flags win over it."
    ),
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data. Default: 1.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per device and forward pass. Default: 16.")]
Accumulation = Annotated[int | None, typer.Option(help="Forward passes per step. Default: 1.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak of the schedule. Default: LLaVA's for the stage.")
]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many steps instead of epochs.")]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Longest example in tokens, image included; longer ones are left out. Default: 2048."),
]
Seed = Annotated[int | None, typer.Option(help="Of the order of the examples. Default: 0.")]
LoggingSteps = Annotated[int | None, typer.Option(help="Steps between two log entries. Default: 10.")]
SaveSteps = Annotated[
    int | None, typer.Option(help="Steps between two checkpoints to resume from. Default: 200.")
]
SaveOnSignal = Annotated[
    bool | None,
    typer.Option(
        "--save-on-signal",
        help="Save a checkpoint before ending on SIGTERM (Slurm) or Ctrl-C; --resume goes on from it.",
        show_default=False,
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="tensorboard, wandb ..., or none; may be given several times. Default: tensorboard."),
]
Workers = Annotated[int | None, typer.Option(help="Processes that open images. Default: 2.")]
Precision = Annotated[
    str | None, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU that has it. Default: auto.")
]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing", help="Less memory, about a third slower.", show_default=False),
]
DeepSpeed = Annotated[Path | None, typer.Option("--deepspeed", help="DeepSpeed's configuration, JSON.")]
EvalBench = Annotated[
    Path | None,
    typer.Option(help="Bench of a validation split: scored while training, and the best weights are kept."),
]
EvalEvery = Annotated[int | None, typer.Option(help="Steps between two such scores. Default: 200.")]
EstimateMemory = Annotated[
    bool, typer.Option("--estimate", help="Print what it takes of each device's memory, and stop.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show recipe and plan, and stop.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the output folder and forget an interrupted run.")
]
