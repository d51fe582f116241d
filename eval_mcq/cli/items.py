"""Commands of ``eval-mcq`` that need no model: import and export of questions, audit of a printed table."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from eval_mcq import api
from mgll_encoder.common.cli import next_line, note, say, stdout
from mgll_encoder.common.extras import needs
from mgll_encoder.common.files import check_free, write_text

Format = Literal["rich", "markdown", "csv", "latex"]
ImportFormat = Literal["vlmevalkit", "gmai", "omnimedvqa", "llava", "scienceqa", "hf", "parquet"]

Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
FormatOption = Annotated[Format, typer.Option("--format", help="Format of the table.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", help="Write the table to this file instead of the terminal.")
]


@needs("eval")
def import_command(
    source: Annotated[str, typer.Argument(help="File, folder of .json files, or hub id (format hf).")],
    out: Annotated[Path, typer.Option(help="Benchmark file to write (.jsonl or .parquet).")],
    format_: Annotated[ImportFormat, typer.Option("--format", help="Format of SOURCE.")],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths are relative to (default: the folder of SOURCE)."),
    ] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map", help="FIELD=COLUMN for a column with a different name, such as answer=label; repeatable."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split (hf, scienceqa).")] = None,
    name: Annotated[
        str, typer.Option(help="Name of the benchmark in tables (default: that of the file).")
    ] = "",
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Skip invalid questions instead of stopping; they are counted by reason, here and in every table of "
            "the benchmark.",
        ),
    ] = False,
    option_letters: Annotated[
        Literal["auto", "strip", "keep"],
        typer.Option(
            help="Letters in the options ('A. glaucoma'): strip them, keep them, or (auto) strip them if all "
            "questions of the file have them."
        ),
    ] = "auto",
    force: Force = False,
) -> None:
    """Import questions from another tool's file.

    Example: eval-mcq import GMAI_mm_bench_VAL.tsv --format gmai --out gmai.jsonl
    """
    report = api.import_benchmark(
        source, out, format_, images=images, maps=maps or (), split=split, name=name, skip_bad=skip_bad,
        option_letters=option_letters, force=force,
    )  # fmt: skip
    say(f"{out}: {report.questions.total()} questions")
    for category, count in report.questions.most_common():
        say(f"  {count:6d}  {category}")
    if report.pictures:
        note(f"{report.pictures} embedded images are in {out.stem}_images next to it")
    if report.folded:
        note(
            f"{report.folded} circular copies were merged into their questions (eval-mcq run --rotations does the same)"
        )
    if report.unlettered:
        note(
            f"letters or numbers were removed from the options of {report.unlettered} questions "
            "(--option-letters keep keeps them)"
        )
    report.skipped.say()
    say(after_bench(out, split))


def after_bench(bench: Path, split: str | None) -> str:
    """Return the command to type after a benchmark is written: questions of the train split are to train on."""
    trained = split == "train"
    return next_line(
        "retrain-projector --model MODEL --data {}" if trained else "eval-mcq run --model MODEL --bench {}",
        bench,
    )


@needs("eval")
def export(
    bench: Annotated[Path, typer.Argument(help="Benchmark file.")],
    out: Annotated[Path, typer.Option(help="File (for lmms-eval: folder) to write.")],
    format_: Annotated[
        Literal["llava", "messages", "trl", "vlmevalkit", "lmms-eval", "parquet", "jsonl"],
        typer.Option(
            "--format",
            help="llava: conversations JSON, for retrain-projector; messages: the same as messages and images, "
            "for LLaMA-Factory and ms-swift; trl: without placeholders, which TRL adds; vlmevalkit: TSV with "
            "images, or with --run its prediction table; lmms-eval: task folder; parquet: the benchmark with its "
            "images in one file.",
        ),
    ] = "llava",
    images: Annotated[
        Path | None,
        typer.Option(
            help="llava, messages, trl: folder that image paths are relative to (default: the folder of --out)."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="vlmevalkit: write the answers of this run, for scoring there."),
    ] = None,
    force: Force = False,
) -> None:
    """Write questions in another tool's format.

    Example: eval-mcq export train.jsonl --format llava --out train.json
    """
    count = api.export_benchmark(bench, out, format_, images=images, run=run, force=force)
    if run is not None:
        say(f"{out}: {count} predictions")
        return
    say(f"{out}: {count} questions")
    say(_after_export(format_, out, images or out.absolute().parent))


def _after_export(format_: str, out: Path, images: Path) -> str:
    """Return the next command to run."""
    from eval_mcq.formats.lmms_eval import task_name

    parent, task = out.absolute().parent, task_name(out)
    commands: dict[str, tuple[str, tuple[str | Path, ...]]] = {
        "llava": ("retrain-projector --model MODEL --data {} --images {}", (out, images)),
        "messages": ("finetune-lora --model MODEL --data {} --images {}", (out, images)),
        "trl": ("finetune-lora --model MODEL --data {} --images {}", (out, images)),
        "vlmevalkit": (
            "LMUData={} python run.py --data {} --model MODEL (in VLMEvalKit)",
            (parent, out.stem),
        ),
        "lmms-eval": ("python -m lmms_eval --include_path {} --tasks {} --model MODEL", (out, task)),
        "jsonl": ("eval-mcq run --model MODEL --bench {}", (out,)),
        "parquet": (
            "eval-mcq import {} --format parquet --out {} (on the machine it is sent to)",
            (out, f"{out.stem}.jsonl"),
        ),
    }
    template, values = commands[format_]
    return next_line(template, *values)


@needs("eval")
def audit(
    format_: FormatOption = "rich",
    out: OutFile = None,
    table_file: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="A printed table as JSON, in the form of the packaged one (default: that of the MGLL paper).",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Check which claims a published table can support, given its numbers of questions.

    Example: eval-mcq audit --format markdown --out audit.md
    """
    if out is not None:
        check_free(out, force)
    found = api.audit_table(table_file)
    if out is not None:
        write_text(out, found.render(format_), force)
        say(f"audit: {out}")
    elif format_ == "rich":
        from eval_mcq.tables.render import show

        show(found.by_disease.grid, stdout)
        show(found.by_model.grid, stdout)
    else:
        typer.echo(found.render(format_))


COMMANDS: Mapping[str, Callable[..., None]] = {"import": import_command, "export": export, "audit": audit}
"""Command name -> function."""
