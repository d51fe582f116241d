"""The contents of a report as plain data: every question with every arm's answer, without repeated texts and images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_mcq.items.schema import LETTERS, Bench, MCQItem
from eval_mcq.records.run_record import Run
from mgll_encoder.common.errors import MismatchError, NotFoundError
from mgll_encoder.common.files import sha256


@dataclass(frozen=True)
class Content:
    """The contents of a report.

    Attributes:
        bench: The questions.
        arms: Arm name to run.
        items: Answered questions in the order of the benchmark.
    """

    bench: Bench
    arms: Mapping[str, Run]
    items: list[MCQItem]

    @property
    def images(self) -> list[Path]:
        """Images of the answered questions, without duplicates."""
        return list(dict.fromkeys(path for item in self.items for path in self.bench.image_paths(item)))

    def data(self) -> dict[str, Any]:
        """Return the item browser's data; ``texts`` and ``images`` are referenced by index."""
        texts: dict[str, int] = {}
        images = {path: i for i, path in enumerate(self.images)}
        answers = [{answer.id: answer for answer in run.answers} for run in self.arms.values()]
        items = []
        for item in self.items:
            given = [of_arm[item.id] for of_arm in answers]
            items.append(
                {
                    "id": item.id,
                    "category": item.category,
                    "source": item.source,
                    "patient": self.bench.patients[item.id],
                    "tags": item.tags,
                    "images": [images[path] for path in self.bench.image_paths(item)],
                    "question": texts.setdefault(item.question, len(texts)),
                    "options": [texts.setdefault(option, len(texts)) for option in item.options],
                    "answer": item.answer,
                    "chosen": [LETTERS.find(answer.chosen) if answer.chosen else -1 for answer in given],
                    "right": [int(answer.right) for answer in given],
                    "rotations": [
                        [sum(row.right for row in answer.rows), len(answer.rows)] for answer in given
                    ],
                    "probabilities": [[round(p, 3) for p in answer.probabilities] for answer in given],
                }
            )
        return {
            "arms": list(self.arms),
            "categories": [c for c in self.bench.categories if any(i.category == c for i in self.items)],
            "texts": list(texts),
            "items": items,
        }


def gather(arms: Mapping[str, Run], bench: Bench) -> Content:
    """Combine questions and answers.

    Args:
        arms: Runs that answer the same questions (`eval_mcq.tables.summary.compare` checks this).
        bench: The benchmark of the runs.

    Raises:
        UserError: the benchmark file is not that of the runs.
    """
    first = next(iter(arms.values()))
    if first.record.bench_sha256 != bench.digest:
        raise MismatchError(
            f"bench {bench.path} is not the benchmark of run {first.folder} (SHA-256 {bench.digest[:12]}, "
            f"run {first.record.bench_sha256[:12]}): give the original file with `bench`"
        )
    answered = {answer.id: answer for answer in first.answers}
    items = [item for item in bench.items if item.id in answered]
    return Content(bench, arms, items)


def check_unchanged(content: Content) -> None:
    """Check that the images are those used in the runs.

    Raises:
        UserError: an image is missing or has changed; names item and file.
    """
    first = next(iter(content.arms.values()))
    hashes = {answer.id: answer.images_sha256 for answer in first.answers}
    known: dict[Path, str] = {}
    for item in content.items:
        for path, expected in zip(content.bench.image_paths(item), hashes[item.id], strict=True):
            if path not in known:
                if not path.is_file():
                    raise NotFoundError(
                        f"image {path} of question '{item.id}' does not exist: restore it, or omit the images "
                        "with `thumbnails=False`"
                    )
                known[path] = sha256(path)
            if known[path] != expected:
                raise MismatchError(
                    f"image {path} of question '{item.id}' has changed since the run: run the benchmark again, "
                    "or omit the images with `thumbnails=False`"
                )
