"""Evaluation of a model during training: used by ``--eval-bench`` of the training commands."""

import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from eval_mcq.items.image_checks import check_images
from eval_mcq.items.schema import load_bench
from eval_mcq.scoring.score import Scorer
from mgll_encoder.common.images import open_image

_logger = logging.getLogger(__name__)

BATCH = 8
"""Questions per forward pass."""


class BenchEvaluator:
    """Computes a model's macro average on a benchmark: accuracy per disease, then the mean over diseases.

    Args:
        path: A benchmark file on a validation split.

    Raises:
        UserError: the benchmark or one of its images cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.bench = load_bench(path)
        if self.bench.header.built.get("split") == "test":
            _logger.warning(
                f"`eval_bench={path}` was built on the test split: if it is used to choose weights, it is no longer a "
                "test set; use patients that are in neither training nor test"
            )
        check_images(
            {image: item.id for item in reversed(self.bench.items) for image in self.bench.image_paths(item)}
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """The hash of the benchmark."""
        return {"eval_bench_sha256": self.bench.digest}

    def __call__(self, model: Any, processor: Any) -> float:
        """Compute the macro average, 0-1. The model's weights and number formats are not changed."""
        right: dict[str, list[bool]] = {}
        first = next(model.parameters())
        half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        scorer = Scorer(model, processor, device=first.device, dtype=None, way="plain")
        scorer.check_options(self.bench.items)
        with torch.autocast(first.device.type, dtype=torch.bfloat16, enabled=half):
            for start in range(0, len(self.bench.items), BATCH):
                items = self.bench.items[start : start + BATCH]
                images = [[open_image(path) for path in self.bench.image_paths(item)] for item in items]
                for item, score in zip(items, scorer.score(items, images), strict=True):
                    right.setdefault(item.category, []).append(score.choice == item.answer)
        return fmean(fmean(answers) for answers in right.values())
