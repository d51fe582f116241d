"""Cost of an MGLL step relative to plain CLIP, and the savings of encoding each distinct text once.

    python scripts/bench/pretrain_step.py --data ../shared/data/fundus --geometry tiny --geometry vit-l-14

The data folder contains manifest.csv (columns file, labels, patient_or_source_id, dataset), as for scripts/proof.py;
only its labels are used, pixels are noise. All variants run in turn, several times; results are medians with minimum
and maximum. Without a GPU the clock is the CPU time of this process, which other load on the machine affects less than
wall time.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from timing import Spread, interleaved, seconds_of

from mgll_encoder.common import cli
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.common.files import write_text
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.terminal_table import TerminalTable
from mgll_encoder.data.batches import ManifestCollator, SplitRows, plan_rows
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.pretraining.dual_encoder import (
    TOWER_SIZES,
    TowerSize,
    TwoTowers,
    image_projection,
    new_tower,
)
from mgll_encoder.pretraining.losses import PLAIN_CLIP, Alphas
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.spec import TowerSpec

GEOMETRIES = {
    "tiny": TOWER_SIZES["tiny"],
    "small": TOWER_SIZES["small"],
    "vit-l-14": TowerSize(
        TowerSpec(
            width=1024, depth=24, heads=16, mlp_width=4096, patch_size=14, image_size=224, activation="quick_gelu",
            projection_dim=768,
        ),
        text_width=768,
        text_depth=12,
    ),
}  # fmt: skip
"""The text tower of CLIP ViT-L/14 has 12 blocks of width 768, in heads of 64; heads of 32 cost the same."""


def main(
    data: Annotated[Path, typer.Option(envvar="MGLL_DATA_DIR", help="Folder with manifest.csv.")],
    geometry: Annotated[
        list[str] | None, typer.Option(help="Towers: tiny, small, vit-l-14; repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 32,
    large_batch_size: Annotated[int, typer.Option(help="Images per step for vit-l-14.")] = 4,
    repeats: Annotated[int, typer.Option(help="Rounds over all variants.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of the batch.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
) -> None:
    """Measure the step time of MGLL relative to plain CLIP, and of encoding every text relative to distinct texts.

    Example: python scripts/bench/pretrain_step.py --data data/fundus --geometry tiny --repeats 11
    """
    chosen = geometry or ["tiny"]
    for name in chosen:
        if name not in GEOMETRIES:
            raise unknown_name("geometry", name, GEOMETRIES)
    if repeats < 1 or min(batch_size, large_batch_size) < 2:
        raise InvalidArgumentError("--repeats must be at least 1, batch sizes at least 2")
    table = data / "manifest.csv" if data.is_dir() else data
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.jsonl"
        build_fundus(FundusTable(table), table.parent, manifest)
        plans = {
            joined: plan_rows(manifest, table.parent, (), "train", joined, Skipped())
            for joined in (False, True)
        }
        found = {
            name: measure(
                GEOMETRIES[name], plans, large_batch_size if name == "vit-l-14" else batch_size, repeats, seed
            )
            for name in chosen
        }
    show(found)
    if out is not None:
        write_text(out, json.dumps(found, indent=2) + "\n", force)


def measure(
    preset: TowerSize, plans: dict[bool, SplitRows], batch_size: int, repeats: int, seed: int
) -> dict[str, object]:
    """Measure one geometry."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    vision = new_tower(preset)
    projection = image_projection(vision)
    every = [text for plan in plans.values() for text in plan.all_texts()]
    text = TextTower.new(every, preset.text_width, preset.text_depth, projection.out_features)
    towers = TwoTowers(vision, projection, text, Alphas()).to(device).train()
    rows = np.random.default_rng(seed).choice(len(plans[False]), batch_size, replace=False)
    batches = {
        joined: batch_of(plan, rows, text, preset.spec.image_size, device) for joined, plan in plans.items()
    }
    texts = [[t for level in plans[False].texts(plans[False].row(int(row))) for t in level] for row in rows]
    all_texts = [t for image in texts for t in image]
    distinct = list(dict.fromkeys(all_texts))

    def step(alphas: Alphas, joined: bool) -> None:
        towers.zero_grad()
        towers.loss.alphas = alphas
        towers(**batches[joined])["loss"].backward()

    shared = projection.out_features
    features = [
        torch.randn(n, shared, device=device, requires_grad=True) for n in (batch_size, len(distinct))
    ]

    def loss(alphas: Alphas) -> None:
        towers.loss.alphas = alphas
        towers.loss(*features, batches[False]["truth"], batches[False]["keys"])["loss"].backward()

    def encode(given: list[str]) -> None:
        text.zero_grad()
        text.features(given).sum().backward()

    times = timed(
        {
            "CLIP step": lambda: step(PLAIN_CLIP, True),
            "MGLL step": lambda: step(Alphas(), False),
            "CLIP loss, same texts": lambda: loss(PLAIN_CLIP),
            "MGLL loss": lambda: loss(Alphas()),
            "every text": lambda: encode(all_texts),
            "distinct texts": lambda: encode(distinct),
        },
        repeats,
    )
    median = {name: spread.median for name, spread in times.items()}
    towers_alone = median["MGLL step"] - median["MGLL loss"]
    return {
        "images": batch_size,
        "texts": len(all_texts),
        "distinct texts": len(distinct),
        "repeats": repeats,
        "seconds": {name: spread._asdict() for name, spread in times.items()},
        "MGLL step / CLIP step": median["MGLL step"] / median["CLIP step"],
        "same texts: (towers + MGLL loss) / (towers + CLIP loss)": median["MGLL step"]
        / (towers_alone + median["CLIP loss, same texts"]),
        "every text / distinct texts": median["every text"] / median["distinct texts"],
    }


def batch_of(
    plan: SplitRows, rows: NDArray[np.int64], text: TextTower, size: int, device: str
) -> dict[str, torch.Tensor]:
    """The batch of some rows, with noise for pixels."""
    items = [{"pixels": torch.randn(3, size, size), "texts": plan.texts(plan.row(int(row)))} for row in rows]
    batch = ManifestCollator(text.tokenize)(items)
    batch.pop("troubles")
    return {name: tensor.to(device) for name, tensor in batch.items()}


def timed(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, Spread]:
    """Seconds of each variant; the first round does not count. On a CPU processor time, on a GPU the wall clock."""
    measured: dict[str, Callable[[], float]] = {
        name: partial(seconds_of, run, time.perf_counter, torch.cuda.synchronize)
        if torch.cuda.is_available()
        else partial(seconds_of, run, time.process_time)
        for name, run in variants.items()
    }
    return {name: Spread.of(found) for name, found in interleaved(measured, repeats, rehearsals=1).items()}


def show(found: dict[str, dict[str, object]]) -> None:
    """Print one table per geometry."""
    for name, figures in found.items():
        table = TerminalTable(f"{name}: {figures['images']} images").add_words("")
        table.add_figures("median ms", "least", "most")
        for variant, spread in dict(figures["seconds"]).items():  # type: ignore[call-overload]  # made above
            table.add_row(variant, *(f"{1000 * spread[key]:.1f}" for key in ("median", "least", "most")))
        cli.stdout.print(table)
        for key, value in figures.items():
            if key not in ("images", "seconds"):
                cli.stdout.print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    app = cli.new_app("Measure MGLL's cost per step.")
    app.command()(main)
    cli.run(app)
