"""Speedup by full batches for benchmarks with few images: current batches of `eval-mcq run` against the former ones.

Until 2026-11 a batch stayed within a block of min(32, images/64 rounded up) images, so 60 images were scored one by
one. Both are timed in turns in one run, with decoding and preparation, and the answers are compared.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from timing import Seconds, Spread, Stopwatch, interleaved, paired_ratios

from mgll_encoder.common import cli
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from eval_mcq.items.schema import Bench
    from eval_mcq.records.batching import Group
    from eval_mcq.scoring.score import Scorer

app = cli.new_app("Measure the batches of eval-mcq run.")

OPTIONS = ["cataract", "glaucoma", "drusen", "normal fundus"]
SIDE = 256
"""Side of a picture in pixels."""


@app.command()
def bench(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    images: Annotated[
        str, typer.Option(help="Numbers of images, separated by commas; one question each.")
    ] = "60,300,600",
    rotations: Annotated[int, typer.Option(help="Rotations per question.", min=1, max=4)] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 32,
    turns: Annotated[int, typer.Option(help="Number of repeats.", min=1)] = 3,
) -> None:
    """Measure the speedup.

    Example: python scripts/bench/mcq_batches.py --model smol-llava --images 60,300,600
    """
    import torch
    from rich.console import Console

    from eval_mcq.records.batching import batches, groups
    from eval_mcq.scoring.score import Scorer
    from mllm_adapters import load_mllm

    scorer = Scorer(*load_mllm(model, dtype=torch.float32))
    table = TerminalTable().add_words("images").add_figures(
        "batch before", "now", "before, rows/s", "now, rows/s", "gain (min-max)", "gain, processor time",
        "same choice", "largest change",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        for count in map(int, images.split(",")):
            asked = _synthetic(Path(work), count)
            all_groups = groups(asked.items, rotations)
            plans = {"before": _in_blocks(all_groups, batch_size), "now": batches(all_groups, batch_size)}
            _answered(scorer, asked, plans["before"][:1])  # the first run tries the strategies
            rounds = interleaved(
                {name: partial(_timed, scorer, asked, plan) for name, plan in plans.items()}, turns
            )
            wall = {name: [one.wall for one, _ in of] for name, of in rounds.items()}
            cpu = {name: [one.cpu for one, _ in of] for name, of in rounds.items()}
            pairs = list(zip(*(of[-1][1] for of in rounds.values()), strict=True))
            choices = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)
            change = max(abs(p - q) for a, b in pairs for p, q in zip(a, b, strict=True))
            table.add_row(
                str(count), *(str(max(sum(len(g.asks) for g in b) for b in plan)) for plan in plans.values()),
                *(f"{len(pairs) / Spread.of(of).median:.1f}" for of in wall.values()), _gain(wall), _gain(cpu),
                f"{choices}/{len(pairs)}", f"{change:.1e}",
            )  # fmt: skip
    Console(width=160).print(table)


def _timed(scorer: "Scorer", asked: "Bench", plan: "list[list[Group]]") -> tuple[Seconds, list[list[float]]]:
    watch = Stopwatch()
    found = _answered(scorer, asked, plan)
    return watch.seconds(), found


def _gain(seconds: dict[str, list[float]]) -> str:
    ratios = paired_ratios(*seconds.values())
    return f"{ratios.median:.2f}x ({ratios.least:.2f}-{ratios.most:.2f})"


def _in_blocks(all_groups: "Sequence[Group]", rows: int) -> "list[list[Group]]":
    """Return the former batches, which stay within blocks."""
    from eval_mcq.records.batching import batches

    size = min(32, max(1, ceil(len(all_groups) / 64)))
    blocks = [all_groups[start : start + size] for start in range(0, len(all_groups), size)]
    return [batch for block in blocks for batch in batches(block, rows)]


def _answered(scorer: "Scorer", asked: "Bench", plan: "Sequence[Sequence[Group]]") -> list[list[float]]:
    from eval_mcq.runs.run import scored

    return [
        score.probabilities
        for _, scores in scored(asked, scorer, plan)
        for of_group in scores
        for score in of_group
    ]


def _synthetic(folder: Path, count: int) -> "Bench":
    """Build one question about each of ``count`` noise pictures."""
    import numpy as np
    from PIL import Image

    from eval_mcq.items.schema import BenchHeader, MCQItem, load_bench, write_bench

    noise = np.random.default_rng(0)
    for i in range(count):
        pixels = noise.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=1)
    items = [
        MCQItem(id=f"q{i}", images=[f"{i}.png"], question="Which disease does this photograph show?",
                options=OPTIONS, answer=i % 4, category=OPTIONS[i % 4])
        for i in range(count)
    ]  # fmt: skip
    path = folder / f"{count}.jsonl"
    write_bench(path, BenchHeader(name="synthetic"), items)
    return load_bench(path)


if __name__ == "__main__":
    cli.run(app)
