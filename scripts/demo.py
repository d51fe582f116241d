"""From nothing to a table of three arms in about three minutes, on phantom images: ``make demo``.

python scripts/demo.py --out demo

A general tower learns what is seen in photographs without naming a disease. A small LLaVA on it is taught to answer
questions: the base. A second tower starts from the general one and learns the diseases with the MGLL losses. It is
swapped in, and the projectors of both models are retrained alike: the control and + MGLL. A fourth arm has the new
tower with a projector fitted in closed form, without a step of training.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from stages import Stage, Stages

from mgll_encoder.common import cli

app = cli.new_app("Everything from images to a table, on phantom images.")

MODELS = {"base": "base", "control": "base-retrained", "mgll": "mgll-retrained", "aligned": "mgll-aligned"}
"""Arm of the table -> model."""

NEXT = """\
With your own files, type next:
  swap-encoder --mllm YOUR_LLAVA --encoder YOUR_TOWER --align PHOTOGRAPHS/ --out mgll
  retrain-projector --model mgll --control YOUR_LLAVA --data train.json --images PHOTOGRAPHS/ --out mgll-retrained
  eval-mcq run --model mgll-retrained --bench test.jsonl --out runs/mgll    # questions: eval-mcq build --help"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        general: Pictures per disease that the general tower learns from.
        pictures: Pictures per disease of the patients of training and test questions.
        general_epochs: Passes of the general tower.
        mgll_epochs: Passes of the MGLL tower.
        words: Questions about written pictures that the language model practices.
        captions: Captions that it practices.
        questions: Questions about pictures that it practices.
        epochs: Passes of each retraining.
    """

    general: int
    pictures: int
    general_epochs: int
    mgll_epochs: int
    words: int
    captions: int
    questions: int
    epochs: int


FULL = Sizes(
    general=150,
    pictures=200,
    general_epochs=2,
    mgll_epochs=12,
    words=6_000,
    captions=6_400,
    questions=4_800,
    epochs=6,
)
QUICK = Sizes(
    general=8, pictures=40, general_epochs=1, mgll_epochs=1, words=32, captions=32, questions=32, epochs=1
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of all outputs; a finished stage is not run again.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same stages at sizes that teach nothing.")
    ] = False,
) -> None:
    """Draw phantom fundus photographs, train two towers, swap, retrain, evaluate.

    Example: python scripts/demo.py --out demo
    """
    if fresh and out.exists():
        shutil.rmtree(out)
    stages = Stages(out / "logs")
    stages.run(until_the_answers(out, QUICK if quick else FULL))
    runs = {arm: out / "runs" / arm for arm in MODELS}
    stages.run(the_reports(out, [f"{arm}={run}" for arm, run in runs.items()]))
    show(runs)
    cli.stdout.print(
        f"\nDone in {stages.total:.0f} s. This is a phantom: drawn pictures and models of toy size. It shows the path, "
        "and says nothing about patients or about the method.\n"
        f"Look at: {out / 'report.html'}, {out / 'table.md'}, {out / 'phantom' / 'contact_sheet.png'}\n\n{NEXT}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def until_the_answers(out: Path, sizes: Sizes) -> list[Stage]:
    """The stages from the pictures to the answers of all arms."""
    general, phantom, towers, models = (out / name for name in ("general", "phantom", "towers", "models"))
    train, test = out / "train.jsonl", out / "test.jsonl"

    def draw(title: str, folder: Path, per_disease: int, seed: int) -> Stage:
        numbers = ["--images-per-disease", str(per_disease), "--seed", str(seed)]
        return Stage(title, folder, ["mgll-encoder", "data", "phantom", *numbers, "--out", folder])

    def learn(title: str, tower: str, manifest: Path, images: Path, *options: str | Path) -> Stage:
        command: list[str | Path] = [
            "mgll-encoder",
            "pretrain",
            "--manifest",
            manifest,
            "--images",
            images,
            *options,
        ]
        return Stage(title, towers / tower, [*command, "--out", towers / tower])

    def questions(side: str, bench: Path) -> Stage:
        labels: list[str | Path] = [
            "--labels",
            phantom / "labels.csv",
            "--images",
            phantom,
            "--preset",
            "fundus10",
        ]
        command: list[str | Path] = [
            "eval-mcq",
            "build",
            *labels,
            "--patient-column",
            "patient_or_source_id",
            "--split",
            side,
        ]
        return Stage(f"Questions about the {side} patients", bench, [*command, "--out", bench])

    def swap(title: str, model: str, *options: str | Path) -> Stage:
        command: list[str | Path] = [
            "swap-encoder",
            "--mllm",
            models / "base",
            "--encoder",
            towers / "mgll",
            *options,
        ]
        return Stage(title, models / model, [*command, "--out", models / model])

    def retrain(title: str, model: str) -> Stage:
        target = models / f"{model}-retrained"
        command: list[str | Path] = [
            "retrain-projector",
            "--model",
            models / model,
            "--data",
            train,
            "--report-to",
            "none",
        ]
        numbers = ["--epochs", str(sizes.epochs), "--learning-rate", "2e-3"]
        return Stage(title, target, [*command, *numbers, "--out", target])

    def ask(arm: str) -> Stage:
        run = out / "runs" / arm
        command: list[str | Path] = [
            "eval-mcq",
            "run",
            "--model",
            models / MODELS[arm],
            "--bench",
            test,
            "--out",
            run,
        ]
        return Stage(f"Answers of {arm}", run / "summary.json", command)

    practice = [
        "--words", str(sizes.words), "--captions", str(sizes.captions), "--questions", str(sizes.questions),
    ]  # fmt: skip
    return [
        draw("Phantom photographs for the general tower", general, sizes.general, seed=1),
        draw("Phantom photographs of other patients", phantom, sizes.pictures, seed=0),
        learn(
            "General tower: eye, light, color", "general", general / "views.jsonl", general,
            "--loss", "clip", "--tower-size", "nano", "--epochs", str(sizes.general_epochs), "--learning-rate", "1e-3",
        ),
        Stage(
            "Texts of the training patients", out / "manifest.jsonl",
            ["mgll-encoder", "data", "fundus", "--labels", phantom / "labels.csv", "--images", phantom,
             "--out", out / "manifest.jsonl"],
        ),
        questions("train", train),
        learn(
            "MGLL tower: the diseases", "mgll", out / "manifest.jsonl", phantom,
            "--loss", "mgll", "--init", towers / "general", "--text-tower", "new",
            "--granularities", "status,disease,keyword", "--epochs", str(sizes.mgll_epochs), "--learning-rate", "1e-3",
        ),
        Stage(
            "A small LLaVA on the general tower", models / "base",
            ["build_smol_llava.py", "--tower", towers / "general", "--data", train, "--images", phantom,
             "--lm", "tiny", *practice, "--out", models / "base"],
        ),
        questions("test", test),
        swap("The swap", "mgll"),
        retrain("Retraining: + MGLL", "mgll"),
        retrain("Retraining: the control", "base"),
        swap("The swap, aligned without training", "mgll-aligned", "--align", train),
        *(ask(arm) for arm in ("base", "control", "mgll", "aligned")),
    ]  # fmt: skip


def the_reports(out: Path, arms: Sequence[str]) -> list[Stage]:
    """Table and report as files."""
    return [
        Stage(
            "Report", out / "report.html", ["eval-mcq", "report", *arms, "--out", out / "report.html"]
        ),
        Stage(
            "Table as Markdown", out / "table.md",
            ["eval-mcq", "compare", *arms, "--format", "markdown", "--table-layout", "diseases",
             "--out", out / "table.md"],
        ),
    ]  # fmt: skip


def show(runs: Mapping[str, Path]) -> None:
    """Print the three arms, and what the fourth keeps."""
    from eval_mcq.records.run_record import load_run
    from eval_mcq.tables import render
    from eval_mcq.tables.entries import entries_of
    from eval_mcq.tables.rounding import Rounding
    from eval_mcq.tables.summary import compare
    from eval_mcq.tables.table_layout import by_disease

    loaded = {arm: load_run(run) for arm, run in runs.items()}
    aligned = compare({arm: loaded[arm] for arm in ("base", "aligned")})
    arms = compare({arm: loaded[arm] for arm in ("base", "control", "mgll")})
    render.show(by_disease(arms), cli.stdout)
    base, fitted = entries_of(aligned, Rounding())[-2].figures
    better = sum(arms.arms[2].cells[c].share > arms.arms[1].cells[c].share for c in arms.categories)
    cli.stdout.print(
        f"mgll is above the control on {better} of {len(arms.categories)} diseases.\n"
        f"The new tower with an aligned projector, without a step of training: {fitted.value} % "
        f"{fitted.interval} (base {base.value} %, chance {100 * arms.macro_chance:.1f} %).",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    cli.run(app)
