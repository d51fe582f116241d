"""Evaluation of a tower on labeled images: train on one split, score the other; or score without training."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import cache_folder
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.probing.options import ProbeOptions, TowerOptions
from mgll_encoder.weights.locate import check_tower

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mgll_encoder.data.label_table import LabeledImages
    from mgll_encoder.probing.finetune import Finetuned
    from mgll_encoder.probing.linear import ProbeResult
    from mgll_encoder.tower.model import Tower

    Scored = tuple[NDArray[np.float64], list[int], LabeledImages, dict[str, Any]]
    """Scores [images, kept labels], the kept labels, the images that could be read, and a record."""

    Score = Callable[[Tower, LabeledImages, Skipped], Scored]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How well a tower's features predict some labels.

    Attributes:
        result: AUC, mAP and accuracy with their intervals, macro and by label.
        skipped: What was skipped, by reason.
        names: Label -> its name in words, for known data sets.
        record: Other settings that determine the results, for a file.
    """

    result: "ProbeResult"
    skipped: Skipped
    names: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def linear(options: ProbeOptions) -> "Score":
    """Return a linear classifier on frozen features, for `evaluate_trained`."""

    def score(tower: "Tower", labels: "LabeledImages", skipped: Skipped) -> "Scored":
        from mgll_encoder.probing.features import readable_features
        from mgll_encoder.probing.linear import linear_scores

        features, labels = readable_features(
            tower, labels, cache_folder("features"), skipped, options.workers, options.device
        )
        scores, kept = linear_scores(features, labels, positives=options.min_positives)
        need_kept(kept, options.min_positives)
        return scores, kept, labels, {}

    return score


def finetuned(
    settings: Mapping[str, Any],
    options: ProbeOptions,
    *,
    trainings: int = 1,
    tower_out: Path | None = None,
    force: bool = False,
) -> "Score":
    """Return a tower that is trained together with a linear head, for `evaluate_trained`.

    Args:
        settings: Fields of `mgll_encoder.probing.finetune.FinetuneOptions`.
        options: Of the probe; training ``i`` has the seed ``seed + i``.
        trainings: Number of trainings; results are their means.
        tower_out: New folder for the tower that is best on the validation part.
        force: Replace ``tower_out``.
    """

    def score(tower: "Tower", labels: "LabeledImages", skipped: Skipped) -> "Scored":
        import numpy as np

        from mgll_encoder.probing.features import open_every_image
        from mgll_encoder.probing.finetune import CHOSEN_BY, FinetuneOptions, finetune
        from mgll_encoder.probing.linear import kept_labels

        training = FinetuneOptions(**{"seed": options.seed, **settings})
        labels = open_every_image(labels, skipped)
        need_kept(kept_labels(labels, options.min_positives), options.min_positives)
        cache = cache_folder("finetune")
        runs = [
            finetune(
                tower,
                labels,
                replace(training, seed=training.seed + i),
                cache,
                positives=options.min_positives,
                workers=options.workers,
                device=options.device,
            )
            for i in range(trainings)
        ]
        if tower_out:
            _save_best(runs, tower, tower_out, force, skipped)
        record = {"finetuning": [{**run.record, f"validation_{CHOSEN_BY}": run.validation} for run in runs]}
        return np.stack([run.scores for run in runs]), runs[0].kept, labels, record

    return score


def _save_best(runs: "list[Finetuned]", tower: "Tower", out: Path, force: bool, skipped: Skipped) -> None:
    from mgll_encoder.common.picture_bytes import picture_digests
    from mgll_encoder.common.trained_on import TOWER, Training, trainings_of
    from mgll_encoder.probing.finetune import CHOSEN_BY
    from mgll_encoder.tower.save import save_tower

    best = max(runs, key=lambda run: run.validation)
    digests = picture_digests(best.trained_on, "Hashing the training images").values()
    trained = [*trainings_of(tower.header.source), Training.of((TOWER,), "probe --mode finetune", digests)]
    provenance = {"finetuning": {**best.record, CHOSEN_BY: best.validation, **skipped.record()}}
    save_tower(best.tower, out, force, provenance, trainings=trained)


def evaluate_trained(
    encoder: Path,
    question: LabeledSet,
    score: "Score",
    options: ProbeOptions,
) -> Evaluation:
    """Train a classifier, and evaluate it on the test split of labeled images.

    Args:
        encoder: The tower.
        question: The images and labels.
        score: Trains on the training split and scores the test split.
        options: How the tower is read and evaluated.

    Raises:
        UserError: see `LabeledSet.read` and ``load_tower``.
    """
    skipped = Skipped(options.strict)
    check_tower(encoder)
    labels = question.read(skipped)
    from mgll_encoder.probing.linear import evaluate

    scores, kept, labels, record = score(open_tower(encoder, options), labels, skipped)
    result = evaluate(scores, kept, labels, seed=options.seed)
    question.warn_of_leaks(labels)
    return Evaluation(result, skipped, question.names, record)


def evaluate_zero_shot(
    encoder: Path,
    question: LabeledSet,
    options: ProbeOptions,
    *,
    prompts: str | None = None,
    every: bool = False,
) -> Evaluation:
    """Run `zero_shot` on a `LabeledSet`."""
    from mgll_encoder.probing.benchmarks import benchmark as described

    known = described(question.dataset) if question.dataset else None
    skipped = Skipped(options.strict)
    check_tower(encoder)
    labels = question.read(skipped, both_sides=False)
    labels = (labels if every else labels.subset(labels.test)).all_for_test
    if not labels.images:
        raise InvalidArgumentError(
            "no image is in the test split: give a larger `test_share`, or `every=True`"
        )
    from mgll_encoder.paired.read import text_tower_of
    from mgll_encoder.probing.features import readable_features
    from mgll_encoder.probing.linear import evaluate, kept_labels
    from mgll_encoder.probing.zero_shot import (
        class_directions,
        projected,
        read_prompts,
        unknown_pieces,
        zero_shot_scores,
    )  # fmt: skip

    used = read_prompts(prompts or (known.prompts if known else "generic"))
    tower = open_tower(encoder, options)
    text = text_tower_of(tower.header.source, tower)
    positive = [used.positive(label, question.names) for label in labels.names]
    negative = [used.negative(label, question.names) for label in labels.names]
    for prompt, pieces in unknown_pieces(text, positive if labels.exclusive else positive + negative).items():
        _logger.warning(
            f"prompt '{prompt}': the text tower has no embedding for {', '.join(pieces)}, which are ignored"
        )
    features, labels = readable_features(
        tower, labels, cache_folder("features"), skipped, options.workers, options.device
    )
    scores = zero_shot_scores(
        projected(tower, features),
        class_directions(text, positive),
        class_directions(text, negative),
        text.temperature,
        labels.exclusive,
    )
    kept = kept_labels(labels, options.min_positives, trained=False)
    need_kept(kept, options.min_positives)
    said = {
        label: {"positive": p} if labels.exclusive else {"positive": p, "negative": n}
        for label, p, n in zip(labels.names, positive, negative, strict=True)
    }
    result = evaluate(scores[:, kept], kept, labels, seed=options.seed)
    return Evaluation(result, skipped, question.names, {"prompts": said})


def open_tower(encoder: Path, options: TowerOptions) -> "Tower":
    """Load a tower and log its warnings."""
    from mgll_encoder.tower.load import load_tower

    # checked by load_tower
    choices: dict[str, Any] = {"activation": options.activation, "weights": options.weights}
    tower = load_tower(encoder, **choices)
    for message in tower.header.warnings:
        _logger.warning(message)
    return tower


def need_kept(kept: list[int], min_positives: int) -> None:
    """Refuse a set without a label that can be evaluated.

    Raises:
        UserError: no label is kept.
    """
    if not kept:
        raise InvalidArgumentError(
            f"no label has negative and {min_positives} positive test images, and both to train on: see `min_positives`"
        )
