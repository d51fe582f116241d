"""Commands of ``eval-mcq`` that work on runs of a model: merge and check; and what ``run`` is made of."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eval_mcq.cli.items import Force
from mgll_encoder.common.cli import note, stdout, warn
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.extras import needs, require

if TYPE_CHECKING:
    import torch

    from eval_mcq.items.schema import Bench
    from eval_mcq.runs.records import Run, RunRecord
    from eval_mcq.runs.run import Settings
    from eval_mcq.scoring.prompt import Mode
    from eval_mcq.scoring.score import Scorer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ModeName = Literal["letters", "options", "options-mean", "generate"]
WayName = Literal["auto", "prefix", "tree", "plain"]

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

WAIT = 2.0
"""Seconds between two looks at whether the other processes are done."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    model: Path
    device: "torch.device"
    dtype: "torch.dtype"
    four_bit: bool

    @property
    def number_format(self) -> str:
        """For the record of a run."""
        return str(self.dtype).removeprefix("torch.") + (", nf4" if self.four_bit else "")

    def scorer(self, mode: "Mode" = "letters", way: WayName = "auto") -> "Scorer":
        """Load the model.

        Raises:
            UserError: it cannot be loaded, or not in this number format.
        """
        from eval_mcq.scoring.score import Scorer
        from mllm_adapters import load_mllm

        note(f"Loading {self.model} on {self.device} ...")
        model, processor = load_mllm(self.model, dtype=self.dtype, quantization=self._quantisation())
        if self.four_bit and not getattr(model, "is_quantized", False):
            raise UserError(
                f"{self.model} is not in the transformers layout, so that it cannot be loaded in 4 bit: convert it "
                "first with swap-encoder"
            )
        return Scorer(model, processor, self.device, self.dtype, mode, way)

    def _quantisation(self) -> Any:
        if not self.four_bit:
            return None
        from mgll_encoder.common.texts import read_json
        from mllm_adapters.training.quantisation import nf4

        config = self.model / "config.json"
        return nf4(read_json(config) if config.is_file() else {}, self.model, self.dtype)


def loading(model: Path, device: str, dtype: Dtype, four_bit: bool) -> Loading:
    """Settle device and number format.

    Raises:
        UserError: there is no such device.
    """
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    automatic = f"cuda:{local % max(torch.cuda.device_count(), 1)}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(automatic if device == "auto" else device)
    except RuntimeError:
        raise unknown_name("device", device, ["auto", "cpu", "cuda", "cuda:1"]) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device '{device}' is not there: this machine has no GPU that torch sees; use --device cpu"
        )
    if dtype == "auto":
        return Loading(model, chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32, four_bit)
    return Loading(model, chosen, getattr(torch, dtype), four_bit)


def answer(
    bench: "Bench", load: Callable[[], "Scorer"], record: "RunRecord", out: Path, settings: "Settings"
) -> "Run | None":
    """Run a bench here, or, under ``accelerate launch`` and its like, together with the other processes.

    Each process answers a shard in a folder of its own; the first one waits for the others and merges. They share
    nothing but the file system.

    Returns:
        The run; None in all processes but the first.

    Raises:
        UserError: see `run_bench`; or processes were launched although a shard was named.
    """
    from eval_mcq.runs.answers_file import only_run
    from eval_mcq.runs.plan import Shard
    from eval_mcq.runs.records import read_run
    from eval_mcq.runs.run import check_resumable, run_bench

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return run_bench(bench, load, record, out, settings)
    if settings.shard.count > 1 or settings.limit is not None:
        raise UserError(
            "--shard and --limit are for a process on its own: leave them out under accelerate launch"
        )
    check_resumable(out, record, settings.force)
    if out.exists() and not settings.force and (whole := read_run(out)).complete:
        return whole if rank == 0 else None
    folders = [out.with_name(f"{out.name}.shards") / f"{i}-of-{world}" for i in range(world)]
    shard = Shard(rank, world)
    own = record.model_copy(update={"shard": shard.name})

    def answer_own() -> None:
        run_bench(bench, load, own, folders[rank], replace(settings, shard=shard))

    if rank > 0:
        answer_own()
        return None
    with only_run(out):
        answer_own()
        return _merged(folders, record, bench, out, settings)


def _merged(
    folders: list[Path], record: "RunRecord", bench: "Bench", out: Path, settings: "Settings"
) -> "Run":
    """The first process's last duty: wait for all shards, merge them, clear them away."""
    import shutil

    from eval_mcq.runs.answers_file import only_run
    from eval_mcq.runs.merge import merge_held
    from eval_mcq.runs.run import answered, planned_rows

    note(f"Waiting for the other {len(folders) - 1} processes ...")
    expected = planned_rows(bench, record, settings, len(folders))
    while any(answered(f) < n for f, n in zip(folders, expected, strict=True)):
        time.sleep(WAIT)
    for folder in folders:
        with only_run(folder, wait=True):  # its process has still to put them in order
            pass
    run = merge_held(folders, out, bench.path, force=True)
    shutil.rmtree(folders[0].parent)
    return run


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
) -> None:
    """See whether a model looks at the picture: real, blank and exchanged images; letter prior; provenance; prompt.

    Exits with 2 where the answers do not depend on the image, or where the tower is not the one that was put in.

    Example: eval-mcq check llava-med-mgll --bench test.jsonl
    """
    from eval_mcq.items.schema import MCQItem, load_bench
    from eval_mcq.runs.checks import contradictions, look
    from eval_mcq.runs.fingerprint import model_fingerprint
    from eval_mcq.runs.leaks import find_leak, trainings_of_model
    from mllm_adapters.locate import PROVENANCE

    asked = load_bench(bench) if bench else None
    fingerprint = model_fingerprint(model)
    from mllm_adapters.swap.verify import Verification

    swap = Verification(model) if (model / PROVENANCE).is_file() else None
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
        found = look(scorer, asked, questions)
        _show_look(found)
        for warning in found.warnings:
            warn(warning)
        wrong += [] if found.sees else found.warnings[:1]
    if wrong:
        raise UserError(f"{model}: {'; '.join(wrong)}")


def _show_look(found: Any) -> None:
    from rich.table import Table

    from eval_mcq.items.schema import LETTERS

    grid = Table(
        "images", "accuracy", "largest change", title=f"{found.questions} questions", title_justify="left"
    )
    for kind, share in found.right.items():
        moved = f"{found.moved[kind]:.4f}" if kind in found.moved else ""
        grid.add_row(kind, f"{100 * share:.1f}", moved)
    stdout.print(grid)
    prior = ", ".join(f"{letter} {p:.2f}" for letter, p in zip(LETTERS, found.prior, strict=False))
    stdout.print(f"letter prior (blank image, no question): {prior}", highlight=False)
    if found.mass is not None:
        stdout.print(f"probability on the letters: {found.mass:.2f}", highlight=False)


COMMANDS: Mapping[str, Callable[..., None]] = {"merge": merge_command, "check": check}
"""Name of the command to its function."""
