"""The public functions to train and evaluate towers. Paths are checked before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import check_free
from mgll_encoder.probing.evaluation import (
    Evaluation,
    evaluate_trained,
    evaluate_zero_shot,
    finetuned,
    linear,
)
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.weights.locate import check_manifest

if TYPE_CHECKING:
    from mgll_encoder.pretraining.pretrain import PretrainResult
    from mgll_encoder.probing.explained import Sheet
    from mgll_encoder.probing.search import Search


def pretrain(
    manifest: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    workers: int = 2,
    strict: bool = False,
    resume: bool = False,
    force: bool = False,
    save_on_signal: bool = False,
    device: str = AUTO,
    **options: Any,
) -> "PretrainResult":
    """Train a tower with the MGLL losses, or its plain CLIP control, on a manifest's training split.

    Args:
        manifest: Manifest (.jsonl or .parquet).
        out: New folder for the tower.
        images: Image folder; the one named in the manifest if not given.
        workers: Processes that open images.
        strict: Stop at the first row that would be skipped.
        resume: Continue an interrupted run with the same options.
        force: Replace ``out``.
        save_on_signal: Save a checkpoint before ending on SIGTERM or Ctrl-C.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPU if there is one.
        **options: Fields of `mgll_encoder.pretraining.options.PretrainOptions`: ``loss``, ``init``, ``epochs`` ...

    Raises:
        UserError: manifest, images or weights cannot be read, or ``out`` exists.
    """
    check_manifest(Path(manifest))
    from mgll_encoder.pretraining.options import PretrainOptions
    from mgll_encoder.pretraining.pretrain import pretrain as train

    return train(
        Path(manifest), Path(out), PretrainOptions(**options), images=None if images is None else Path(images),
        workers=workers, strict=strict, resume=resume, force=force, save_on_signal=save_on_signal, device=device,
    )  # fmt: skip


def linear_probe(
    encoder: str | Path,
    labels: str | Path | None,
    images: str | Path,
    *,
    activation: str | None = None,
    weights: str | None = None,
    min_positives: int = 10,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    device: str = AUTO,
    **question: Any,
) -> Evaluation:
    """Fit a linear classifier on frozen features, and evaluate it on other patients.

    Features are cached on disk (``MGLL_CACHE_DIR``), so that a second probe takes seconds.

    Args:
        encoder: The tower: anything that `mgll_encoder.inspect_tower` reads.
        labels: Table (CSV, TSV, Excel, Parquet) of images and labels; None for data sets that are labeled by folders.
        images: Folder that the image column is relative to.
        activation: ``gelu`` or ``quick_gelu``, for towers that do not specify it.
        weights: ``raw`` or ``ema``, for towers stored with a moving average of their weights.
        min_positives: Labels with fewer positive test images are skipped.
        seed: Seed of the bootstrap; `finetune_probe`: and of the training.
        strict: Stop at the first row or image that would be skipped.
        workers: Processes that read images; one per core if not given.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPU if there is one.
        **question: Further fields of `mgll_encoder.probing.labeled_set.LabeledSet`: ``patient_column``, ``dataset``,
            ``test_share``, ``split_seed`` ...

    Raises:
        UserError: table, images or tower cannot be read, or no label has enough images.
    """
    return evaluate_trained(
        Path(encoder), asked(labels, images, question), linear(min_positives, workers, device),
        activation=activation, weights=weights, seed=seed, strict=strict,
    )  # fmt: skip


def zero_shot(
    encoder: str | Path,
    labels: str | Path | None,
    images: str | Path,
    *,
    prompts: str | None = None,
    every: bool = False,
    activation: str | None = None,
    weights: str | None = None,
    min_positives: int = 10,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    device: str = AUTO,
    **question: Any,
) -> Evaluation:
    """Classify without training, by the similarity of an image to prompts of each class.

    The prompts of a class are averaged; if several labels may be true at once, a label is compared with the prompts of
    its absence.

    Args:
        encoder: A tower with its text tower: a folder written by `pretrain`, or a full CLIP.
        labels: As for `linear_probe`.
        images: As for `linear_probe`.
        prompts: ``generic``, ``fundus``, ``xray``, or a .json file; the data set's, or generic, if not given.
        every: Evaluate on all images, not only the test split.
        activation: As for `linear_probe`.
        weights: As for `linear_probe`.
        min_positives: As for `linear_probe`.
        seed: As for `linear_probe`.
        strict: As for `linear_probe`.
        workers: As for `linear_probe`.
        device: As for `linear_probe`.
        **question: As for `linear_probe`.

    Raises:
        UserError: as `linear_probe`; or the tower has no text tower.
    """
    return evaluate_zero_shot(
        Path(encoder), asked(labels, images, question), prompts=prompts, every=every, activation=activation,
        weights=weights, min_positives=min_positives, seed=seed, strict=strict, workers=workers, device=device,
    )  # fmt: skip


def finetune_probe(
    encoder: str | Path,
    labels: str | Path | None,
    images: str | Path,
    *,
    trainings: int = 1,
    tower_out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    activation: str | None = None,
    weights: str | None = None,
    min_positives: int = 10,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    device: str = AUTO,
    force: bool = False,
    **question: Any,
) -> Evaluation:
    """Train the tower together with a linear head, and evaluate both on other patients.

    An interrupted call continues from the last complete epoch when it is repeated.

    Args:
        encoder: As for `linear_probe`.
        labels: As for `linear_probe`.
        images: As for `linear_probe`.
        trainings: Number of trainings, with seeds from ``seed`` on; results are their means.
        tower_out: New folder for the tower that is best on the validation part.
        settings: Fields of `mgll_encoder.probing.finetune.FinetuneOptions`: ``epochs``, ``batch_size``,
            ``learning_rate`` ...
        activation: As for `linear_probe`.
        weights: As for `linear_probe`.
        min_positives: As for `linear_probe`.
        seed: As for `linear_probe`.
        strict: As for `linear_probe`.
        workers: As for `linear_probe`.
        device: As for `linear_probe`.
        force: Replace ``tower_out``.
        **question: As for `linear_probe`.

    Raises:
        UserError: as `linear_probe`; or ``tower_out`` is taken.
    """
    target = None if tower_out is None else Path(tower_out)
    if target:
        check_free(target, force)
    labeled = asked(labels, images, question)
    score = finetuned(
        {"seed": seed, **(settings or {})}, min_positives=min_positives, workers=workers,
        trainings=trainings, tower_out=target, force=force, device=device,
    )  # fmt: skip
    return evaluate_trained(
        Path(encoder), labeled, score, activation=activation, weights=weights, seed=seed, strict=strict
    )


def retrieval(
    encoder: str | Path,
    manifest: str | Path,
    *,
    images: str | Path | None = None,
    split: str = "test",
    granularities: Sequence[str] = (),
    activation: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    device: str = AUTO,
) -> "Search":
    """Measure retrieval of texts for images and images for texts: recall among the nearest 1, 5 and 10.

    Args:
        encoder: A tower with its text tower: a folder written by `pretrain`, or a full CLIP.
        manifest: Manifest (.jsonl or .parquet).
        images: Image folder; the one named in the manifest if not given.
        split: ``train``, ``val`` or ``test``.
        granularities: Which to use; each alone and all together if not given.
        activation: As for `linear_probe`.
        weights: As for `linear_probe`.
        seed: Seed of the bootstrap.
        strict: As for `linear_probe`.
        workers: As for `linear_probe`.
        device: As for `linear_probe`.

    Raises:
        UserError: manifest, images or tower cannot be read, or no granularity has two texts.
    """
    from mgll_encoder.probing.search import search

    return search(
        Path(encoder), Path(manifest), images=None if images is None else Path(images), split=split,
        granularities=granularities, activation=activation, weights=weights, seed=seed, strict=strict, workers=workers,
        device=device,
    )  # fmt: skip


def explain(
    encoder: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    texts: Sequence[str] = (),
    targets: Sequence[str] = (),
    labels: str | Path | None = None,
    limit: int = 6,
    activation: str | None = None,
    weights: str | None = None,
    strict: bool = False,
    device: str = AUTO,
    force: bool = False,
    **question: Any,
) -> "Sheet":
    """Overlay attention and attribution maps on images, and write a contact sheet.

    Args:
        encoder: The tower.
        images: An image, a folder of images, or the folder that the image column of ``labels`` is relative to.
        out: Contact sheet to write (.png).
        texts: Attribute the similarity to these texts; needs the text tower.
        targets: Attribute these classes of a linear probe, fitted on the training split of ``labels``; their images
            come first.
        labels: Table of images and labels; its test images are shown, with their labels. Without it any images are.
        limit: Maximum number of images.
        activation: As for `linear_probe`.
        weights: As for `linear_probe`.
        strict: As for `linear_probe`.
        device: As for `linear_probe`.
        force: Replace ``out``.
        **question: As for `linear_probe`.

    Raises:
        UserError: images, table or tower cannot be read, a label is unknown, or ``out`` is taken.
    """
    labeled = labels is not None or "dataset" in question
    if targets and not labeled:
        raise InvalidArgumentError("`targets` needs `labels` with a label table to fit a probe on")
    from mgll_encoder.probing.explained import explain_images

    return explain_images(
        Path(encoder), Path(images), Path(out), texts=texts, targets=targets, limit=limit,
        question=asked(labels, images, question) if labeled else None,
        activation=activation, weights=weights, strict=strict, force=force, device=device,
    )  # fmt: skip


def asked(labels: str | Path | None, images: str | Path, question: Mapping[str, Any]) -> LabeledSet:
    """Build a `LabeledSet` from keyword arguments."""
    return LabeledSet(labels=None if labels is None else Path(labels), images=Path(images), **question)
