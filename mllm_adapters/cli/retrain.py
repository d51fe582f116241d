"""``retrain-projector``: retrain a model's projector on its vision tower's features."""

from pathlib import Path
from typing import Annotated, Any

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
@o.with_settings
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
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    estimate: o.EstimateMemory = False,
    force: o.Force = False,
    **settings: Any,
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
            flags=settings,
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
