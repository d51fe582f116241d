"""The pipeline from labeled images to a table of three arms, as the commands that a user would type.

base: a small LLaVA on a plain-CLIP tower; retrained: the same after retraining its projector; mgll: the same language
model with the MGLL tower, its projector retrained on the same data for the same steps. A step with an existing output
is skipped.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgll_encoder.common import cli
from mgll_encoder.common.errors import UserError

ARMS = {"base": "base", "retrained": "base-retrained", "mgll": "mgll-retrained"}
"""Arm of the table -> model."""


@dataclass(frozen=True)
class Settings:
    """What differs between the demo and a real run; options as typed.

    Attributes:
        labels: Label table.
        images: Image folder.
        preset: Diseases of the benchmark.
        columns: Further options of ``eval-mcq build``.
        pretrain: Options of ``mgll-encoder pretrain``.
        teach: Options of ``build_smol_llava.py``.
        retrain: Options of ``retrain-projector``.
    """

    labels: Path
    images: Path
    preset: str
    columns: Sequence[str]
    pretrain: Sequence[str]
    teach: Sequence[str]
    retrain: Sequence[str]


class Way:
    """Runs commands in order, prints them, and skips finished ones.

    Args:
        out: Output folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def step(self, title: str, output: str, command: str, *arguments: str | Path) -> Path:
        """Run a command that writes ``output`` (a path below the output folder), unless it exists.

        Raises:
            UserError: the command failed; its own message was printed before.
        """
        target = self.out / output
        if target.exists():
            cli.note(f"{title}: {target} exists")
            return target
        words = [command, *map(str, arguments)]
        cli.stdout.rule(f"{title} ({time.monotonic() - self.began:.0f} s)", align="left")
        cli.stdout.print(f"$ {shlex.join(words)}", style="bold", soft_wrap=True, markup=False)
        self.run(*words)
        return target

    def run(self, command: str, *arguments: str) -> None:
        """Run a console command of this project, or one of its scripts.

        Raises:
            UserError: it failed.
        """
        script = command.endswith(".py")
        program = [sys.executable, command] if script else [str(Path(sys.executable).with_name(command))]
        if subprocess.run([*program, *arguments], check=False).returncode:
            raise UserError(
                f"{command} failed: fix the error above and run this again; finished steps are kept"
            )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.began


def three_arms(way: Way, settings: Settings) -> None:
    """Train two towers, build a LLaVA, swap, retrain, evaluate, compare."""
    out, images = way.out, settings.images
    manifest = way.step(
        "Texts at several granularities", "manifest.jsonl",
        "mgll-encoder", "data", "fundus", "--labels", settings.labels, "--images", images,
        "--out", out / "manifest.jsonl",
    )  # fmt: skip
    towers = {
        loss: way.step(
            f"A tower trained with {title}", f"towers/{loss}",
            "mgll-encoder", "pretrain", "--data", manifest, "--images", images, "--loss", loss,
            *settings.pretrain, "--out", out / "towers" / loss,
        )
        for loss, title in (("clip", "plain CLIP"), ("mgll", "MGLL"))
    }  # fmt: skip
    for split in ("train", "test"):
        way.step(
            f"Questions about the {split} images", f"{split}.jsonl",
            "eval-mcq", "build", "--labels", settings.labels, "--images", images,
            "--preset", settings.preset, *settings.columns, "--split", split, "--out", out / f"{split}.jsonl",
        )  # fmt: skip
    conversations = way.step(
        "The training questions as conversations", "train.json",
        "eval-mcq", "export", out / "train.jsonl", "--images", images, "--out", out / "train.json",
    )  # fmt: skip
    base = way.step(
        "A small LLaVA on the plain-CLIP tower", "models/base",
        str(Path(__file__).with_name("build_smol_llava.py")), "--tower", towers["clip"],
        "--data", conversations, "--images", images, *settings.teach, "--out", out / "models" / "base",
    )  # fmt: skip
    way.step(
        "The swap", "models/mgll",
        "swap-encoder", "--mllm", base, "--encoder", towers["mgll"], "--out", out / "models" / "mgll",
    )  # fmt: skip
    for model in ("base", "mgll"):
        way.step(
            f"Retraining the projector of {model}", f"models/{model}-retrained",
            "retrain-projector", "--model", out / "models" / model, "--data", conversations, "--images", images,
            *settings.retrain, "--out", out / "models" / f"{model}-retrained",
        )  # fmt: skip
    for arm, model in ARMS.items():
        way.step(
            f"Questions to {model}", f"runs/{arm}/summary.json",
            "eval-mcq", "run", "--model", out / "models" / model, "--bench", out / "test.jsonl",
            "--out", out / "runs" / arm,
        )  # fmt: skip
    arms = [f"{arm}={out / 'runs' / arm}" for arm in ARMS]
    (out / "table.md").unlink(missing_ok=True)
    way.step(
        "The table as Markdown", "table.md",
        "eval-mcq", "compare", *arms, "--format", "markdown", "--out", out / "table.md",
    )  # fmt: skip
    cli.stdout.rule(f"The table ({way.seconds:.0f} s)", align="left")
    way.run("eval-mcq", "compare", *arms)
