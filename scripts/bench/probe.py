"""Cost of a probe on a large data set: the bootstrap against scikit-learn's metrics, and reading in workers.

python scripts/bench/probe.py --images 25000 --labels 14
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from timing import Spread, interleaved, seconds_of

from mgll_encoder.common import cli
from mgll_encoder.common.files import write_text
from mgll_encoder.common.terminal_table import TerminalTable

app = cli.new_app("Time the probe's bootstrap and its reading of images.")


@app.command()
def bench(
    images: Annotated[int, typer.Option(min=10, help="Test images of the bootstrap.")] = 25_000,
    labels: Annotated[int, typer.Option(min=1, help="Labels of the bootstrap.")] = 14,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap replicates per repeat.")] = 5,
    photographs: Annotated[int, typer.Option(min=2, help="Photographs to read.")] = 64,
    side: Annotated[int, typer.Option(min=32, help="Side of the photographs in pixels.")] = 1024,
    workers: Annotated[int, typer.Option(min=1, help="Reader processes, compared with none.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats of each variant.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the times as JSON.")] = None,
) -> None:
    """Run both variants of each task in turn, and print medians, spread and ratio.

    Example: python scripts/bench/probe.py --repeats 5 --out probe-bench.json
    """
    table = TerminalTable("Seconds: median [least, most]").add_words("task")
    table.add_figures("before", "now", "before / now")
    record: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            f"{draws} replicates over {images} images x {labels} labels": _bootstrap(images, labels, draws),
            f"features of {photographs} photographs of {side} px": _reading(
                Path(folder), photographs, side, workers
            ),
        }
        for name, ways in tasks.items():
            variants = {
                when: partial(seconds_of, way) for when, way in zip(("before", "now"), ways, strict=True)
            }
            times = interleaved(variants, repeats)
            before, now = (Spread.of(times[when]) for when in variants)
            ratio = before.median / now.median
            table.add_row(name, before.text(3), now.text(3), f"{ratio:.1f}")
            record[name] = {**times, "ratio": ratio}
    cli.stdout.print(table)
    if out:
        write_text(out, json.dumps(record, indent=2) + "\n", force=True)


def _bootstrap(images: int, labels: int, draws: int) -> tuple[Callable[[], object], Callable[[], object]]:
    import numpy as np
    from sklearn.metrics import average_precision_score, roc_auc_score

    from mgll_encoder.probing.linear import metrics

    rng = np.random.default_rng(0)
    truth = rng.random((images, labels)) < 0.05
    scores = np.clip(truth * 0.3 + rng.random((images, labels)), 0, 1)
    chosen = rng.integers(images, size=(draws, images))
    weights = np.stack([np.bincount(rows, minlength=images) for rows in chosen]).astype(float)

    def one_by_one() -> None:
        for rows in chosen:
            for label in range(labels):
                roc_auc_score(truth[rows, label], scores[rows, label])
                average_precision_score(truth[rows, label], scores[rows, label])

    return one_by_one, lambda: metrics(scores, truth, False, weights)


def _reading(
    folder: Path, photographs: int, side: int, workers: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    from mgll_encoder.data.phantom.photographs import render
    from mgll_encoder.pretraining.dual_encoder import TOWER_SIZES
    from mgll_encoder.probing.features import pooled_features
    from mgll_encoder.tower.model import Tower, build_model

    picture = render([], 0, min(side, 256)).resize((side, side))
    paths = [folder / f"{i}.jpg" for i in range(photographs)]
    for path in paths:
        picture.save(path)
    spec = TOWER_SIZES["tiny"].spec
    tower = Tower.from_model(build_model(spec), spec)
    return (
        lambda: pooled_features(tower, paths, batch_size=16, workers=0),
        lambda: pooled_features(tower, paths, batch_size=16, workers=workers),
    )


if __name__ == "__main__":
    cli.run(app)
