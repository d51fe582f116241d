"""The public functions to train and evaluate towers. Paths are checked before anything heavy is imported."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import cache_folder
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.weights.locate import check_manifest, check_tower

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mgll_encoder.data.label_table import LabeledImages
    from mgll_encoder.pretraining.pretrain import PretrainResult
    from mgll_encoder.probing.linear import ProbeResult
    from mgll_encoder.tower.load import Tower

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
        names: Label -> its name in words, for known benchmarks.
        record: Other settings that determine the results, for a file.
    """

    result: "ProbeResult"
    skipped: Skipped
    names: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    workers: int = 2,
    strict: bool = False,
    resume: bool = False,
    force: bool = False,
    save_on_signal: bool = False,
    **options: Any,
) -> "PretrainResult":
    """Train a tower with the MGLL losses, or its plain CLIP control, on a manifest's training split.

    Args:
        data: Manifest (.jsonl or .parquet).
        out: New folder for the tower.
        images: Image folder; the one named in the manifest if not given.
        workers: Processes that open images.
        strict: Stop at the first row that would be skipped.
        resume: Continue an interrupted run with the same options.
        force: Replace ``out``.
        save_on_signal: Save a checkpoint before ending on SIGTERM or Ctrl-C.
        **options: Fields of `mgll_encoder.pretraining.options.PretrainOptions`: ``loss``, ``init``, ``epochs`` ...

    Raises:
        UserError: manifest, images or weights cannot be read, or ``out`` exists.
    """
    check_manifest(Path(data))
    from mgll_encoder.pretraining.options import PretrainOptions
    from mgll_encoder.pretraining.pretrain import pretrain as train

    return train(
        Path(data), Path(out), PretrainOptions(**options), images=None if images is None else Path(images),
        workers=workers, strict=strict, resume=resume, force=force, save_on_signal=save_on_signal,
    )  # fmt: skip


def linear_probe(
    encoder: str | Path,
    data: str | Path | None,
    images: str | Path,
    *,
    activation: str | None = None,
    weights: str | None = None,
    min_positives: int = 10,
    strict: bool = False,
    workers: int | None = None,
    **question: Any,
) -> Evaluation:
    """Fit a linear classifier on frozen features, and evaluate it on other patients.

    Features are cached on disk (``MGLL_CACHE_DIR``), so that a second probe takes seconds.

    Args:
        encoder: The tower: anything that `mgll_encoder.inspect_tower` reads.
        data: Table (CSV, TSV, Excel, Parquet) of images and labels; None for benchmarks that are labeled by folders.
        images: Folder that the image column is relative to.
        activation: ``gelu`` or ``quick_gelu``, for towers that do not specify it.
        weights: ``raw`` or ``ema``, for towers stored with a moving average of their weights.
        min_positives: Labels with fewer positive test images are skipped.
        strict: Stop at the first row or image that would be skipped.
        workers: Processes that read images; one per core if not given.
        **question: Further fields of `mgll_encoder.probing.labeled_set.LabeledSet`: ``patient_column``, ``benchmark``,
            ``test``, ``seed`` ...

    Raises:
        UserError: table, images or tower cannot be read, or no label has enough images.
    """
    return evaluate_trained(
        Path(encoder), asked(data, images, question), linear(min_positives, workers),
        activation=activation, weights=weights, strict=strict,
    )  # fmt: skip


def linear(min_positives: int = 10, workers: int | None = None) -> "Score":
    """Return a linear classifier on frozen features, for `evaluate_trained`."""

    def score(tower: "Tower", labels: "LabeledImages", skipped: Skipped) -> "Scored":
        from mgll_encoder.probing.features import readable_features
        from mgll_encoder.probing.linear import linear_scores

        features, labels = readable_features(tower, labels, cache_folder("features"), skipped, workers)
        scores, kept = linear_scores(features, labels, positives=min_positives)
        need_kept(kept, min_positives)
        return scores, kept, labels, {}

    return score


def evaluate_trained(
    encoder: Path,
    question: LabeledSet,
    score: "Score",
    *,
    activation: str | None = None,
    weights: str | None = None,
    strict: bool = False,
) -> Evaluation:
    """Train a classifier, and evaluate it on the test split of labeled images.

    Args:
        encoder: The tower.
        question: The images and labels.
        score: Trains on the training split and scores the test split.
        activation: For towers that do not specify it.
        weights: For towers stored with a moving average of their weights.
        strict: Stop at the first row or image that would be skipped.

    Raises:
        UserError: see `LabeledSet.read` and ``load_tower``.
    """
    skipped = Skipped(strict)
    check_tower(encoder)
    labels = question.read(skipped)
    from mgll_encoder.probing.linear import evaluate

    scores, kept, labels, record = score(open_tower(encoder, activation, weights), labels, skipped)
    result = evaluate(scores, kept, labels, seed=question.seed)
    question.warn_of_leaks(labels)
    return Evaluation(result, skipped, question.names, record)


def zero_shot(
    encoder: str | Path,
    data: str | Path | None,
    images: str | Path,
    *,
    prompts: str | None = None,
    every: bool = False,
    activation: str | None = None,
    weights: str | None = None,
    min_positives: int = 10,
    strict: bool = False,
    workers: int | None = None,
    **question: Any,
) -> Evaluation:
    """Classify without training, by the similarity of an image to prompts of each class.

    The prompts of a class are averaged; if several labels may be true at once, a label is compared with the prompts of
    its absence.

    Args:
        encoder: A tower with its text tower: a folder written by `pretrain`, or a full CLIP.
        data: As for `linear_probe`.
        images: As for `linear_probe`.
        prompts: ``generic``, ``fundus``, ``xray``, or a .json file; the benchmark's, or generic, if not given.
        every: Evaluate on all images, not only the test split.
        activation: As for `linear_probe`.
        weights: As for `linear_probe`.
        min_positives: As for `linear_probe`.
        strict: As for `linear_probe`.
        workers: As for `linear_probe`.
        **question: As for `linear_probe`.

    Raises:
        UserError: as `linear_probe`; or the tower has no text tower.
    """
    return evaluate_zero_shot(
        Path(encoder), asked(data, images, question), prompts=prompts, every=every, activation=activation,
        weights=weights, min_positives=min_positives, strict=strict, workers=workers,
    )  # fmt: skip


def evaluate_zero_shot(
    encoder: Path,
    question: LabeledSet,
    *,
    prompts: str | None,
    every: bool,
    activation: str | None,
    weights: str | None,
    min_positives: int,
    strict: bool,
    workers: int | None,
) -> Evaluation:
    """Run `zero_shot` on a `LabeledSet`."""
    from mgll_encoder.probing.benchmarks import benchmark as described

    known = described(question.benchmark) if question.benchmark else None
    skipped = Skipped(strict)
    check_tower(encoder)
    labels = question.read(skipped, both_sides=False)
    labels = (labels if every else labels.subset(labels.test)).all_for_test
    if not labels.images:
        raise UserError("no image is in the test split: give a larger `test`, or `every=True`")
    from mgll_encoder.probing.features import readable_features
    from mgll_encoder.probing.linear import evaluate, kept_labels
    from mgll_encoder.probing.zero_shot import (
        class_directions,
        projected,
        read_prompts,
        text_tower_of,
        unknown_pieces,
        zero_shot_scores,
    )  # fmt: skip

    used = read_prompts(prompts or (known.prompts if known else "generic"))
    tower = open_tower(encoder, activation, weights)
    text = text_tower_of(tower.header.source, tower)
    positive = [used.positive(label, question.names) for label in labels.names]
    negative = [used.negative(label, question.names) for label in labels.names]
    for prompt, pieces in unknown_pieces(text, positive if labels.exclusive else positive + negative).items():
        _logger.warning(
            f"prompt '{prompt}': the text tower has no embedding for {', '.join(pieces)}, which are ignored"
        )
    features, labels = readable_features(tower, labels, cache_folder("features"), skipped, workers)
    scores = zero_shot_scores(
        projected(tower, features),
        class_directions(text, positive),
        class_directions(text, negative),
        text.temperature,
        labels.exclusive,
    )
    kept = kept_labels(labels, min_positives, trained=False)
    need_kept(kept, min_positives)
    said = {
        label: {"positive": p} if labels.exclusive else {"positive": p, "negative": n}
        for label, p, n in zip(labels.names, positive, negative, strict=True)
    }
    result = evaluate(scores[:, kept], kept, labels, seed=question.seed)
    return Evaluation(result, skipped, question.names, {"prompts": said})


def asked(data: str | Path | None, images: str | Path, question: Mapping[str, Any]) -> LabeledSet:
    """Build a `LabeledSet` from keyword arguments."""
    return LabeledSet(data=None if data is None else Path(data), images=Path(images), **question)


def open_tower(encoder: Path, activation: str | None, weights: str | None = None) -> "Tower":
    """Load a tower and log its warnings."""
    from mgll_encoder.tower.load import load_tower

    choices: dict[str, Any] = {"activation": activation, "weights": weights}  # checked by load_tower
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
        raise UserError(
            f"no label has negative and {min_positives} positive test images, and both to train on: see `min_positives`"
        )
