"""What a report shows, as plain data: every question with every arm's answer, texts and images named once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_mcq.items.schema import LETTERS, Bench, MCQItem
from eval_mcq.records.run_record import Run
from mgll_encoder.common.errors import NotFoundError, UserError
from mgll_encoder.common.files import sha256


@dataclass(frozen=True)
class Content:
    """What a report shows.

    Attributes:
        bench: The questions.
        arms: Arm name to run.
        items: Answered questions in the order of the bench.
    """

    bench: Bench
    arms: Mapping[str, Run]
    items: list[MCQItem]

    @property
    def images(self) -> list[Path]:
        """Images of the answered questions, each once."""
        return list(dict.fromkeys(path for item in self.items for path in self.bench.image_paths(item)))

    def data(self) -> dict[str, Any]:
        """The item browser's data; ``texts`` and ``images`` are referred to by position."""
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
    """Put questions and answers together.

    Args:
        arms: Runs of the bench that answer the same questions (`eval_mcq.tables.summary.compare` sees to that).
        bench: The bench that they were asked.

    Raises:
        UserError: the bench file is not the one that the runs were asked, or an image has changed since.
    """
    first = next(iter(arms.values()))
    if first.record.bench_sha256 != bench.digest:
        raise UserError(
            f"bench {bench.path} is not what run {first.folder} was asked (SHA-256 {bench.digest[:12]}, "
            f"run {first.record.bench_sha256[:12]}): give the original file with `bench`"
        )
    answered = {answer.id: answer for answer in first.answers}
    items = [item for item in bench.items if item.id in answered]
    return Content(bench, arms, items)


def check_unchanged(content: Content) -> None:
    """See to it that the images are those that the models saw.

    Raises:
        UserError: an image is missing, or its bytes are not those that were asked about; names item and file.
    """
    first = next(iter(content.arms.values()))
    hashes = {answer.id: answer.images_sha256 for answer in first.answers}
    known: dict[Path, str] = {}
    for item in content.items:
        for path, expected in zip(content.bench.image_paths(item), hashes[item.id], strict=True):
            if path not in known:
                if not path.is_file():
                    raise NotFoundError(
                        f"image {path} of question '{item.id}' does not exist: put it back, or leave pictures out "
                        "with `images=False`"
                    )
                known[path] = sha256(path)
            if known[path] != expected:
                raise UserError(
                    f"image {path} of question '{item.id}' has changed since it was asked: run the bench again, "
                    "or leave pictures out with `images=False`"
                )
