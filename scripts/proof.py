"""What MGLL gains over plain CLIP on real photographs: same architecture, data and steps, several seeds.

python scripts/proof.py --data ../shared/data/fundus --out runs/proof

The data folder holds manifest.csv (columns file, labels, patient_or_source_id, dataset) and the images that it names.
Every tower and every probe is kept in the output folder, so the command can be stopped and given again.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy import stats
from steps import Steps

from mgll_encoder.common import cli
from mgll_encoder.common.errors import unknown_name
from mgll_encoder.common.files import write_text
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.terminal_table import TerminalTable
from mgll_encoder.data.batches import plan_rows
from mgll_encoder.data.label_rows import Columns
from mgll_encoder.data.label_table import LabeledImages, read_labels
from mgll_encoder.paired.read import text_tower_of
from mgll_encoder.probing.features import cached_features
from mgll_encoder.probing.linear import evaluate, linear_scores
from mgll_encoder.probing.zero_shot import class_directions, projected
from mgll_encoder.tower.load import load_tower


@dataclass(frozen=True)
class Arm:
    """What a tower is trained with: options of ``mgll-encoder pretrain``."""

    loss: str = "mgll"
    alpha: str = ""
    granularities: str = ""

    @property
    def options(self) -> list[str]:
        """As typed."""
        given = {"--loss": self.loss, "--alpha": self.alpha, "--granularities": self.granularities}
        return [word for option, value in given.items() if value for word in (option, value)]


ARMS = {
    "clip": Arm("clip"),
    "mgll": Arm(),
    "without smooth KL": Arm(alpha="1,0.02,0"),
    "without point-wise": Arm(alpha="1,0,0.1"),
    "soft CLIP alone": Arm(alpha="1,0,0"),
    "without soft CLIP": Arm(alpha="0,0.02,0.1"),
    "clip, disease only": Arm("clip", granularities="disease"),
}
"""The first is the control: plain CLIP with one string per image, the texts of all its granularities."""

FIGURES = ("probe AUC", "probe mAP", "zero-shot AUC")
"""Of a linear probe, and of the similarity of an image to the texts that a label had in the training."""

EVERY = "all sources"
POSITIVES = 20
"""Least number of positive test images of a disease that counts."""

COLUMNS = Columns(labels="labels", patient="patient_or_source_id")
"""The split that ``mgll-encoder data fundus`` draws, so that no test patient was trained on."""

app = cli.new_app("Plain CLIP against MGLL and its ablations, on real photographs.")


@app.command()
def proof(
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv and images.")],
    out: Annotated[Path, typer.Option(help="Folder of towers and results; what exists is not made again.")],
    seeds: Annotated[int, typer.Option(help="Towers per arm.", min=2)] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 30,
    arms: Annotated[str, typer.Option(help="Arms, separated by semicolons (default: all).")] = "",
) -> None:
    """Train every arm with every seed, probe the towers on held-out patients, compare seed by seed.

    Example: python scripts/proof.py --data ../shared/data/fundus --out runs/proof
    """
    steps = Steps(out)
    manifest = steps.step(
        "Texts at several granularities", "manifest.jsonl",
        "mgll-encoder", "data", "fundus", "--labels", data / "manifest.csv", "--images", data,
        "--out", out / "manifest.jsonl",
    )  # fmt: skip
    chosen = [name.strip() for name in arms.split(";") if name.strip()] or list(ARMS)
    if unknown := [name for name in chosen if name not in ARMS]:
        raise unknown_name("arm", unknown[0], ARMS)
    labeled, sources = images_and_sources(data)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for seed in range(seeds):
        for arm in chosen:
            name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            steps.step(
                f"{arm}, seed {seed}", f"towers/{name}",
                "mgll-encoder", "pretrain", "--manifest", manifest, "--images", data, *ARMS[arm].options,
                "--tower-size", "tiny", "--epochs", str(epochs), "--batch-size", "32", "--learning-rate", "1e-3",
                "--precision", "bfloat16", "--seed", str(seed), "--out", out / "towers" / name,
            )  # fmt: skip
            texts = texts_of_labels(manifest, data, labeled.names, ARMS[arm])
            for source, values in _judged(out, name, labeled, sources, texts).items():
                found.setdefault(source, {}).setdefault(arm, []).append(values)
    lines = [line for source, by_arm in found.items() for line in _table(source, by_arm)]
    write_text(out / "proof.md", "\n".join(lines) + "\n", force=True)
    cli.say(f"\nDone in {steps.seconds:.0f} s. Table: {out / 'proof.md'}")


def images_and_sources(data: Path) -> tuple[LabeledImages, list[str]]:
    """Labels and sides of all photographs, and the data set that each comes from."""
    with (data / "manifest.csv").open(encoding="utf-8-sig", newline="") as stream:
        of = {data / row["file"]: row["dataset"] for row in csv.DictReader(stream)}
    labeled = read_labels(data / "manifest.csv", data, COLUMNS, skipped=Skipped())
    return labeled, [of[path] for path in labeled.images]


def texts_of_labels(manifest: Path, data: Path, names: Sequence[str], arm: Arm) -> list[list[str]]:
    """Texts of the training images that have a label and no other; where there are none, of all that have it."""
    granularities = [arm.granularities] if arm.granularities else []
    plan = plan_rows(manifest, data, granularities, "train", arm.loss == "clip", Skipped(strict=False))
    rows = [plan.row(index) for index in range(len(plan))]
    found = []
    for name in names:
        having = [row for row in rows if name in row.texts.get("disease", [])]
        alone = [row for row in having if row.texts["disease"] == [name]]
        found.append(sorted({text for row in alone or having for level in plan.texts(row) for text in level}))
    return found


def _judged(
    out: Path, name: str, labeled: LabeledImages, sources: list[str], texts: list[list[str]]
) -> dict[str, list[float]]:
    """The figures per source, macro averages in %; a probe is fitted and judged inside each source."""
    stored = out / "figures" / f"{name}.json"
    if stored.is_file():
        return {source: list(values) for source, values in json.loads(stored.read_text()).items()}
    path = out / "towers" / name
    tower = load_tower(path)
    features = cached_features(tower, labeled.images, out / "features")
    # a label without training texts is in no image of the training side, and is left out by linear_scores
    directions = class_directions(text_tower_of(path, tower), [group or [""] for group in texts])
    similar = projected(tower, features) @ directions.T
    result = {}
    for source in [EVERY, *sorted(set(sources))]:
        inside = np.array([source in (EVERY, own) for own in sources])
        part = labeled.subset(inside)
        scores, kept = linear_scores(features[inside], part, positives=POSITIVES)
        if kept:
            probe = evaluate(scores, kept, part, replicates=1)
            asked = similar[inside][part.test][:, kept].astype(np.float64)
            without = evaluate(asked, kept, part, replicates=1)
            result[source] = [
                probe.macro["AUC"].value, probe.macro["mAP"].value, without.macro["AUC"].value
            ]  # fmt: skip
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(result))
    return result


def _table(source: str, by_arm: dict[str, list[list[float]]]) -> list[str]:
    """Print one source's table; its lines as Markdown."""
    title = f"{source}: held-out patients, macro average in %"
    control, *_ = by_arm
    headings = ["arm", *FIGURES, *(f"gain in {name}" for name in FIGURES), "seeds better"]
    table = TerminalTable(title).add_words("arm").add_figures(*headings[1:])
    lines = [f"**{title}**", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    base = np.array(by_arm[control])
    for arm, seeds in by_arm.items():
        values = np.array(seeds)
        cells = [
            f"{mean:.1f} ± {spread:.1f}"
            for mean, spread in zip(values.mean(0), values.std(0, ddof=1), strict=True)
        ]
        gains = values - base
        if arm == control:
            cells += ["–"] * (len(FIGURES) + 1)
        else:
            low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(0), stats.sem(gains))
            cells += [
                f"{m:+.1f} [{a:.1f}, {b:.1f}]" for m, a, b in zip(gains.mean(0), low, high, strict=True)
            ]
            cells.append(f"{', '.join(map(str, (gains > 0).sum(0)))} of {len(gains)}")
        table.add_row(arm, *cells)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    cli.stdout.print(table)
    return [*lines, ""]


if __name__ == "__main__":
    cli.run(app)
