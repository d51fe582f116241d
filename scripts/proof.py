"""What MGLL gains over plain CLIP on real photographs: same architecture, data and steps, several seeds.

python scripts/proof.py --data ../shared/data/fundus --out runs/proof

The data folder holds manifest.csv (columns file, labels, patient_or_source_id, dataset) and the images that it names.
Every tower and every probe is kept in the output folder, so the command can be stopped and given again.
"""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from scipy import stats
from three_arms import Way

from mgll_encoder.common import cli
from mgll_encoder.common.files import write_text
from mgll_encoder.data.label_table import Columns, LabelledImages, read_labels
from mgll_encoder.probe import METRICS, cached_features, judge, linear_scores
from mgll_encoder.tower import load_tower

ARMS = {
    "clip": ["--loss", "clip"],
    "mgll": ["--loss", "mgll"],
    "soft CLIP alone": ["--loss", "mgll", "--alpha", "1,0,0"],
    "without point-wise": ["--loss", "mgll", "--alpha", "1,0,0.1"],
    "without smooth KL": ["--loss", "mgll", "--alpha", "1,0.02,0"],
    "point-wise alone": ["--loss", "mgll", "--alpha", "0,1,0"],
}
"""Arm -> options of ``mgll-encoder pretrain``; the first is the control."""

EVERY = "all sources"
POSITIVES = 20
"""Least number of positive test images of a disease that counts."""

COLUMNS = Columns(labels="labels", patient="patient_or_source_id")
"""The split that ``mgll-encoder data fundus`` draws, so that no test patient was trained on."""

app = cli.new_app("Plain CLIP against MGLL and its ablations, on real photographs.")


@app.command()
def proof(
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv and images.")],
    out: Annotated[Path, typer.Option(help="Folder of towers and results; what is there is not made again.")],
    seeds: Annotated[int, typer.Option(help="Towers per arm.", min=2)] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 30,
    arms: Annotated[str, typer.Option(help="Arms, separated by commas (default: all).")] = "",
) -> None:
    """Train every arm with every seed, probe the towers on held-out patients, compare seed by seed.

    Example: python scripts/proof.py --data ../shared/data/fundus --out runs/proof
    """
    way = Way(out)
    manifest = way.step(
        "Texts at several granularities", "manifest.jsonl",
        "mgll-encoder", "data", "fundus", "--labels", data / "manifest.csv", "--images", data,
        "--out", out / "manifest.jsonl",
    )  # fmt: skip
    chosen = [name.strip() for name in arms.split(",") if name.strip()] or list(ARMS)
    labelled, sources = _images(data)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for seed in range(seeds):
        for arm in chosen:
            name = f"{arm.replace(' ', '-')}-{seed}"
            way.step(
                f"{arm}, seed {seed}", f"towers/{name}",
                "mgll-encoder", "pretrain", "--data", manifest, "--images", data, *ARMS[arm], "--preset", "tiny",
                "--epochs", str(epochs), "--batch-size", "32", "--lr", "1e-3", "--seed", str(seed),
                "--out", out / "towers" / name,
            )  # fmt: skip
            for source, values in _probe(out, name, labelled, sources).items():
                found.setdefault(source, {}).setdefault(arm, []).append(values)
    lines = [line for source, by_arm in found.items() for line in _table(source, by_arm)]
    write_text(out / "proof.md", "\n".join(lines) + "\n", force=True)
    cli.stdout.print(f"\nDone in {way.seconds:.0f} s. Table: {out / 'proof.md'}", soft_wrap=True)


def _images(data: Path) -> tuple[LabelledImages, list[str]]:
    with (data / "manifest.csv").open(encoding="utf-8-sig", newline="") as stream:
        of = {data / row["file"]: row["dataset"] for row in csv.DictReader(stream)}
    labelled = read_labels(data / "manifest.csv", data, COLUMNS)
    return labelled, [of[path] for path in labelled.images]


def _probe(out: Path, name: str, labelled: LabelledImages, sources: list[str]) -> dict[str, list[float]]:
    """Macro averages per source, in %; a probe is fitted and judged inside each source."""
    stored = out / "probes" / f"{name}.json"
    if stored.is_file():
        return {source: list(values) for source, values in json.loads(stored.read_text()).items()}
    features = cached_features(load_tower(out / "towers" / name), labelled.images, out / "features")
    result = {}
    for source in [EVERY, *sorted(set(sources))]:
        inside = np.array([source in (EVERY, own) for own in sources])
        part = replace(
            labelled,
            images=tuple(path for path, kept in zip(labelled.images, inside, strict=True) if kept),
            truth=labelled.truth[inside],
            patients=tuple(p for p, kept in zip(labelled.patients, inside, strict=True) if kept),
            test=labelled.test[inside],
        )
        scores, kept = linear_scores(features[inside], part, positives=POSITIVES)
        if kept:
            macro = judge(scores, kept, part, replicates=1).macro
            result[source] = [macro[metric].value for metric in METRICS]
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(result))
    return result


def _table(source: str, by_arm: dict[str, list[list[float]]]) -> list[str]:
    """Print one source's table; its lines as Markdown."""
    title = f"{source}: linear probe on held-out patients, macro average in %"
    control, *_ = by_arm
    table = Table(title=title, title_justify="left")
    headings = ["arm", *METRICS, f"gain in {METRICS[0]} over {control}", "seeds better"]
    for heading in headings:
        table.add_column(heading)
    lines = [f"**{title}**", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    base = np.array(by_arm[control])
    for arm, seeds in by_arm.items():
        values = np.array(seeds)
        cells = [
            f"{mean:.1f} ± {spread:.1f}"
            for mean, spread in zip(values.mean(0), values.std(0, ddof=1), strict=True)
        ]
        gains = values[:, 0] - base[:, 0]
        if arm == control:
            cells += ["–", "–"]
        else:
            low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
            cells += [
                f"{gains.mean():+.1f} [{low:.1f}, {high:.1f}]",
                f"{int((gains > 0).sum())} of {len(gains)}",
            ]
        table.add_row(arm, *(cell.replace("[", r"\[") for cell in cells))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    cli.stdout.print(table)
    return [*lines, ""]


if __name__ == "__main__":
    cli.run(app)
