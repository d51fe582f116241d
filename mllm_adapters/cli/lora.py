"""``finetune-lora``: fine-tune a multimodal LLM with LoRA adapters, or fully."""

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
    """Fine-tune a multimodal LLM: its projector, and its language model with LoRA adapters.

    Example: finetune-lora --model llava-med-aligned --data train.json --images images/ --merge
    """
)


@app.command()
@needs("train")
@o.with_settings
def finetune(
    model: o.Model,
    data: o.Data,
    images: o.Images = None,
    overrides: o.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: <model>-<stage>.")] = None,
    recipe: o.RecipeFile = None,
    stage: Annotated[
        str | None,
        typer.Option(help="lora, lora-vision (also adapters on the tower), or full. Default: lora."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters. Default: 16.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA alpha: adapters are scaled by alpha / rank. Default: 32.")
    ] = None,
    lora_dropout: Annotated[
        float | None, typer.Option(help="Dropout of the adapters' inputs. Default: 0.05.")
    ] = None,
    qlora: Annotated[
        bool | None,
        typer.Option(
            "--qlora", help="Keep the language model's layers in 4 bits during training.", show_default=False
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write <out>-merged, an ordinary full checkpoint.")
    ] = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    estimate: o.EstimateMemory = False,
    force: o.Force = False,
    **settings: Any,
) -> None:
    """Fine-tune a multimodal LLM: its projector, and its language model with LoRA adapters.

    The result is a PEFT adapter folder that includes the projector (stage full: a checkpoint in the input's
    layout). Logs and checkpoints for --resume are written to <out>.training.

    Example: finetune-lora --model llava-med-aligned --data train.json --images images/ --merge
    """
    launch(
        TrainingRequest(
            command="finetune-lora",
            model=model,
            data=data,
            images=images,
            out=out or beside(model, stage or "lora"),
            recipe=recipe,
            overrides=overrides or (),
            flags={
                "stage": stage,
                "rank": rank,
                "lora_alpha": lora_alpha,
                "lora_dropout": lora_dropout,
                "qlora": qlora,
                **settings,
            },
            defaults={"workers": 2, "stage": "lora"},
            stages=("lora", "lora-vision", "full"),
            merge=merge,
            resume=resume,
            force=force,
            dry_run=dry_run,
        ),
        estimate=estimate,
    )


def main() -> None:
    """Entry point of ``finetune-lora``."""
    cli.run(app, "finetune-lora")


if __name__ == "__main__":  # started by torchrun, deepspeed and accelerate
    main()
