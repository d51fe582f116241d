"""Questions per second of this project's engine and of vLLM: same model, pictures, prompts and threads, in turns.

Every round of every case has other pictures, so that nothing is left in vLLM's caches. Besides the wall clock,
processor time is compared (that of all of vLLM's processes), which other programs on the machine disturb less.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from mcq import Case, asked, batches_of
from timing import Seconds, Spread, interleaved, paired_ratios

from mgll_encoder.common import cli

if TYPE_CHECKING:
    from eval_mcq.items.schema import Bench
    from eval_mcq.scoring.answerer import Answerer
    from eval_mcq.scoring.modes import Score

app = cli.new_app("Measure eval-mcq side by side with vLLM.")

Turn = tuple[Seconds, "list[Score]"]

REHEARSALS = 1
"""Rounds before those that count."""


@app.command()
def bench(
    model: Annotated[Path, typer.Option(help="LLaVA folder in the transformers layout.")],
    questions: Annotated[
        Path, typer.Option("--bench", help="Benchmark file; its pictures and options are used.")
    ],
    vllm_python: Annotated[Path, typer.Option(help="Python of an environment with vLLM.")],
    cases: Annotated[
        str, typer.Option(help="images x questions per image, separated by commas.")
    ] = "16x1,3x10",
    rotations: Annotated[str, typer.Option(help="Numbers of rotations, separated by commas.")] = "1,4",
    repeats: Annotated[int, typer.Option(help="Number of repeats.", min=1)] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 32,
    threads: Annotated[int, typer.Option(help="Threads of each engine.", min=1)] = 1,
    vllm_options: Annotated[
        list[str] | None, typer.Option("--vllm-option", metavar="NAME=VALUE", help="Option of vllm.LLM.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Compare with vLLM.

    Example: python scripts/bench/mcq_vllm.py --model smol-llava --bench test.jsonl --vllm-python vllm-env/bin/python
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    import torch
    from rich.console import Console

    from eval_mcq.backends.local import LocalModel
    from eval_mcq.backends.vllm_engine import VLLMModel, parse_options
    from eval_mcq.items.schema import load_bench

    torch.set_num_threads(threads)
    console, figures, asked_from, shown = Console(), [], load_bench(questions), 0
    theirs = VLLMModel(model, "letters", "auto", vllm_python, parse_options(vllm_options or ()))
    engines: dict[str, Answerer[Any]] = {"eval-mcq": LocalModel(model).load(), "vLLM": theirs.load()}
    for shape in cases.split(","):
        images, per_image = map(int, shape.split("x"))
        for turned in map(int, rotations.split(",")):
            case = Case(images, per_image, turned)
            figures.append(
                {"case": asdict(case), **_measure(engines, asked_from, case, shown, repeats, batch_size)}
            )
            shown += images * (REHEARSALS + repeats)
            console.print(_line(case, figures[-1]), soft_wrap=True, highlight=False)
    theirs.process.close()
    record = {
        "model": str(model), "threads": threads, "cores": os.cpu_count(), "load": os.getloadavg()[1],
        "versions": theirs.process.versions, "cases": figures,
    }  # fmt: skip
    console.print(
        f"{record['cores']} cores, {threads} thread(s) each; load of the machine {record['load']:.1f} (5 minutes)"
    )
    if out:
        out.write_text(json.dumps(record))


def _line(case: Case, found: dict[str, Any]) -> str:
    speeds = (
        f"{name} {Spread.of(case.rows / wall for wall in walls).text(1)} rows/s"
        for name, walls in found["wall"].items()
    )
    wall, cpu = (Spread(*found[f"{clock}_ratio"]).text() for clock in ("wall", "cpu"))
    return (
        f"{case.images} x {case.per_image}, {case.rotations} rotations: {', '.join(speeds)}; vLLM takes {wall}x our "
        f"time, {cpu}x our processor time; same letters {found['same']}, probabilities within {found['moved']:.1g}"
    )


def _measure(
    engines: "dict[str, Answerer[Any]]", bench: "Bench", case: Case, first: int, repeats: int, batch_size: int
) -> dict[str, Any]:
    """Time both engines in turns, on pictures from the first given one, after a round that does not count."""
    pictures = len({tuple(item.images) for item in bench.items})
    if first + case.images * (REHEARSALS + repeats) > pictures:
        raise typer.BadParameter(
            f"{bench.path} has only {pictures} pictures: give fewer `--cases` or `--repeats`"
        )
    runs: dict[str, Callable[[], Turn]] = {
        name: _runner(engine, bench, case, first, batch_size) for name, engine in engines.items()
    }
    turns = interleaved(runs, repeats, REHEARSALS)
    ours, theirs = turns.values()
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x[1], y[1], strict=True)]
    return {
        "wall": {name: [seconds.wall for seconds, _ in of] for name, of in turns.items()},
        "wall_ratio": paired_ratios([s.wall for s, _ in theirs], [s.wall for s, _ in ours]),
        "cpu_ratio": paired_ratios([s.cpu for s, _ in theirs], [s.cpu for s, _ in ours]),
        "same": f"{sum(a.choice == b.choice for a, b in pairs)}/{len(pairs)}",
        "moved": max(
            abs(p - q) for a, b in pairs for p, q in zip(a.probabilities, b.probabilities, strict=True)
        ),
    }


def _runner(
    engine: "Answerer[Any]", bench: "Bench", case: Case, first: int, batch_size: int
) -> Callable[[], Turn]:
    from eval_mcq.runs.run import scored

    rounds = count()

    def run() -> Turn:
        some = asked(bench, case, first + case.images * next(rounds))
        wall, cpu = time.perf_counter(), _processor_time()
        scores = [
            score
            for _, of_batch in scored(some, engine, batches_of(some, case, batch_size))
            for of_group in of_batch
            for score in of_group
        ]
        return Seconds(time.perf_counter() - wall, _processor_time() - cpu), scores

    return run


def _processor_time() -> float:
    """Return the processor time of this process and all below it."""
    own = psutil.Process()
    times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


if __name__ == "__main__":
    cli.run(app)
