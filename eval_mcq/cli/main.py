"""The command ``eval-mcq``."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eval_mcq import api
from eval_mcq.backends.base import EngineName
from eval_mcq.cli import endpoint_options as at
from eval_mcq.cli.build import build
from eval_mcq.cli.items import COMMANDS as ITEM_COMMANDS
from eval_mcq.cli.items import Force, Format, FormatOption, OutFile
from eval_mcq.cli.run import COMMANDS as RUN_COMMANDS
from eval_mcq.cli.run import FourBit, ModeName
from mgll_encoder.common import compute_options as compute
from mgll_encoder.common.cli import new_app, next_line, note, run, say, stdout
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, write_text
from mgll_encoder.common.taken import continues_output

if TYPE_CHECKING:
    from eval_mcq.records.run_record import Run

app = new_app(
    "Measure a multimodal LLM disease by disease: build questions from labels, run them, compare models.\n\n"
    "Example: eval-mcq build --labels labels.csv --images photos/ --out bench.jsonl"
)

TableLayout = Literal["auto", "diseases", "paper", "long"]

TableLayoutOption = Annotated[
    TableLayout,
    typer.Option(
        "--table-layout",
        help="diseases: diseases as rows; paper: as columns; long: one value per row; auto: rows in the terminal if "
        "there is one model, else columns.",
    ),
]
ControlOption = Annotated[
    str | None,
    typer.Option(
        "--control-arm",
        metavar="ARM",
        help="Arm with the same training and the old tower; gains of the other arms are against it, its own against "
        "the first arm. Default: the arm called 'control', if there is one.",
    ),
]
PaperRounding = Annotated[
    bool,
    typer.Option(
        "--paper-rounding",
        help="Round like the published table: Average of rounded cells, gain of rounded Averages.",
    ),
]


app.command()(build)


@app.command("run")
@continues_output
@needs("eval")
def run_command(
    model: Annotated[
        str,
        typer.Option(
            help="Model folder or hub id: of a supported family, or any that transformers loads as image-text-to-text; "
            "with --endpoint the model's name at the server."
        ),
    ],
    bench: Annotated[Path, typer.Option(help="Benchmark file.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder, continued if it is the same run (default: runs/<model>).")
    ] = None,
    mode: Annotated[
        ModeName,
        typer.Option(
            help="letters: probability of the option letters; options: likelihood of the option texts, summed over "
            "their tokens (options-mean: per token); generate: a written reply, parsed strictly; auto: letters, or "
            "generate at an endpoint without log-probabilities."
        ),
    ] = "auto",
    rotations: Annotated[
        int, typer.Option(help="Number of rotations of the options per question.", min=1, max=26)
    ] = 1,
    shard: Annotated[
        str | None, typer.Option(help="Answer only part i/n, from 0/n to n-1/n; see eval-mcq merge.")
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Questions times rotations per step, grouped by image; halved if out of memory. Must be the same for "
            "all shards.",
            min=1,
        ),
    ] = 32,
    limit: Annotated[
        int | None, typer.Option(help="Use only this many questions from the beginning.", min=1)
    ] = None,
    device: compute.Device = "auto",
    precision: compute.Computed = "auto",
    load_in_4bit: FourBit = False,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="How computation is shared between questions, for debugging; plain: not at all. vllm: letters are "
            "scored by vLLM, see docs/engines.md."
        ),
    ] = "auto",
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Python of vLLM's environment (default: $MGLL_VLLM_PYTHON, or this one)."),
    ] = None,
    vllm_options: Annotated[
        list[str] | None,
        typer.Option(
            "--vllm-option",
            metavar="NAME=VALUE",
            help="Option of vllm.LLM, such as tensor_parallel_size=2; repeatable.",
        ),
    ] = None,
    allow_leak: Annotated[
        bool,
        typer.Option(
            "--allow-leak",
            help="Run even if the model was trained on images of the benchmark; the run, its tables and the report "
            "say how many.",
        ),
    ] = False,
    endpoint: at.Url = None,
    concurrency: at.Concurrency = None,
    timeout: at.Timeout = None,
    retries: at.Retries = None,
    key_variable: at.KeyVariable = None,
    longest_side: at.LongestSide = None,
    reply_tokens: at.ReplyTokens = None,
    allow_upload: at.AllowUpload = False,
    force: Force = False,
) -> None:
    """Run a benchmark on a model. Resumable: re-run the same command to continue.

    Example: eval-mcq run --model llava-med-mgll --bench test.jsonl --rotations 4 --out runs/llava-med-mgll

    Example: eval-mcq run --endpoint http://localhost:8000/v1 --model google/medgemma-4b-it --bench test.jsonl
    """
    server = at.endpoint_of(
        endpoint, concurrency=concurrency, timeout=timeout, retries=retries, key_variable=key_variable,
        longest_side=longest_side, reply_tokens=reply_tokens, allow_upload=allow_upload,
    )  # fmt: skip
    part = api.shard_of(shard)
    folder = out or api.default_run_folder(model)
    done = api.run(
        model, bench, folder, endpoint=server, mode=mode, rotations=rotations, shard=shard, batch_size=batch_size,
        limit=limit, device=device, precision=precision, load_in_4bit=load_in_4bit, engine=engine,
        vllm_python=vllm_python, vllm_options=vllm_options or (), allow_leak=allow_leak, force=force,
    )  # fmt: skip
    if done is None:
        return
    if done.answers:
        _show_table(
            {"": {Path(model).resolve().name: done}}, "rich", "auto", None, paper_rounding=False, force=False
        )
    else:
        note(f"{folder}: no question is answered in all rotations")
    if part.count > 1:
        say(
            f"Next, when all {part.count} shards are done: eval-mcq merge {shlex.quote(str(folder))} ... --out RUN"
        )
        return
    if not done.complete:
        say(f"Next, for the rest: the same command without --limit (continues {folder})")
    say(_comparison(folder))


def _comparison(folder: Path) -> str:
    """Return the command that compares a run with another one; the first arm is the reference."""
    name = re.sub(r"[:=]", "-", folder.resolve().name)  # both have a meaning in NAME=RUN
    arms = (
        [f"{name}={folder}", "OTHER=OTHER_RUN"] if name == "base" else ["base=OTHER_RUN", f"{name}={folder}"]
    )
    return next_line("eval-mcq compare {} {}", *arms)


@app.command()
@needs("eval")
def table(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    format_: FormatOption = "rich",
    table_layout: TableLayoutOption = "auto",
    out: OutFile = None,
    paper_rounding: PaperRounding = False,
    force: Force = False,
) -> None:
    """Show the table of one run.

    Example: eval-mcq table runs/llava-med --format markdown
    """
    from eval_mcq.records.run_record import load_run

    arms = {run_folder.resolve().name: load_run(run_folder)}
    _show_table({"": arms}, format_, table_layout, out, paper_rounding, force)


@app.command("compare")
@needs("eval")
def compare_command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL:]ARM=RUN...",
            help="Arms; gains are against the control, without one against a model's first arm.",
        ),
    ],
    control_arm: ControlOption = None,
    format_: FormatOption = "rich",
    table_layout: TableLayoutOption = "auto",
    out: OutFile = None,
    paper_rounding: PaperRounding = False,
    compare: Annotated[
        Literal["paper"] | None,
        typer.Option(help="paper: add the published results of the MGLL paper."),
    ] = None,
    force: Force = False,
) -> None:
    """Compare runs of one benchmark, paired question by question, for one model or several.

    Example: eval-mcq compare base=runs/llava-med control=runs/llava-med-ft mgll=runs/llava-med-mgll

    Example: eval-mcq compare LLaVA:base=runs/a LLaVA:mgll=runs/b Qwen-VL:base=runs/c Qwen-VL:mgll=runs/d
    """
    from eval_mcq.records.run_record import load_run

    models: dict[str, dict[str, Run]] = {}
    for given in runs:
        name, equals, folder = given.partition("=")
        model, colon, arm = name.rpartition(":")
        if not (arm and equals and folder and bool(model) == bool(colon)):
            raise InvalidArgumentError(
                f"arm '{given}' does not have the form NAME=RUN, such as base=runs/llava-med, or MODEL:NAME=RUN"
            )
        arms = models.setdefault(model, {})
        if arm in arms:
            raise InvalidArgumentError(f"two arms are named '{name}': use different names")
        arms[arm] = load_run(Path(folder))
    if "" in models and len(models) > 1:
        raise InvalidArgumentError(
            "some arms name a model (MODEL:NAME=RUN) and some do not: name one for all of them, or for none"
        )
    if sum(map(len, models.values())) < 2:
        raise InvalidArgumentError(
            "compare needs two or more NAME=RUN; for a single run use eval-mcq table RUN"
        )
    _show_table(models, format_, table_layout, out, paper_rounding, force, compare, control_arm)


@app.command()
@needs("report")
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN...",
            help="Run folders; gains are against the control, without one against the first.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Page to write (.html).")],
    control_arm: ControlOption = None,
    bench: Annotated[Path | None, typer.Option(help="Benchmark file, if it was moved.")] = None,
    assets: Annotated[
        Path | None, typer.Option(help="Folder for the thumbnails, instead of inside the page.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots as PNG and SVG files.")] = None,
    thumbnail_size: Annotated[int, typer.Option(help="Longer side of a thumbnail in pixels.", min=16)] = 256,
    thumbnails: Annotated[bool, typer.Option("--thumbnails/--no-thumbnails", help="Show the images.")] = True,
    force: Force = False,
) -> None:
    """Write an HTML report: table, plots, every question with image and answers, and how the models were trained.

    The page needs no network and no other file; its filters and keys find the answers that the swap changed.

    Example: eval-mcq report base=runs/llava-med mgll=runs/llava-med-mgll --out report.html --plots plots
    """
    from eval_mcq.records.run_record import load_run

    named: dict[str, Run] = {}
    for arm in runs:
        name, equals, folder = arm.rpartition("=")
        path = Path(folder)
        name = name if equals else path.resolve().name
        if name in named:
            raise InvalidArgumentError(f"two arms are named '{name}': use different names, as NAME=RUN")
        named[name] = load_run(path)
    count = api.report(
        named,
        out,
        control_arm=control_arm,
        bench=bench,
        assets=assets,
        plots=plots,
        thumbnail_size=thumbnail_size,
        thumbnails=thumbnails,
        force=force,
    )
    size = out.stat().st_size / 1e6
    where = f"in {assets}" if assets else "inside"
    say(f"report: {out} ({size:.1f} MB, {count} thumbnails {where})")
    if plots:
        say(f"plots: {plots}")


def _show_table(
    models: "dict[str, dict[str, Run]]",
    format_: Format,
    table_layout: TableLayout,
    out: Path | None,
    paper_rounding: bool,
    force: bool,
    compare: Literal["paper"] | None = None,
    control_arm: str | None = None,
) -> None:
    from eval_mcq.tables.render import show

    if out is not None:
        check_free(out, force)
    if table_layout == "auto":
        table_layout = "diseases" if format_ == "rich" and compare is None and len(models) == 1 else "paper"
    found = api.compare(
        models,
        control_arm=control_arm,
        table_layout=table_layout,
        paper_rounding=paper_rounding,
        compare=compare,
    )
    if out is not None:
        write_text(out, found.render(format_), force)
        say(f"table: {out}")
    elif format_ == "rich":
        show(found.grid, stdout)
    else:
        typer.echo(found.render(format_), nl=False)


for name, command in {**ITEM_COMMANDS, **RUN_COMMANDS}.items():
    app.command(name)(command)


def main() -> None:
    """Entry point of the console command."""
    run(app, "eval-mcq")


if __name__ == "__main__":
    main()
