"""The labeled images of a probe."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError
from mgll_encoder.common.tables import TableOptions, listed
from mgll_encoder.common.texts import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mgll_encoder.common.skipped import Skipped
    from mgll_encoder.data.label_rows import Columns
    from mgll_encoder.data.label_table import LabeledImages, Sides
    from mgll_encoder.probing.benchmarks import Benchmark

_logger = logging.getLogger(__name__)

_COLUMNS = ("file", "labels", "")
"""Defaults of the options that a known data set defines itself."""


@dataclass(frozen=True)
class LabeledSet:
    """The images and labels to use; each field corresponds to the option of the same name."""

    labels: Path | None
    images: Path
    dataset: str | None = None
    image_column: str = "file"
    labels_column: str = "labels"
    binary_columns: str = ""
    patient_column: str | None = None
    split_column: str | None = None
    test_labels: Path | None = None
    test_images: Path | None = None
    test_list: Path | None = None
    only: str = ""
    test_share: float = 0.3
    split_seed: int = 0
    reading: TableOptions = field(default_factory=TableOptions)

    def read(self, skipped: "Skipped", both_sides: bool = True) -> "LabeledImages":
        """Read the labeled images; skipped ones are counted in ``skipped``.

        Raises:
            UserError: see `mgll_encoder.data.label_table`; options that contradict each other.
        """
        from mgll_encoder.data.label_table import read_class_files, read_labels
        from mgll_encoder.probing.benchmarks import benchmark as described

        sides = self._sides(both_sides)
        if self.dataset and (self.image_column, self.labels_column, self.binary_columns) != _COLUMNS:
            raise InvalidArgumentError(
                f"`dataset={self.dataset}` defines the columns: leave their options out"
            )
        only = tuple(name.strip().casefold() for name in self.only.split(";") if name.strip())
        known = described(self.dataset) if self.dataset else None
        if known and not self.labels and known.folders:
            return read_class_files(
                self.images, known.folders, only=only, columns=self._columns_besides(known), sides=sides,
                skipped=skipped, reading=self.reading,
            )  # fmt: skip
        if not self.labels:
            raise InvalidArgumentError(
                "`labels` is missing: expected the label file; only data sets labeled by folders need none"
            )
        return read_labels(
            self.labels, self.images, self._columns(known), only=only or (known.only if known else ()), sides=sides,
            skipped=skipped, reading=self.reading,
        )  # fmt: skip

    def _sides(self, both: bool) -> "Sides":
        """Return how training and test images are told apart."""
        from mgll_encoder.data.label_table import Sides

        if self.test_images and not self.test_labels:
            raise InvalidArgumentError(
                "`test_images` is given without `test_labels`: expected both, or neither"
            )
        if sum(map(bool, (self.test_labels, self.test_list, self.split_column))) > 1:
            raise InvalidArgumentError(
                "`test_labels`, `test_list` and `split_column` exclude each other: give one of them"
            )
        return Sides(
            self.test_share,
            self.split_seed,
            _listed(self.test_list),
            self.test_labels,
            self.test_images,
            both,
        )

    def _columns(self, known: "Benchmark | None") -> "Columns":
        """Return the columns of the label table."""
        from mgll_encoder.data.label_rows import Columns

        if not known:
            return Columns(
                self.image_column, self.labels_column, listed(self.binary_columns), self.patient_column,
                self.split_column,
            )  # fmt: skip
        if not known.tabled:
            raise BadDataError(
                f"data set '{self.dataset}' is labeled by its folders: leave `labels` out, or leave `dataset` "
                "out and name the columns of your file"
            )
        patient = self.patient_column or known.columns.patient
        return replace(known.columns, patient=patient, split=self.split_column)

    def _columns_besides(self, known: "Benchmark") -> "Columns | None":
        """Return the columns of the label table that a data set labeled by folders also has, if it has one."""
        if self.patient_column or self.split_column:
            raise InvalidArgumentError(
                "`patient_column` and `split_column` need a label table: give `labels`, or leave them out"
            )
        columns = known.columns if known.tabled else None
        if self.test_labels and not columns:
            raise BadDataError(f"data set '{self.dataset}' has no label table: leave `test_labels` out")
        return columns

    @property
    def names(self) -> "Mapping[str, str]":
        """Label -> its name in words; only for known data sets."""
        from mgll_encoder.probing.benchmarks import benchmark as described

        return described(self.dataset).in_words if self.dataset else {}

    def warn_of_leaks(self, data: "LabeledImages") -> None:
        """Warn if test images may show patients of the training split."""
        if divided := data.divided:
            _logger.warning(f"{len(divided)} patients have images in both splits: results are too optimistic")
        elif not data.by_patient:
            _logger.warning(
                "no `patient_column`: images of one patient may be in both splits, which makes results too optimistic"
            )


def _listed(path: Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    names = read_text(path, "`test_list`").split()
    if not names:
        raise BadDataError(f"list {path} is empty: expected one test image name per line")
    return frozenset(Path(name).name for name in names)
