"""Test images that the model was trained on: found by hash, and refused unless allowed."""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from eval_mcq.items.schema import Bench
from mgll_encoder.common.errors import MismatchError
from mgll_encoder.common.picture_bytes import picture_digests
from mgll_encoder.common.trained_on import Training, as_numbers, trainings_of
from mllm_adapters import base_of_adapter

_logger = logging.getLogger(__name__)


class Leak(BaseModel):
    """How many images of a benchmark its model was trained on.

    Attributes:
        images: Distinct images of the benchmark.
        seen: How many of them were used in training.
        by: Training run -> how many images it used; only runs with any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    seen: int
    by: dict[str, int]

    @property
    def text(self) -> str:
        """The leak in words."""
        parts = ", ".join(f"{count} by {title}" for title, count in self.by.items())
        return f"{self.seen} of {self.images} images were seen in training: {parts}"


def find_leak(model: Path, bench: Bench) -> Leak | None:
    """Compare the images of a benchmark with the training records of a model and of an adapter's base.

    Images are equal if the data that determine their pixels are; a model without a record cannot be checked.

    Returns:
        The leak; None if there is none.

    Raises:
        UserError: an image is missing, or the model's record is damaged.
    """
    trainings = trainings_of_model(model)
    if not trainings:
        return None
    paths = (path for item in bench.items for path in bench.image_paths(item))
    shown = np.unique(
        as_numbers(picture_digests(paths, "Comparing images with the training images").values())
    )
    seen: dict[str, NDArray[np.bool_]] = {}
    for training in trainings:
        found = np.isin(shown, training.images)
        seen[training.title] = found | seen.get(training.title, found)
    by = {title: int(found.sum()) for title, found in seen.items() if found.any()}
    return Leak(images=len(shown), seen=int(np.any([*seen.values()], axis=0).sum()), by=by) if by else None


def check_leak(model: Path, bench: Bench, *, allow: bool) -> Leak | None:
    """Refuse a benchmark with images that the model was trained on.

    Args:
        model: Model folder.
        bench: The questions.
        allow: Only warn.

    Returns:
        The leak, for the record of the run.

    Raises:
        UserError: there is a leak and ``allow`` is not set; see also `find_leak`.
    """
    leak = find_leak(model, bench)
    if leak is None:
        return None
    if not allow:
        raise MismatchError(
            f"bench {bench.path}: {leak.text}; build it on the test split of the training data "
            "(`build_benchmark(split=test)`, with the same `patient_column`, `test_share` and `split_seed`), or add "
            "`allow_leak=True` to run it with a note in every table"
        )
    _logger.warning(f"bench {bench.path}: {leak.text}; its results are too optimistic")
    return leak


def trainings_of_model(folder: Path) -> tuple[Training, ...]:
    """Return the training records of a model; for an adapter, also those of its base.

    Raises:
        UserError: a record is damaged, or the base of an adapter is missing.
    """
    base = base_of_adapter(folder)
    return (*(trainings_of(base) if base else ()), *trainings_of(folder))
