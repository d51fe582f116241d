"""Options that the probing functions share: as keywords, and as the objects that are passed on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from mgll_encoder.common.devices import AUTO
from mgll_encoder.common.tables import TableOptions

Options = TypeVar("Options", bound="TowerOptions")


@dataclass(frozen=True)
class TowerOptions:
    """How a tower is read and where it computes.

    Attributes:
        activation: ``gelu`` or ``quick_gelu``, for towers that do not specify it.
        weights: ``raw`` or ``ema``, for towers stored with a moving average of their weights.
        strict: Stop at the first row or image that would be skipped.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` uses the GPU if there is one.
    """

    activation: str | None = None
    weights: str | None = None
    strict: bool = False
    device: str = AUTO


@dataclass(frozen=True)
class EvaluationOptions(TowerOptions):
    """`TowerOptions`, and how a tower is evaluated.

    Attributes:
        seed: Seed of the bootstrap; `mgll_encoder.finetune_probe`: and of the training.
        workers: Processes that read images; one per core if not given.
    """

    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True)
class ProbeOptions(EvaluationOptions):
    """`EvaluationOptions`, and which labels are evaluated.

    Attributes:
        min_positives: Labels with fewer positive test images are skipped.
    """

    min_positives: int = 10


class TowerKeywords(TypedDict, total=False):
    """The fields of `TowerOptions`."""

    activation: str | None
    weights: str | None
    strict: bool
    device: str


class EvaluationKeywords(TowerKeywords, total=False):
    """The fields of `EvaluationOptions`."""

    seed: int
    workers: int | None


class ProbeKeywords(EvaluationKeywords, total=False):
    """The fields of `ProbeOptions`."""

    min_positives: int


class LabelKeywords(TypedDict, total=False):
    """The fields of `mgll_encoder.probing.labeled_set.LabeledSet` that have a default."""

    dataset: str | None
    image_column: str
    labels_column: str
    binary_columns: str
    patient_column: str | None
    split_column: str | None
    test_labels: Path | None
    test_images: Path | None
    test_list: Path | None
    only: str
    test_share: float
    split_seed: int
    reading: TableOptions


class LabeledTowerKeywords(TowerKeywords, LabelKeywords, total=False):
    """The fields of `TowerOptions` and `LabeledSet`."""


class LabeledProbeKeywords(ProbeKeywords, LabelKeywords, total=False):
    """The fields of `ProbeOptions` and `LabeledSet`."""


def separate(kind: type[Options], given: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Return the options of a kind, and the keywords that are not among its fields."""
    names = {field.name for field in fields(kind)}
    rest = {name: value for name, value in given.items() if name not in names}
    return kind(**{name: value for name, value in given.items() if name in names}), rest
