"""Tables of the experiment: what its towers and its models are worth, from the outputs of its stages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiment_figures import Answers, Bools, Figure, Floats, Sample, classified, markdown
from numpy.typing import NDArray
from proof import POSITIVES, Arm, images_and_sources, texts_of_labels

from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.probing.features import cached_features
from mgll_encoder.probing.linear import kept_labels, linear_scores
from mgll_encoder.probing.zero_shot import class_directions, projected
from mgll_encoder.tower.load import load_tower

TUNED = {"clip": Arm("clip"), "mgll": Arm()}
"""Towers that are trained from the general one; the first is the control: plain CLIP, all texts of an image joined."""

GENERAL = "general"

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


@dataclass(frozen=True)
class Outputs:
    """Where the outputs of the stages are.

    Attributes:
        out: Folder of all outputs.
        data: Folder with manifest.csv and images.
        seeds: One tower of each kind for each.
        model_seeds: One chain of models for each, on the towers of this seed.
    """

    out: Path
    data: Path
    seeds: range
    model_seeds: range

    def tower(self, name: str, seed: int) -> Path:
        """A tower's folder; the general one has no seed."""
        return self.out / "towers" / (name if name == GENERAL else f"{name}-{seed}")

    def model(self, name: str, seed: int) -> Path:
        """A model's folder."""
        return self.out / "models" / f"{name}-{seed}"

    def run(self, name: str, seed: int) -> Path:
        """The folder of a model's answers."""
        return self.out / "runs" / f"{name}-{seed}"


def judge_towers(work: Outputs, manifest: Path, lines: list[str]) -> dict[str, Any]:
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
    work: Outputs, manifest: Path, labeled: LabeledImages, inside: Bools
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


def _features(work: Outputs, name: str, seed: int, labeled: LabeledImages) -> NDArray[np.float32]:
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


def looks(work: Outputs, lines: list[str]) -> list[dict[str, Any]]:
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


def judge_answers(work: Outputs, lines: list[str]) -> dict[str, Any]:
    """Accuracies, gains, and what alignment keeps, per group of questions."""
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
