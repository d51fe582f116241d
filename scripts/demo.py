"""From nothing to a table of four arms in about three minutes, on phantom images: ``make demo``.

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
    mgll_epochs=9,
    words=4_000,
    captions=4_000,
    questions=3_600,
    epochs=4,
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
    runs = {arm: out / "runs" / arm for arm in MODELS}
    reports = the_reports(out, [f"{arm}={run}" for arm, run in runs.items()])
    stages.run([*until_the_answers(out, QUICK if quick else FULL), *reports])
    show(runs)
    cli.say(
        f"\nDone in {stages.total:.0f} s. This is a phantom: drawn pictures and models of toy size. It shows the path, "
        "and says nothing about patients or about the method.\n"
        f"Look at: {out / 'report.html'}, {out / 'table.md'}, {out / 'phantom' / 'contact_sheet.png'}\n\n{NEXT}"
    )


@dataclass(frozen=True)
class _Stages:
    """Makes the stages of a demo in ``out``."""

    out: Path
    sizes: Sizes

    def draw(self, title: str, folder: str, per_disease: int, seed: int) -> Stage:
        numbers = ["--images-per-disease", str(per_disease), "--seed", str(seed)]
        place = self.out / folder
        return Stage(title, place, ["mgll-encoder", "data", "phantom", *numbers, "--out", place])

    def learn(self, title: str, tower: str, manifest: Path, images: str, *options: str | Path) -> Stage:
        place = self.out / "towers" / tower
        command: list[str | Path] = [
            "mgll-encoder",
            "pretrain",
            "--manifest",
            manifest,
            "--images",
            self.out / images,
            *options,
        ]
        return Stage(title, place, [*command, "--out", place])

    def questions(self, side: str) -> Stage:
        bench, phantom = self.out / f"{side}.jsonl", self.out / "phantom"
        command: list[str | Path] = [
            "eval-mcq", "build", "--labels", phantom / "labels.csv", "--images", phantom, "--preset", "fundus10",
            "--patient-column", "patient_or_source_id", "--split", side,
        ]  # fmt: skip
        return Stage(f"Questions about the {side} patients", bench, [*command, "--out", bench])

    def swap(self, title: str, model: str, *options: str | Path) -> Stage:
        models, tower = self.out / "models", self.out / "towers" / "mgll"
        command: list[str | Path] = ["swap-encoder", "--mllm", models / "base", "--encoder", tower, *options]
        return Stage(title, models / model, [*command, "--out", models / model])

    def retrain(self, title: str, model: str) -> Stage:
        models = self.out / "models"
        command: list[str | Path] = [
            "retrain-projector", "--model", models / model, "--data", self.out / "train.jsonl", "--report-to", "none",
            "--epochs", str(self.sizes.epochs), "--batch-size", "8", "--learning-rate", "2e-3",
        ]  # fmt: skip
        target = models / f"{model}-retrained"
        return Stage(title, target, [*command, "--out", target])

    def ask(self, arm: str) -> Stage:
        model, bench, run = (
            self.out / "models" / MODELS[arm],
            self.out / "test.jsonl",
            self.out / "runs" / arm,
        )
        command: list[str | Path] = ["eval-mcq", "run", "--model", model, "--bench", bench, "--out", run]
        return Stage(f"Answers of {arm}", run / "summary.json", command)


def until_the_answers(out: Path, sizes: Sizes) -> list[Stage]:
    """The stages from the pictures to the answers of all arms."""
    stages = _Stages(out, sizes)
    phantom, towers, base, manifest = (
        out / "phantom",
        out / "towers",
        out / "models" / "base",
        out / "manifest.jsonl",
    )
    practice = [
        "--words", str(sizes.words), "--captions", str(sizes.captions), "--questions", str(sizes.questions),
        "--captions-replay", "0.3", "--batch", "8", "--words-rate", "1e-3",
    ]  # fmt: skip
    return [
        stages.draw("Phantom photographs for the general tower", "general", sizes.general, seed=1),
        stages.draw("Phantom photographs of other patients", "phantom", sizes.pictures, seed=0),
        stages.learn(
            "General tower: eye, light, color", "general", out / "general" / "views.jsonl", "general",
            "--loss", "clip", "--tower-size", "nano", "--epochs", str(sizes.general_epochs), "--learning-rate", "1e-3",
        ),
        Stage(
            "Texts of the training patients", manifest,
            ["mgll-encoder", "data", "fundus", "--labels", phantom / "labels.csv", "--images", phantom,
             "--out", manifest],
        ),
        stages.questions("train"),
        stages.learn(
            "MGLL tower: the diseases", "mgll", manifest, "phantom",
            "--loss", "mgll", "--init", towers / "general", "--text-tower", "new",
            "--granularities", "status,disease,keyword", "--epochs", str(sizes.mgll_epochs), "--learning-rate", "1e-3",
        ),
        Stage(
            "A small LLaVA on the general tower", base,
            ["build_smol_llava.py", "--tower", towers / "general", "--data", out / "train.jsonl", "--images", phantom,
             "--lm", "tiny", *practice, "--out", base],
        ),
        stages.questions("test"),
        stages.swap("The swap", "mgll"),
        stages.retrain("Retraining: + MGLL", "mgll"),
        stages.retrain("Retraining: the control", "base"),
        stages.swap("The swap, aligned without training", "mgll-aligned", "--align", out / "train.jsonl"),
        *(stages.ask(arm) for arm in ("base", "control", "mgll", "aligned")),
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
    """Print the four arms, and what the last one is."""
    from eval_mcq.records.run_record import load_run
    from eval_mcq.tables import render
    from eval_mcq.tables.summary import compare
    from eval_mcq.tables.table_layout import by_disease

    arms = compare({arm: load_run(run) for arm, run in runs.items()})
    render.show(by_disease(arms), cli.stdout)
    found = dict(zip(runs, arms.arms, strict=True))
    better = sum(found["mgll"].cells[c].share > found["control"].cells[c].share for c in arms.categories)
    cli.say(
        f"mgll is above the control on {better} of {len(arms.categories)} diseases. aligned has the new tower and a "
        f"projector fitted in closed form, without a step of training. Chance is {100 * arms.macro_chance:.1f} %."
    )


if __name__ == "__main__":
    cli.run(app)
