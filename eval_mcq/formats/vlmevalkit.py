"""VLMEvalKit's TSV: images as base64 or paths, references to another row's images, circular copies.

Sources of the format: open-compass/VLMEvalKit, vlmeval/dataset/image_base.py and image_mcq.py, smp/file.py.
"""

import base64
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_mcq.formats.columns import ColumnMap, RawQuestion, Same, as_text, literal_list
from eval_mcq.formats.embedded_images import from_base64
from eval_mcq.formats.faults import COPIES_DISAGREE, BadQuestionError
from eval_mcq.formats.rows import SourceRow
from eval_mcq.items.image_checks import with_pictures
from eval_mcq.items.schema import LETTERS, Bench, MCQItem
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.skipped import NOT_NAMED, Skipped

CIRCLE = 10**6
"""Circular copies of a question have its index plus multiples of this."""

REFERENCE = 64
"""An image cell of at most this many characters is the index of the row with the image."""

COLUMNS = ColumnMap(
    {
        "id": ("id", "index"), "image": ("image", "image_path"), "question": ("question",), "hint": ("hint",),
        "options": ("{}",), "answer": ("answer",), "category": ("category", "l2-category"),
        "source": ("source",), "patient": ("patient",), "tags": ("tags",),
    },
    tagged=("split",),
)  # fmt: skip

GMAI_COLUMNS = ColumnMap(
    {**COLUMNS.columns, "category": ("clinical vqa task", "category")},
    tagged=("department", "perceptual granularity", "modality", "split"),
)
"""GMAI-MMBench adds the clinical task, the department and the granularity."""

UNREAD = "Z"
"""VLMEvalKit's mark for a reply that names no option; it counts as wrong."""

READ_AS_BLANK = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
"""Texts that pandas, and therefore VLMEvalKit, reads as a missing cell."""


def image_cells(row: SourceRow, cell: Any) -> list[bytes | str | Same]:
    """Return the images of a row: base64, a list of base64 or of paths, a path, or the index of another row."""
    text = as_text(cell)
    if not text:
        raise BadQuestionError(NOT_NAMED, f"{row.where}: the image is blank")
    many = literal_list(text) if text.startswith("[") else None
    if cell is row.cells.get("image") and len(text) <= REFERENCE and "." not in text:
        return [Same(text)]
    return [_image(as_text(part), row.where) for part in many or [text]]


def _image(text: str, where: str) -> bytes | str:
    return from_base64(text, where) if len(text) > REFERENCE and "." not in text else text


def fold_circular(found: Sequence[tuple[RawQuestion, MCQItem]], skipped: Skipped) -> list[MCQItem]:
    """Merge circular copies into their original question.

    A row is a copy if the row ``k * 10**6`` before it has the same question and the same options in another order. A
    question whose copies have a different true option is skipped with them.

    Raises:
        UserError: there is such a question, and ``skipped`` is strict.
    """
    by_index = {raw.index: (raw, item) for raw, item in found}
    kept: list[MCQItem] = []
    disputed: list[MCQItem] = []
    for raw, item in found:
        base = _base(raw, item, by_index)
        if base is None:
            kept.append(item)
        elif item.options[item.answer] != base.options[base.answer]:
            skipped.add(
                COPIES_DISAGREE,
                f"{raw.where}: circular copy {raw.index} of question '{base.id}' has the answer "
                f"'{item.options[item.answer]}', the question itself '{base.options[base.answer]}'",
            )
            disputed.append(base)
    return [item for item in kept if not any(item is base for base in disputed)]


def _base(
    raw: RawQuestion, item: MCQItem, by_index: Mapping[str | None, tuple[RawQuestion, MCQItem]]
) -> MCQItem | None:
    if not (raw.index or "").isdecimal() or int(raw.index or 0) < CIRCLE:
        return None
    _, base = by_index.get(str(int(raw.index or 0) % CIRCLE), (None, None))
    if base is None or base.question != item.question or sorted(base.options) != sorted(item.options):
        return None
    return base


def to_tsv(bench: Bench) -> Iterator[str]:
    """Yield a benchmark as lines of VLMEvalKit's TSV: each image once in base64, ids and patients in extra columns.

    VLMEvalKit requires consecutive indices, so ``index`` is the position in the benchmark and ``id`` the id.

    Raises:
        UserError: VLMEvalKit would read an option's text as missing.
    """
    letters = LETTERS[: max(len(item.options) for item in bench.items)]
    columns = [
        "index",
        "id",
        "question",
        *letters,
        "answer",
        "category",
        "source",
        "patient",
        "tags",
        "image",
    ]
    yield _line(columns)
    first_use: dict[tuple[Path, ...], int] = {}
    for index, (item, pictures) in enumerate(with_pictures(bench)):
        first = first_use.setdefault(tuple(bench.image_paths(item)), index)
        images = str(first) if first != index else _encoded(pictures)
        yield _line(
            [
                *(str(index), item.id, item.question), *_option_cells(item, letters), item.letter, item.category,
                item.source, bench.patients[item.id], json.dumps(item.tags, ensure_ascii=False), images,
            ]
        )  # fmt: skip


def predictions(bench: Bench, chosen: Mapping[str, str]) -> Iterator[str]:
    """Yield the table that VLMEvalKit scores with ``--mode eval``: the questions, with the chosen letter as prediction.

    Args:
        bench: The questions.
        chosen: Question id -> chosen letter; questions without one are omitted.
    """
    letters = LETTERS[: max(len(item.options) for item in bench.items)]
    yield _line(["index", "question", *letters, "answer", "category", "prediction"])
    for index, item in enumerate(bench.items):
        if item.id in chosen:
            cells = [str(index), item.question, *_option_cells(item, letters), item.letter, item.category]
            yield _line([*cells, chosen[item.id]])


def _option_cells(item: MCQItem, letters: str) -> list[str]:
    for option in item.options:
        if option.strip() in READ_AS_BLANK:
            raise BadDataError(
                f"question '{item.id}': VLMEvalKit reads the option '{option}' as missing: reword it, or export to "
                "another format"
            )
    return [*item.options, *("" for _ in letters[len(item.options) :])]


def _encoded(pictures: Sequence[tuple[bytes, str]]) -> str:
    texts = [base64.b64encode(data).decode() for data, _ in pictures]
    return texts[0] if len(texts) == 1 else json.dumps(texts)


def _line(cells: Sequence[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(cells)
    return stream.getvalue()
