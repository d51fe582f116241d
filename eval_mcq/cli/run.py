"""Commands of ``eval-mcq`` that work on runs of a model: merge and check; and options of ``run``."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eval_mcq.cli.items import Force
from eval_mcq.runs.loading import Dtype, loading
from mgll_encoder.common.cli import stdout, warn
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.extras import needs, require
from mgll_encoder.common.files import check_free, write_text

ModeName = Literal["letters", "options", "options-mean", "generate"]

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes the GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 elsewhere.")]


def _check_four_bit(asked: bool) -> bool:
    if asked:
        require("qlora", "--load-in-4bit")
    return asked


FourBit = Annotated[
    bool,
    typer.Option(
        "--load-in-4bit",
        help="NF4 weights (bitsandbytes); computes in --dtype.",
        callback=_check_four_bit,
    ),
]


def merge_command(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Run folders of all shards.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    bench: Annotated[
        Path | None, typer.Option(help="Bench file, if it is not where the shards found it.")
    ] = None,
    force: Force = False,
) -> None:
    """Put the shards of a run together; refuses missing, doubled and foreign answers.

    Example: eval-mcq merge runs/s0 runs/s1 runs/s2 --out runs/llava-med
    """
    from eval_mcq.runs.merge import merge

    run = merge(shards, out, bench, force)
    stdout.print(f"{out}: {len(run.rows)} answers of {len(shards)} shards", soft_wrap=True)
    stdout.print(f"Next: eval-mcq table {out}", soft_wrap=True)


@needs("eval")
def check(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    bench: Annotated[
        Path | None, typer.Option(help="Bench file; without it only prompt and provenance are shown.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions to put.", min=2)] = 100,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    load_in_4bit: FourBit = False,
    out: Annotated[Path | None, typer.Option(help="Write what was seen as JSON; needs --bench.")] = None,
    force: Force = False,
) -> None:
    """See whether a model looks at the picture: real, blank and exchanged images; letter prior; provenance; prompt.

    Exits with 2 where the answers do not depend on the image, or where the tower is not the one that was put in.

    Example: eval-mcq check llava-med-mgll --bench test.jsonl
    """
    from eval_mcq.items.schema import MCQItem, load_bench
    from eval_mcq.records.leaks import find_leak, trainings_of_model
    from eval_mcq.runs.fingerprint import model_fingerprint
    from eval_mcq.runs.image_sensitivity import contradictions, image_sensitivity
    from mllm_adapters import is_swapped

    if out is not None:
        if bench is None:
            raise UserError("--out writes what the questions of --bench show: add --bench")
        check_free(out, force)
    asked = load_bench(bench) if bench else None
    fingerprint = model_fingerprint(model)
    from mllm_adapters import Verification  # torch, which a wrong path need not wait for

    swap = Verification(model) if is_swapped(model) else None
    scorer = loading(model, device, dtype, load_in_4bit).scorer()
    example = MCQItem(
        id="example", images=["x"], question="Which finding does this fundus photograph show?",
        options=["glaucoma", "cataract"], answer=0, category="x",
    )  # fmt: skip
    item = asked.items[0] if asked else example
    stdout.print(f"model: {model} ({fingerprint[:12]})", soft_wrap=True, highlight=False)
    stdout.print("prompt:", highlight=False)
    typer.echo(scorer.prompt(item))
    wrong = []
    if swap:
        plan, tower = swap.record.plan, swap.tower()
        stdout.print(f"tower by provenance: {plan['tower'] or 'its own'} in {plan['source']}", soft_wrap=True)
        equal = {True: "yes", False: "NO", None: "not checked"}[tower.passed]
        stdout.print(f"tower equals provenance: {equal} ({tower.detail})", soft_wrap=True, highlight=False)
        wrong = contradictions(scorer.model, scorer.processor, plan["after"])
        wrong += [f"the tower is not that of its provenance: {tower.detail}"] if tower.passed is False else []
    else:
        stdout.print("tower: no mgll_swap.json, so nothing is known of a swap", highlight=False)
    for training in trainings_of_model(model):
        stdout.print(f"trained on: {len(training.images)} images, {training.title}", highlight=False)
    if asked and (leak := find_leak(model, asked)):
        warn(f"bench {asked.path}: {leak.text}; eval-mcq run refuses it without --allow-leak")
    if asked:
        found = image_sensitivity(scorer, asked, questions)
        _show_look(found)
        if out is not None:
            write_text(
                out,
                json.dumps({"model": str(model), "bench": str(bench), **asdict(found)}, indent=2) + "\n",
                force,
            )
        for warning in found.warnings:
            warn(warning)
        wrong += [] if found.sees else found.warnings[:1]
    if wrong:
        raise UserError(f"{model}: {'; '.join(wrong)}")


def _in_percent(estimate: Any) -> tuple[str, str]:
    low, high = estimate.interval.low, estimate.interval.high
    return f"{100 * estimate.value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"


def _show_look(found: Any) -> None:
    from rich.table import Table

    from eval_mcq.items.schema import LETTERS

    grid = Table(
        "images", "Average", "95 %", "lost", "95 %", "largest change",
        title=f"{found.questions} questions", title_justify="left",
    )  # fmt: skip
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
"""Name of the command to its function."""
