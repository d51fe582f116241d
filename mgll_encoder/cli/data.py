"""``mgll-encoder data``: make data sets for pretraining."""

from pathlib import Path

import typer

from mgll_encoder.common.cli import new_app, stdout

app = new_app("Make data sets for pretraining.")


@app.command()
def phantom(
    out: Path = typer.Option(..., help="New folder for images/, labels.csv and contact_sheet.png."),
    images_per_disease: int = typer.Option(100, help="Pictures of each disease, and of normal eyes."),
    size: int = typer.Option(64, help="Side of the pictures in pixels."),
    seed: int = typer.Option(0, help="The same seed writes the same pictures."),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
) -> None:
    """Draw a procedural fundus phantom: ten diseases and normal eyes, no real patient.

    Example: mgll-encoder data phantom --out phantom --images-per-disease 100
    """
    from mgll_encoder.data.phantom_set import write_phantom

    count = write_phantom(out, images_per_disease, size, seed, force)
    stdout.print(f"{count} phantom photographs in {out} (labels.csv, contact_sheet.png)", highlight=False)
    stdout.print(
        f"next: mgll-encoder data fundus --labels {out}/labels.csv --images {out} --out {out}/manifest.jsonl",
        highlight=False,
        soft_wrap=True,
    )
