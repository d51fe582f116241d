"""The public functions to train and evaluate towers. Paths are checked before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import check_free, optional_path
from mgll_encoder.probing.evaluation import (
    Evaluation,
    evaluate_trained,
    evaluate_zero_shot,
    finetuned,
    linear,
)
from mgll_encoder.probing.labeled_set import LabeledSet
from mgll_encoder.probing.options import (
    EvaluationKeywords,
    EvaluationOptions,
    LabeledProbeKeywords,
    LabeledTowerKeywords,
    ProbeOptions,
    TowerOptions,
    separate,
)
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
        Path(manifest), Path(out), PretrainOptions(**options), images=optional_path(images),
        workers=workers, strict=strict, resume=resume, force=force, save_on_signal=save_on_signal, device=device,
    )  # fmt: skip


def linear_probe(
    encoder: str | Path,
    labels: str | Path | None,
    images: str | Path,
    **options: Unpack[LabeledProbeKeywords],
) -> Evaluation:
    """Fit a linear classifier on frozen features, and evaluate it on other patients.

    Features are cached on disk (``MGLL_CACHE_DIR``), so that a second probe takes seconds.

    Args:
        encoder: The tower: anything that `mgll_encoder.inspect_tower` reads.
        labels: Table (CSV, TSV, Excel, Parquet) of images and labels; None for data sets that are labeled by folders.
        images: Folder that the image column is relative to.
        **options: Fields of `mgll_encoder.probing.options.ProbeOptions` (``activation``, ``min_positives``, ``seed``,
            ``workers``, ``device`` ...) and of `mgll_encoder.probing.labeled_set.LabeledSet` (``patient_column``,
            ``dataset``, ``test_share``, ``split_seed`` ...).

    Raises:
        UserError: table, images or tower cannot be read, or no label has enough images.
    """
    used, question = separate(ProbeOptions, options)
    return evaluate_trained(Path(encoder), _labeled(labels, images, question), linear(used), used)


def zero_shot(
    encoder: str | Path,
    labels: str | Path | None,
    images: str | Path,
    *,
    prompts: str | None = None,
    every: bool = False,
    **options: Unpack[LabeledProbeKeywords],
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
        **options: As for `linear_probe`.

    Raises:
        UserError: as `linear_probe`; or the tower has no text tower.
    """
    used, question = separate(ProbeOptions, options)
    return evaluate_zero_shot(
        Path(encoder), _labeled(labels, images, question), used, prompts=prompts, every=every
    )


def finetune_probe(
    encoder: str | Path,
    labels: str | Path | None,
    images: str | Path,
    *,
    trainings: int = 1,
    tower_out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    **options: Unpack[LabeledProbeKeywords],
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
        force: Replace ``tower_out``.
        **options: As for `linear_probe`.

    Raises:
        UserError: as `linear_probe`; or ``tower_out`` is taken.
    """
    target = optional_path(tower_out)
    if target:
        check_free(target, force)
    used, question = separate(ProbeOptions, options)
    score = finetuned(settings or {}, used, trainings=trainings, tower_out=target, force=force)
    return evaluate_trained(Path(encoder), _labeled(labels, images, question), score, used)


def retrieval(
    encoder: str | Path,
    manifest: str | Path,
    *,
    images: str | Path | None = None,
    split: str = "test",
    granularities: Sequence[str] = (),
    **options: Unpack[EvaluationKeywords],
) -> "Search":
    """Measure retrieval of texts for images and images for texts: recall among the nearest 1, 5 and 10.

    Args:
        encoder: A tower with its text tower: a folder written by `pretrain`, or a full CLIP.
        manifest: Manifest (.jsonl or .parquet).
        images: Image folder; the one named in the manifest if not given.
        split: ``train``, ``val`` or ``test``.
        granularities: Which to use; each alone and all together if not given.
        **options: Fields of `mgll_encoder.probing.options.EvaluationOptions`: ``activation``, ``seed``, ``device`` ...

    Raises:
        UserError: manifest, images or tower cannot be read, or no granularity has two texts.
    """
    from mgll_encoder.probing.search import search

    return search(
        Path(encoder), Path(manifest), EvaluationOptions(**options), images=optional_path(images),
        split=split, granularities=granularities,
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
    force: bool = False,
    **options: Unpack[LabeledTowerKeywords],
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
        force: Replace ``out``.
        **options: Fields of `mgll_encoder.probing.options.TowerOptions` (``activation``, ``device`` ...) and of
            `mgll_encoder.probing.labeled_set.LabeledSet`.

    Raises:
        UserError: images, table or tower cannot be read, a label is unknown, or ``out`` is taken.
    """
    labeled = labels is not None or options.get("dataset") is not None
    if targets and not labeled:
        raise InvalidArgumentError("`targets` needs `labels` with a label table to fit a probe on")
    from mgll_encoder.probing.explained import explain_images

    used, question = separate(TowerOptions, options)
    return explain_images(
        Path(encoder), Path(images), Path(out), used, texts=texts, targets=targets, limit=limit, force=force,
        question=_labeled(labels, images, question) if labeled else None,
    )  # fmt: skip


def _labeled(labels: str | Path | None, images: str | Path, question: Mapping[str, Any]) -> LabeledSet:
    return LabeledSet(labels=optional_path(labels), images=Path(images), **question)
