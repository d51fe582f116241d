"""Memory and time of reading a long manifest before and during training, to verify that it is streamed.

    python scripts/bench/pretrain_stream.py --rows 10000 --rows 250000

All image names are hard links to a few phantom photographs. Each manifest is read in a separate process; the growth of
its resident memory is measured after reading the rows, and after reading some images in random order.
"""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mgll_encoder.common import cli
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import write_text
from mgll_encoder.common.terminal_table import TerminalTable
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest
from mgll_encoder.data.phantom.dataset import write_phantom

LEVELS = ["status", "disease", "report"]
FORMATS = ("jsonl", "parquet")


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Lengths of the manifests; repeatable.")] = None,
    images: Annotated[int, typer.Option(help="Number of images to read in random order.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
) -> None:
    """Measure memory and time of manifests of several lengths, as JSON lines and as Parquet.

    Example: python scripts/bench/pretrain_stream.py --rows 10000 --rows 250000 --out stream.json
    """
    lengths = rows or [10_000, 250_000]
    if min(lengths) < 2 or images < 1:
        raise InvalidArgumentError("--rows must be at least 2 and --images at least 1")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantom(folder / "phantom", 1, image_size=64)
        pictures = sorted((folder / "phantom" / "images").iterdir())
        for length in lengths:
            link(folder / "images", pictures, length)
            for kind in FORMATS:
                manifest = folder / f"{length}.{kind}"
                header = ManifestHeader(granularities=LEVELS)
                write_manifest(manifest, folder / "images", header, made_up(length))
                # a fresh process, so that its memory is that of this manifest alone
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found.append({"rows": length, "format": kind, **pool.apply(read, (manifest, images))})
    table = TerminalTable(fixed=2).add_figures("rows").add_words("format")
    table.add_figures("file MB", "reading s", "index MB", "images/s", "images MB")
    for entry in found:
        table.add_row(
            *(f"{value:,.1f}" if isinstance(value, float) else str(value) for value in entry.values())
        )
    cli.stdout.print(table)
    if out is not None:
        write_text(out, json.dumps(found, indent=2) + "\n", force)


def made_up(length: int) -> Iterator[ManifestRow]:
    """Yield rows with a label, one of twenty classes, and a unique report."""
    for i in range(length):
        texts = {
            "status": ["normal fundus" if i % 2 else "abnormal fundus"],
            "disease": [f"finding {i % 20}"],
            "report": [
                f"Report {i}: the vessels are of regular course and caliber; image quality {i % 7} of 7."
            ],
        }
        yield ManifestRow(image=image_name(i), texts=texts, patient=str(i // 2))


def image_name(i: int) -> str:
    """Return an image path, with a thousand images per folder."""
    return f"{i // 1000:04d}/{i:07d}.png"


def link(folder: Path, pictures: list[Path], length: int) -> None:
    """Create one hard link to a picture per row."""
    for i in range(length):
        name = folder / image_name(i)
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            os.link(pictures[i % len(pictures)], name)


def read(manifest: Path, images: int) -> dict[str, float]:
    """Measure reading the rows and some images, in this process."""
    from mgll_encoder.common.skipped import Skipped
    from mgll_encoder.data.batches import ManifestImages, plan_rows
    from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    warm = plan_rows(
        manifest, None, ("status",), "val", False, Skipped()
    )  # imports, and the reader's own buffers
    assert not len(warm)
    before, start = peak(), time.perf_counter()
    plan = plan_rows(manifest, None, (), "train", False, Skipped(strict=True))
    planned, indexed = time.perf_counter() - start, peak()
    data = ManifestImages(plan, TOWER_SIZES["tiny"].spec, seed=0)
    start = time.perf_counter()
    for index in np.random.default_rng(0).integers(len(data), size=images):
        assert "pixels" in data[int(index)]
    return {
        "file MB": manifest.stat().st_size / 1e6,
        "reading s": planned,
        "index MB": indexed - before,
        "images/s": images / (time.perf_counter() - start),
        "images MB": peak() - indexed,
    }


if __name__ == "__main__":
    app = cli.new_app("Measure reading of long manifests.")
    app.command()(main)
    cli.run(app)
