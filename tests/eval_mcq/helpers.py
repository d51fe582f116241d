"""Small benches, label tables and runs for the tests of eval-mcq."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval_mcq.backends.base import Identity
from eval_mcq.backends.fingerprint import code_version, package_versions
from eval_mcq.cli.main import main
from eval_mcq.items.schema import LETTERS, SCHEMA, Bench
from eval_mcq.records.answer import Answer
from eval_mcq.records.run_record import Run, RunRecord
from eval_mcq.scoring.score import Scorer
from mgll_encoder.common.files import sha256
from tests.builders import picture

DISEASES = ("AMD", "Cataract", "DR", "Glaucoma")


def question(item_id: str, image: str = "a.png", **changes) -> dict:
    """A valid question as it stands in a bench file."""
    return {
        "id": item_id, "images": [image], "question": "What is seen?", "options": ["drusen", "a cataract", "nothing"],
        "answer": "B", "category": "Cataract", **changes,
    }  # fmt: skip


def write_bench(path: Path, questions: list[dict], **header) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in [{"schema": SCHEMA, **header}, *questions]) + "\n")
    return path


def small_bench(folder: Path, n: int = 10) -> Path:
    """Questions of ragged length and two or three options about differently colored pictures."""
    questions = []
    for i in range(n):
        picture(folder, f"{i}.png", (20 * i, 255 - 20 * i, 90))
        options = ["drusen", "a cataract", "nothing " * (i % 4 + 1)][: 2 + i % 2]
        questions.append(
            question(
                f"q{i}",
                f"{i}.png",
                options=options,
                category=DISEASES[i % 2],
                answer=i % 2,
                patient=f"p{i // 2}",
            )
        )
    return write_bench(folder / "bench.jsonl", questions, categories=["AMD", "Cataract"])


def write_labels(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A label table, and a picture for each of its rows."""
    for row in rows:
        picture(folder / "photos", row["file"])
    path = folder / "labels.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def scorer(folder: Path) -> Scorer:
    """The stock model and processor of a folder, ready to score."""
    return Scorer(AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder))


def identity(folder: Path, sha256: str = "f" * 64, dtype: str = "float32") -> Identity:
    """What identifies the answers of a model folder, without hashing it."""
    return Identity(str(folder), sha256, dtype, code_version(), package_versions())


def run_of_counts(counts: dict[str, tuple[int, int]], bench: str = "b" * 64) -> Run:
    """A run with so many right of so many questions per disease, each question of its own patient."""
    answers = [
        Answer(
            id=f"{category}-{i}", category=category, cluster=f"{category}-{i}", images_sha256=["0"], gold="A",
            chosen="A" if i < right else "B", probabilities=[0.25] * 4, letter_mass=0.9,
        )
        for category, (right, n) in counts.items()
        for i in range(n)
    ]  # fmt: skip
    record = RunRecord(
        model="m", model_sha256="m" * 64, bench="bench.jsonl", bench_name="bench", bench_sha256=bench,
        categories=list(counts), questions=len(answers), mode="letters", prompt="letters-1", dtype="float32",
    )  # fmt: skip
    return Run(Path("runs/x"), record, answers)


def run_of_bench(bench: Bench, wrong: Callable[[int], bool], **record: Any) -> Run:
    """A run that answers some questions of a bench, by their numbers, with the option after the true one."""
    answers = []
    for number, item in enumerate(bench.items):
        chosen = (item.answer + wrong(number)) % len(item.options)
        rest = 0.3 / (len(item.options) - 1)
        answers.append(
            Answer(
                id=item.id, category=item.category, cluster=item.cluster, gold=item.letter, chosen=LETTERS[chosen],
                images_sha256=[sha256(path) for path in bench.image_paths(item)], letter_mass=0.9,
                probabilities=[0.7 if i == chosen else rest for i in range(len(item.options))],
            )
        )  # fmt: skip
    about = RunRecord(
        model="models/some-model", model_sha256="m" * 64, bench=str(bench.path), bench_name="bench",
        bench_sha256=bench.digest, categories=bench.categories, questions=len(answers), mode="letters",
        prompt="letters-1", dtype="float32", **record,
    )  # fmt: skip
    return Run(Path("run"), about, answers)


def save_run(run: Run, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.record.model_dump_json())
    (folder / "answers.jsonl").write_text("".join(row.line() for row in run.rows))
    return folder


class Command:
    """Runs eval-mcq in this process; the last call's output stays in ``out`` and ``err``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["eval-mcq", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        self.out, self.err = self.capsys.readouterr()
        return exit_.value.code

    def refuses(self, *arguments: object) -> str:
        """The one-line error of a call that must exit with 2."""
        code = self(*arguments)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert code == 2, self.err
        assert len(lines) == 1, self.err
        return lines[0]
