"""Options shared by the training commands."""

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

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
EstimateMemory = Annotated[bool, typer.Option("--estimate", help="Estimate memory per device, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print recipe and plan, and stop.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the output folder and discard an interrupted run.")
]

SETTINGS: Mapping[str, Any] = {
    "epochs": Annotated[float | None, typer.Option(help="Passes over the data. Default: 1.")],
    "batch_size": Annotated[
        int | None, typer.Option(help="Examples per device and forward pass. Default: 16.")
    ],
    "gradient_accumulation": Annotated[int | None, typer.Option(help="Forward passes per step. Default: 1.")],
    "learning_rate": Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: LLaVA's for the stage.")
    ],
    "max_steps": Annotated[
        int | None, typer.Option(help="Stop after this number of steps instead of epochs.")
    ],
    "max_length": Annotated[
        int | None,
        typer.Option(
            help="Maximum length in tokens, image included; longer examples are left out. Default: 2048."
        ),
    ],
    "seed": Annotated[int | None, typer.Option(help="Seed of the order of the examples. Default: 0.")],
    "logging_steps": Annotated[int | None, typer.Option(help="Steps between two log entries. Default: 10.")],
    "save_steps": Annotated[
        int | None, typer.Option(help="Steps between two checkpoints for --resume. Default: 200.")
    ],
    "save_on_signal": Annotated[
        bool | None,
        typer.Option(
            "--save-on-signal",
            help="Save a checkpoint on SIGTERM (Slurm) or Ctrl-C before exiting; --resume continues from it.",
            show_default=False,
        ),
    ],
    "report_to": Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, wandb ..., or none. Repeatable. Default: tensorboard."),
    ],
    "workers": Annotated[int | None, typer.Option(help="Processes that open images. Default: 2.")],
    "device": Annotated[
        str | None,
        typer.Option(
            help="Device to compute on: cpu, cuda, cuda:1 ...; auto uses the GPU if there is one. Default: auto."
        ),
    ],
    "precision": Annotated[
        Format | None,
        typer.Option(
            help=HELP.format(auto="auto (bfloat16 on a GPU that supports it, float32 elsewhere)")
            + " Default: auto."
        ),
    ],
    "gradient_checkpointing": Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing", help="Save memory; about a third slower.", show_default=False
        ),
    ],
    "deepspeed": Annotated[
        Path | None, typer.Option("--deepspeed", help="DeepSpeed configuration, a JSON file.")
    ],
    "answer": Annotated[
        str | None,
        typer.Option(help="Training target for multiple-choice rows: letter, text or both. Default: letter."),
    ],
    "caption": Annotated[
        str | None,
        typer.Option(help="Granularity of a manifest to use as caption, or all in order. Default: all."),
    ],
    "strict": Annotated[
        bool | None,
        typer.Option(
            "--strict",
            help="Stop at unreadable images instead of leaving them out.",
            show_default=False,
        ),
    ],
    "feature_cache": Annotated[
        bool | None,
        typer.Option(
            "--feature-cache/--no-feature-cache",
            help="Cache the frozen tower's features (default), or not.",
            show_default=False,
        ),
    ],
    "feature_precision": Annotated[
        Format | None,
        typer.Option(help=f"Of cached features. {HELP.format(auto='auto (as computed)')} Default: auto."),
    ],
    "eval_bench": Annotated[
        Path | None,
        typer.Option(
            help="Benchmark of a validation split: score it during training, and keep the best weights."
        ),
    ],
    "eval_every": Annotated[
        int | None, typer.Option(help="Steps between two evaluations on --eval-bench. Default: 200.")
    ],
}
"""Options that a recipe and `RunOptions` have, too, by their name there."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the ``**`` argument of a command by the options of `SETTINGS`. Options that are not given are None."""
    signature = inspect.signature(command)
    own = [one for one in signature.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in SETTINGS.items()
    ]
    # Typer reads the signature; the type of functions does not declare the attribute.
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return command
