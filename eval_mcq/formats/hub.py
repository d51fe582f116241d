"""Data sets read with ``datasets``: a hub id, a folder, or Parquet files, row by row."""

from collections.abc import Iterator
from pathlib import Path

from eval_mcq.formats.columns import ColumnMap
from eval_mcq.formats.rows import READERS, SourceRow, read_rows
from mgll_encoder.common.hf_datasets import open_dataset

COLUMNS = ColumnMap(
    {
        "id": ("id", "question_id", "index", "idx"), "image": ("image", "images", "decoded_image"),
        "question": ("question",), "hint": (), "options": ("options", "choices", "{}", "option_{}"),
        "answer": ("answer", "label"), "category": ("category", "disease", "subject"),
        "source": ("source", "dataset"), "patient": ("patient", "patient_id"), "tags": ("tags",),
    }
)  # fmt: skip


def read_dataset(name: str, split: str | None) -> Iterator[SourceRow]:
    """Read the rows of a data set; images are bytes, not decoded.

    Args:
        name: A folder written by ``save_to_disk``, a folder of Parquet or image files, a .parquet, .json, .jsonl, .csv
            or .tsv file, or the hub id of a data set.
        split: The split to read; optional if there is only one.

    Raises:
        UserError: there is no such data set or split.
    """
    path = Path(name)
    if path.suffix.lower() in READERS and path.is_file():
        yield from read_rows(path)
        return
    for number, cells in enumerate(open_dataset(path, split), start=1):
        yield SourceRow(f"{name} row {number}", cells)
