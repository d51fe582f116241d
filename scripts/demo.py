"""From nothing to a per-disease table in minutes, on phantom images: ``make demo``.

python scripts/demo.py --out demo
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from three_arms import Settings, Way, three_arms

from mgll_encoder.common import cli

app = cli.new_app("Run the whole pipeline on phantom images.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder; finished steps are skipped.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run the same steps at tiny sizes, without useful training.")
    ] = False,
) -> None:
    """Render phantom fundus photographs, train two towers, swap, retrain, evaluate.

    Example: python scripts/demo.py --out demo
    """
    if fresh and out.exists():
        shutil.rmtree(out)
    way = Way(out)
    data = way.step(
        "Phantom fundus photographs: normal and ten diseases", "phantom",
        "mgll-encoder", "data", "phantom", "--out", out / "phantom",
        "--images-per-disease", "40" if quick else "90", "--size", "64", "--seed", "0",
    )  # fmt: skip
    settings = Settings(
        labels=data / "labels.csv",
        images=data,
        preset="fundus10",
        columns=["--patient-column", "patient_or_source_id"],
        pretrain=[
            "--preset", "tiny", "--epochs", "1" if quick else "8", "--batch-size", "32", "--lr", "1e-3",
        ],
        teach=["--lm", "tiny", *(["--words", "32", "--captions", "32", "--questions", "32"] if quick else [])],
        retrain=[
            "--report-to", "none",
            *(["--max-steps", "2"] if quick else ["--epochs", "3", "--learning-rate", "2e-3"]),
        ],
    )  # fmt: skip
    three_arms(way, settings)
    cli.stdout.print(
        f"\nDone in {way.seconds:.0f} s. This is a phantom: synthetic pictures, toy models. The table "
        "shows that the pipeline works, and says nothing about patients or about the method.\n"
        f"Pictures: {data / 'contact_sheet.png'}; table: {out / 'table.md'}; towers, models and runs: {out}/",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    cli.run(app)
