"""The long commands on tiny inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TRAINING = (
    "--data", "{in}/train.json", "--images", "{in}/colors", "--max-steps", "4", "--batch-size", "2",
    "--learning-rate", "1e-2", "--logging-steps", "1", "--save-steps", "1", "--report-to", "none", "--workers", "0",
)  # fmt: skip


EXPORT = ("eval-mcq", "export", "{in}/bench/bench.jsonl")


@dataclass(frozen=True)
class Command:
    """A command that is disturbed.

    Attributes:
        name: For the summary.
        arguments: As typed in an empty folder; ``{in}`` is the folder of inputs, ``{done}`` that of working folders of
            commands that were not disturbed.
        resumes: Whether ``--resume`` goes on after an interruption.
        continues: Whether the same command goes on after one.
        needs: Commands whose outputs are inputs of this one.
    """

    name: str
    arguments: tuple[str, ...]
    resumes: bool = False
    continues: bool = False
    needs: tuple[str, ...] = ()

    def typed(self, inputs: Path, done: Path, *more: str) -> list[str]:
        """What is typed."""
        parts = (part.replace("{in}", str(inputs)).replace("{done}", str(done)) for part in self.arguments)
        return [*parts, *more]


def _swap(*more: str, out: str = "out") -> tuple[str, ...]:
    return ("swap-encoder", "--mllm", "{in}/host", "--encoder", "{in}/tower", "--out", out, *more)


COMMANDS = (
    Command("swap", _swap()),
    Command("swap --copy", _swap("--copy")),
    Command("convert", ("swap-encoder", "convert", "--mllm", "{in}/original", "--out", "out")),
    Command("delta", _swap("--delta-only")),
    Command(
        "compose",
        ("swap-encoder", "compose", "--mllm", "{in}/host", "--delta", "{done}/delta/out", "--out", "out"),
        needs=("delta",),
    ),
    Command("align", _swap("--align", "{in}/drawn", "--align-samples", "60")),
    Command(
        "retrain",
        ("retrain-projector", "--model", "{in}/host", "--out", "out", *TRAINING),
        resumes=True,
    ),
    Command(
        "lora",
        ("finetune-lora", "--model", "{in}/host", "--out", "out", "--merge", *TRAINING),
        resumes=True,
    ),
    Command(
        "pretrain",
        (
            "mgll-encoder", "pretrain", "--manifest", "{in}/phantom/manifest.jsonl", "--tower-size", "tiny", "--epochs",
            "2", "--batch-size", "16", "--workers", "0", "--out", "out",
        ),
        resumes=True,
    ),
    Command(
        "data xray",
        ("mgll-encoder", "data", "xray", "--dicom", "{in}/dicom", "--workers", "1", "--out", "out"),
    ),
    Command(
        "data fundus",
        (
            "mgll-encoder", "data", "fundus", "--labels", "{in}/phantom/labels.csv", "--images", "{in}/phantom",
            "--out", "manifest.jsonl",
        ),
    ),
    Command(
        "build",
        (
            "eval-mcq", "build", "--labels", "{in}/phantom/labels.csv", "--images", "{in}/phantom", "--options", "2",
            "--out", "bench.jsonl",
        ),
    ),
    Command(
        "run",
        (
            "eval-mcq", "run", "--model", "{in}/host", "--bench", "{in}/bench/bench.jsonl", "--rotations", "4",
            "--batch-size", "2", "--device", "cpu", "--out", "out",
        ),
        continues=True,
    ),
    Command(
        "merge",
        ("eval-mcq", "merge", "{done}/shard 0/out", "{done}/shard 1/out", "--out", "out"),
        needs=("shard 0", "shard 1"),
    ),
    Command(
        "report",
        (
            "eval-mcq", "report", "a={done}/run/out", "b={done}/run/out", "--out", "report.html", "--assets", "assets",
            "--plots", "plots",
        ),
        needs=("run",),
    ),
    Command("export file", (*EXPORT, "--format", "vlmevalkit", "--out", "out.tsv")),
    Command("export folder", (*EXPORT, "--format", "lmms-eval", "--out", "out")),
)  # fmt: skip

SHARDS = tuple(
    Command(f"shard {i}", (*next(c for c in COMMANDS if c.name == "run").arguments, "--shard", f"{i}/2"))
    for i in range(2)
)

BY_NAME: Mapping[str, Command] = {command.name: command for command in (*COMMANDS, *SHARDS)}


def make_inputs(folder: Path) -> Path:
    """Everything that the commands read, but for outputs of other commands."""
    for make in (_models, _pictures, _phantom, _radiographs):
        make(folder)
    return folder


def _models(folder: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    from tests.builders import tiny_llava
    from tests.mllm_adapters.llava_checkpoints import a_tower, original_llava

    host = tiny_llava(folder / "host")
    model = LlavaForConditionalGeneration.from_pretrained(host)
    (host / "model.safetensors").unlink()
    model.save_pretrained(host, max_shard_size="100KB")
    a_tower(folder / "tower")
    original_llava(Path(__file__).parents[1] / "golden", "llava", folder / "original")


def _pictures(folder: Path) -> None:
    from tests.eval_mcq.helpers import small_bench
    from tests.mllm_adapters.retraining import color_rows, write_json
    from tests.mllm_adapters.test_align import drawn_pictures

    write_json(folder / "train.json", color_rows(folder / "colors"))
    small_bench(folder / "bench")
    drawn_pictures(folder / "drawn", 60)


def _phantom(folder: Path) -> None:
    from mgll_encoder.data.fundus import FundusTable, build_fundus
    from mgll_encoder.data.phantom.dataset import write_phantom

    write_phantom(folder / "phantom", 4, image_size=32)
    build_fundus(
        FundusTable(folder / "phantom" / "labels.csv"),
        folder / "phantom",
        folder / "phantom" / "manifest.jsonl",
        test_share=0.2,
        val_share=0.2,
    )


def _radiographs(folder: Path) -> None:
    from tests.mgll_encoder.test_xray import radiograph

    for i in range(12):
        pixels = np.tile(np.linspace(100 * i, 4095 - 100 * i, 64).astype(np.uint16), (48, 1))
        radiograph(folder / "dicom" / f"p{i // 2}" / f"{i}.dcm", pixels)
