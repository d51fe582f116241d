"""Retrieval by a tower: texts of a manifest for its images, and images for its texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import cache_folder
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.probing.evaluation import open_tower
from mgll_encoder.probing.options import EvaluationOptions
from mgll_encoder.weights.locate import check_tower

if TYPE_CHECKING:
    from mgll_encoder.probing.retrieval import Retrieval


@dataclass(frozen=True)
class Search:
    """Recall of a tower.

    Attributes:
        levels: Granularity (and ``all``) -> texts for images, images for texts.
        patients: Number of patients.
        skipped: What was skipped, by reason.
    """

    levels: "Mapping[str, tuple[Retrieval, Retrieval]]"
    patients: int
    skipped: Skipped


def search(
    encoder: Path,
    manifest: Path,
    options: EvaluationOptions,
    *,
    images: Path | None = None,
    split: str = "test",
    granularities: Sequence[str] = (),
) -> Search:
    """See `mgll_encoder.retrieval`."""
    import numpy as np

    from mgll_encoder.data.caption_dataset import described_images

    skipped = Skipped(options.strict)
    check_tower(encoder)
    found = described_images(manifest, images, split, list(granularities), skipped)
    from mgll_encoder.paired.read import text_tower_of
    from mgll_encoder.probing.features import readable_features
    from mgll_encoder.probing.retrieval import retrieval
    from mgll_encoder.probing.zero_shot import class_directions, projected

    tower = open_tower(encoder, options)
    text = text_tower_of(tower.header.source, tower)
    features, readable = readable_features(
        tower, found.labels, cache_folder("features"), skipped, options.workers, options.device
    )
    projections = projected(tower, features)
    directions = class_directions(text, [[name] for name in readable.names])
    levels = {**found.levels, "all": list(readable.names)} if len(found.levels) > 1 else found.levels
    results: dict[str, tuple[Retrieval, Retrieval]] = {}
    for level, texts in levels.items():
        places = [readable.names.index(name) for name in texts]
        truth = readable.truth[:, places]
        rows, used = np.asarray(truth.any(axis=1)), np.asarray(truth.any(axis=0))
        if used.sum() < 2:
            continue
        owners = [owner for owner, kept in zip(readable.patients, rows, strict=True) if kept]
        results[level] = retrieval(
            projections[rows], directions[places][used], truth[rows][:, used], owners, seed=options.seed
        )
    if not results:
        raise BadDataError(
            f"manifest {manifest}: no granularity has two texts in the {split} split: nothing to retrieve"
        )
    return Search(results, len(set(readable.patients)), skipped)
