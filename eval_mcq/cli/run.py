"""The commands ``eval-mcq merge`` and ``check``, and options of ``run``."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eval_mcq.cli.items import Force
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common.cli import next_line, say, stdout, warn
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError
from mgll_encoder.common.extras import needs, require
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.common.terminal_table import TerminalTable

if TYPE_CHECKING:
    from eval_mcq.runs.image_sensitivity import ImageSensitivity
    from eval_mcq.runs.model_check import SwappedTower
    from eval_mcq.tables.intervals import Estimate

ModeName = Literal["auto", "letters", "options", "options-mean", "generate"]


def _check_four_bit(asked: bool) -> bool:
    if asked:
        require("qlora", "--load-in-4bit")
    return asked


FourBit = Annotated[
    bool,
    typer.Option(
        "--load-in-4bit",
        help="Load NF4 weights (bitsandbytes); computes in --precision.",
        callback=_check_four_bit,
    ),
]


def merge_command(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Run folders of all shards.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    bench: Annotated[
        Path | None, typer.Option(help="Benchmark file, if it is not where the shards found it.")
    ] = None,
    force: Force = False,
) -> None:
    """Merge the shards of a run; refuses missing, duplicate and foreign answers.

    Example: eval-mcq merge runs/s0 runs/s1 runs/s2 --out runs/llava-med
    """
    from eval_mcq.runs.merge import merge

    run = merge(shards, out, bench, force)
    say(f"{out}: {len(run.rows)} answers of {len(shards)} shards")
    say(next_line("eval-mcq table {}", out))


@needs("eval")
def check(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    bench: Annotated[
        Path | None, typer.Option(help="Benchmark file; without it only prompt and provenance are shown.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Use only this many questions, evenly spaced.", min=2)] = 100,
    device: compute.Device = "auto",
    precision: compute.Computed = "auto",
    load_in_4bit: FourBit = False,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON; needs --bench.")] = None,
    force: Force = False,
) -> None:
    """Check if a model uses the image: real, blank and exchanged images; letter prior; provenance; prompt.

    Exits with 2 if the answers do not depend on the image, or if the tower is not the one that was swapped in.

    Example: eval-mcq check --model llava-med-mgll --bench test.jsonl
    """
    from eval_mcq.items.schema import load_bench
    from eval_mcq.runs.model_check import check_model

    if out is not None:
        if bench is None:
            raise InvalidArgumentError("--out writes the result on the questions of --bench: add --bench")
        check_free(out, force)
    asked = load_bench(bench) if bench else None
    found = check_model(
        model, asked, limit=limit, device=device, precision=precision, load_in_4bit=load_in_4bit
    )
    say(f"model: {model} ({found.fingerprint[:12]})")
    stdout.print("prompt:", highlight=False)
    typer.echo(found.prompt)
    _show_tower(found.tower)
    for training in found.trainings:
        stdout.print(f"trained on: {len(training.images)} images, {training.title}", highlight=False)
    if asked and found.leak:
        warn(f"bench {asked.path}: {found.leak.text}; eval-mcq run refuses it without --allow-leak")
    if found.sensitivity:
        _show_sensitivity(found.sensitivity)
        if out is not None:
            seen = {"model": str(model), "bench": str(bench), **asdict(found.sensitivity)}
            write_text(out, json.dumps(seen, indent=2) + "\n", force)
        for warning in found.sensitivity.warnings:
            warn(warning)
    if found.faults:
        raise BadDataError(f"{model}: {'; '.join(found.faults)}")


def _show_tower(tower: "SwappedTower | None") -> None:
    if tower is None:
        stdout.print("tower: no mgll_swap.json, so a swap cannot be verified", highlight=False)
        return
    say(f"tower by provenance: {tower.name or 'its own'} in {tower.source}")
    equal = {True: "yes", False: "NO", None: "not checked"}[tower.passed]
    say(f"tower equals provenance: {equal} ({tower.detail})")


def _in_percent(estimate: "Estimate") -> tuple[str, str]:
    low, high = estimate.interval.low, estimate.interval.high
    return f"{100 * estimate.value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"


def _show_sensitivity(found: "ImageSensitivity") -> None:
    from eval_mcq.items.schema import LETTERS

    grid = TerminalTable(f"{found.questions} questions").add_words("images")
    grid.add_figures("Average", "95 %", "lost", "95 %", "largest change")
    for kind, average in found.average.items():
        lost = found.drop.get(kind)
        moved = f"{found.moved[kind]:.4f}" if kind in found.moved else ""
        grid.add_row(kind, *_in_percent(average), *(_in_percent(lost) if lost else ("", "")), moved)
    stdout.print(grid)
    prior = ", ".join(f"{letter} {p:.2f}" for letter, p in zip(LETTERS, found.prior, strict=False))
    stdout.print(f"letter prior (blank image, no question): {prior}", highlight=False)
    if found.mass is not None:
        stdout.print(f"probability on the letters: {found.mass:.2f}", highlight=False)


COMMANDS: Mapping[str, Callable[..., None]] = {"merge": merge_command, "check": check}
"""Command name -> function."""
