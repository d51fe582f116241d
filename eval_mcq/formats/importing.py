"""Import of questions: reads the rows of a format, validates every question, and saves embedded pictures."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from eval_mcq.formats import hub, vlmevalkit
from eval_mcq.formats.columns import AnswerKind, ColumnMap, RawQuestion, Same, as_text, true_option
from eval_mcq.formats.conversations import read_conversations, read_scienceqa, with_hint
from eval_mcq.formats.embedded_images import PictureFolder, from_base64
from eval_mcq.formats.enumeration import is_enumerated, without_label
from eval_mcq.formats.faults import (
    MALFORMED,
    SAME_ID,
    SAME_OPTIONS,
    BadQuestionError,
    leaving_out,
)
from eval_mcq.formats.rows import SourceRow, read_rows
from eval_mcq.items.image_checks import unreadable_images
from eval_mcq.items.parquet import embedded_images
from eval_mcq.items.schema import BenchHeader, MCQItem, first_fault, read_bench
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import NO_FILE, NOT_NAMED, UNREADABLE, Skipped, unnamed
from mgll_encoder.data.label_cells import plain

OMNIMEDVQA = ColumnMap(
    {
        "id": ("question_id",), "image": ("image_path",), "question": ("question",), "options": ("option_{}",),
        "answer": ("gt_answer",), "category": ("question_type",), "source": ("dataset",),
    },
    tagged=("modality_type", "modality"),
)  # fmt: skip
"""OmniMedVQA's QA_information files (one entry writes ``modality`` for ``modality_type``)."""


OptionLetters = Literal["auto", "strip", "keep"]
"""How to treat options with their own letters: ``auto`` removes them if all questions of the file have them (refused if
only some do), ``strip`` removes them wherever they occur, ``keep`` keeps them."""


@dataclass(frozen=True)
class ImportSource:
    """What to import.

    Attributes:
        path: File, folder or hub id.
        images: Folder that image paths are relative to; the file's folder if not given.
        split: The split, for formats with splits.
        maps: The user's ``FIELD=COLUMN`` pairs.
        option_letters: See `OptionLetters`.
        skipped: Counts skipped questions; strict if an invalid one stops the import.
    """

    path: str
    images: Path | None = None
    split: str | None = None
    maps: Sequence[str] = ()
    option_letters: OptionLetters = "auto"
    skipped: Skipped = field(default_factory=lambda: Skipped(strict=True, unit="questions"))

    @property
    def image_folder(self) -> Path:
        """Folder that image paths are relative to."""
        path = Path(self.path)
        return self.images or (path if path.is_dir() else path.parent)


@dataclass
class ImportReport:
    """Summary of an import.

    Attributes:
        questions: Questions per category.
        folded: Circular copies that were merged into their questions.
        unlettered: Questions whose options had letters or numbers, which were removed.
        pictures: Embedded pictures that were saved.
        skipped: Questions that were left out, by reason.
    """

    questions: Counter[str] = field(default_factory=Counter)
    folded: int = 0
    unlettered: int = 0
    pictures: int = 0
    skipped: Skipped = field(default_factory=Skipped)


Found = Sequence[tuple[RawQuestion, MCQItem]]

Finish = Callable[[Found, Skipped], list[MCQItem]]


def _as_they_are(found: Found, skipped: Skipped) -> list[MCQItem]:  # noqa: ARG001 (of a Finish)
    return [item for _, item in found]


@dataclass(frozen=True)
class QuestionFormat:
    """The question format of a tool.

    Attributes:
        read: Reads the questions of a source.
        finish: Postprocesses all questions.
        maps_columns: Whether ``maps`` applies.
        splits: Whether ``split`` applies.
    """

    read: Callable[[ImportSource], Iterator[RawQuestion]]
    finish: Finish = _as_they_are
    maps_columns: bool = True
    splits: bool = False


def import_questions(
    format_: str, source: ImportSource, bench: Path, name: str = "", force: bool = False
) -> tuple[BenchHeader, list[MCQItem], ImportReport]:
    """Read questions of another tool. Embedded pictures go to ``<bench>_images``; the benchmark file is not written.

    Args:
        format_: A key of :data:`FORMATS`.
        source: What to read.
        bench: Path of the benchmark file to be written; image paths are relative to its folder.
        name: Name of the benchmark in tables; that of the file if not given.
        force: Replace the picture folder.

    Raises:
        UserError: the file does not have the format, or no question is found; if ``source.skipped`` is strict, also if
            a question is invalid, its image is missing, unreadable or too large, or its id is a duplicate. The message
            names file, row and field.
    """
    chosen = FORMATS[format_]
    if source.maps and not chosen.maps_columns:
        raise InvalidArgumentError(f"`maps` has no effect on format '{format_}': its fields are fixed")
    if source.split is not None and not chosen.splits:
        raise InvalidArgumentError(f"`split` has no effect on format '{format_}': it has no splits")
    with PictureFolder(bench.with_name(f"{bench.stem}_images"), force) as pictures:
        found, unlettered = _without_letters(_read(chosen, source, bench, pictures), source)
        finished = chosen.finish(found, source.skipped)
        folded = len(found) - len(finished)
        items = _sound(finished, found, source, bench, pictures.kept)
        pictures.keep_only({image for item in items for image in item.images})
        report = ImportReport(
            Counter(item.category for item in items), folded, unlettered, len(pictures.kept), source.skipped
        )
    built = {"imported": format_, "from": Path(source.path).name, **source.skipped.record()}
    if source.split is not None:
        built["split"] = source.split
    categories = list(dict.fromkeys(item.category for item in items))
    return BenchHeader(name=name, categories=categories, built=built), items, report


def _read(
    chosen: QuestionFormat, source: ImportSource, bench: Path, pictures: PictureFolder
) -> list[tuple[RawQuestion, MCQItem]]:
    """Return all individually valid questions of the source, and save their embedded pictures."""
    found: list[tuple[RawQuestion, MCQItem]] = []
    pseudonyms = Pseudonyms(Path(source.path))
    taken: dict[str, list[str]] = {}
    waiting: dict[int, str] = {}  # position in `found` -> index of the row with the images
    for raw in chosen.read(source):
        with leaving_out(source.skipped):
            if isinstance(raw.images[0], Same):
                images, other = ["(another row's)"], raw.images[0].index
            else:
                images, other = [_place(image, raw, source, bench, pictures) for image in raw.images], ""
                if raw.index is not None:
                    taken[raw.index] = images
            item = _item(raw, images, bench, pseudonyms)
            if other:
                waiting[len(found)] = other
            found.append((replace(raw, images=[]), item))  # the pictures of a file may not fit into memory
    kept = []
    for place, (raw, item) in enumerate(found):
        with leaving_out(source.skipped):
            if place in waiting:
                item = item.model_copy(update={"images": _borrow(raw, waiting[place], taken)})
            kept.append((raw, item))
    return kept


def _without_letters(found: list[tuple[RawQuestion, MCQItem]], source: ImportSource) -> tuple[Found, int]:
    """Return the questions with the letters of their options removed, and how many had any."""
    lettered = [is_enumerated(item.options) for _, item in found]
    if source.option_letters == "keep" or not any(lettered):
        return found, 0
    if source.option_letters == "auto" and not all(lettered):
        raw, item = found[lettered.index(True)]
        raise BadDataError(
            f"{raw.where}: its options have their own letters or numbers ('{item.options[0]}'), as in "
            f"{sum(lettered)} of {len(found)} questions, but not in all: remove them with `option_letters=strip`, or "
            "keep them with `option_letters=keep`"
        )
    kept: list[tuple[RawQuestion, MCQItem]] = []
    for (raw, item), strip in zip(found, lettered, strict=True):
        with leaving_out(source.skipped):
            options = [without_label(option) for option in item.options]
            kept.append((raw, _checked(raw, {**item.model_dump(), "options": options}) if strip else item))
    return kept, sum(lettered)


def _item(raw: RawQuestion, images: list[str], bench: Path, pseudonyms: Pseudonyms) -> MCQItem:
    answer = true_option(raw.where, raw.options, raw.answer, raw.kind)
    return _checked(
        raw,
        {
            "id": raw.id, "images": images, "question": raw.question, "options": raw.options, "answer": answer,
            "category": raw.category or bench.stem, "source": raw.source, "tags": raw.tags,
            "patient": pseudonyms.patient(raw.patient) if raw.patient else "",
        },
    )  # fmt: skip


def _checked(raw: RawQuestion, fields: dict[str, Any]) -> MCQItem:
    try:
        return MCQItem(**fields)
    except ValidationError as error:
        alike = len(set(map(plain, raw.options))) < len(raw.options)
        reason = SAME_OPTIONS if alike else MALFORMED
        raise BadQuestionError(reason, f"{raw.where} (id '{raw.id}'): {first_fault(error)}") from None


def _place(
    image: bytes | str | Same, raw: RawQuestion, source: ImportSource, bench: Path, pictures: PictureFolder
) -> str:
    if isinstance(image, Same):
        raise BadQuestionError(
            NO_FILE,
            f"{raw.where}: the image refers to row '{image.index}', but the row has images of its own",
        )
    if isinstance(image, bytes):
        return pictures.add(image, f"{raw.where} (id '{raw.id}')")
    if not isinstance(image, str):
        raise BadQuestionError(MALFORMED, f"{raw.where}: the image is {image!r:.60}, expected a path")
    path = Path(os.path.relpath((source.image_folder / image).absolute(), bench.absolute().parent))
    return path.as_posix()


def _borrow(raw: RawQuestion, index: str, taken: Mapping[str, list[str]]) -> list[str]:
    if index not in taken:
        raise BadQuestionError(
            NO_FILE,
            f"{raw.where}: its image cell '{index}' is too short for base64, and no row with this index has an image",
        )
    return taken[index]


def _sound(
    items: Sequence[MCQItem], found: Found, source: ImportSource, bench: Path, embedded: set[str]
) -> list[MCQItem]:
    """Return the questions with a unique id and readable images."""
    where = {id(item): raw.where for raw, item in found}
    first: dict[str, MCQItem] = {}
    for item in items:
        if item.id in first:
            source.skipped.add(
                SAME_ID,
                f"{where[id(item)]}: id '{item.id}' is already used by {where[id(first[item.id])]}; "
                "name a column with unique ids with `maps=id=COLUMN`",
            )
        else:
            first[item.id] = item
    folder = bench.absolute().parent
    paths = {
        (folder / image).resolve()
        for item in first.values()
        for image in item.images
        if image not in embedded  # embedded images were decoded when they were saved
    }
    faults = unreadable_images(sorted(paths))
    sound = []
    for item in first.values():
        shown = [(folder / image).resolve() for image in item.images if image not in embedded]
        if bad := next((path for path in shown if path in faults), None):
            reason = UNREADABLE if bad.exists() else NO_FILE
            source.skipped.add(reason, f"{where[id(item)]}: the image {unnamed(faults[bad], bad)}")
        else:
            sound.append(item)
    source.skipped.read = len(sound) + source.skipped.total
    if not sound:
        raise BadDataError(
            f"{source.path} has no usable multiple-choice question: "
            f"{source.skipped.summary() or 'it contains none'}; check `format` and `images`"
        )
    return sound


Cells = Callable[[SourceRow, Any], list[bytes | str | Same]]


def _rows(
    columns: ColumnMap, cells: Cells, kind: AnswerKind
) -> Callable[[ImportSource], Iterator[RawQuestion]]:
    """Return a reader of files with one row per question."""

    def read(source: ImportSource) -> Iterator[RawQuestion]:
        rows = read_rows(Path(source.path))
        return questions(rows, columns.overridden(source.maps), cells, kind, source.skipped)

    return read


def questions(
    rows: Iterable[SourceRow], columns: ColumnMap, cells: Cells, kind: AnswerKind, skipped: Skipped
) -> Iterator[RawQuestion]:
    """Convert rows to questions by a column map; invalid rows are skipped or refused."""
    for number, row in enumerate(rows):
        with leaving_out(skipped):
            yield _question(number, row, columns, cells, kind)


def _question(number: int, row: SourceRow, columns: ColumnMap, cells: Cells, kind: AnswerKind) -> RawQuestion:
    return RawQuestion(
        where=row.where, id=columns.text(row, "id") or str(number), images=cells(row, columns.cell(row, "image")),
        question=with_hint(columns.text(row, "hint"), columns.text(row, "question")),
        options=columns.options(row), answer=columns.cell(row, "answer"), category=columns.text(row, "category"),
        source=columns.text(row, "source"), patient=columns.text(row, "patient"), tags=columns.tags(row),
        kind=kind, index=as_text(row.cells.get("index")) or None,
    )  # fmt: skip


def any_images(row: SourceRow, cell: Any) -> list[bytes | str | Same]:
    """Return the images of a cell: a ``datasets`` image (bytes and path), bytes, data URI, or path; one or a list."""
    cells = cell if isinstance(cell, list) else [cell]
    images: list[bytes | str | Same] = []
    for one in cells:
        value = (one.get("bytes") or one.get("path")) if isinstance(one, dict) else one
        if isinstance(value, str) and value.startswith("data:"):
            value = from_base64(value, row.where)
        if not value or not isinstance(value, bytes | str):
            raise BadQuestionError(
                NOT_NAMED, f"{row.where}: the image is blank or not an image ({type(one).__name__})"
            )
        images.append(value)
    if not images:
        raise BadQuestionError(NOT_NAMED, f"{row.where}: the list of images is empty")
    return images


def _hub(source: ImportSource) -> Iterator[RawQuestion]:
    rows = hub.read_dataset(source.path, source.split)
    return questions(rows, hub.COLUMNS.overridden(source.maps), any_images, "any", source.skipped)


def _parquet(source: ImportSource) -> Iterator[RawQuestion]:
    path = Path(source.path)
    _, items = read_bench(path)
    for item, embedded in zip(items, embedded_images(path), strict=True):
        images: list[bytes | str | Same] = [*embedded] if embedded else [*item.images]
        yield RawQuestion(
            where=f"{path}: question '{item.id}'", id=item.id, images=images, question=item.question,
            options=item.options, answer=item.answer, category=item.category, source=item.source,
            patient=item.patient, tags=item.tags,
        )  # fmt: skip


FORMATS: Mapping[str, QuestionFormat] = {
    "vlmevalkit": QuestionFormat(
        _rows(vlmevalkit.COLUMNS, vlmevalkit.image_cells, "letter"), vlmevalkit.fold_circular
    ),
    "gmai": QuestionFormat(
        _rows(vlmevalkit.GMAI_COLUMNS, vlmevalkit.image_cells, "letter"), vlmevalkit.fold_circular
    ),
    "omnimedvqa": QuestionFormat(_rows(OMNIMEDVQA, any_images, "text")),
    "llava": QuestionFormat(lambda s: read_conversations(Path(s.path), s.skipped), maps_columns=False),
    "scienceqa": QuestionFormat(
        lambda s: read_scienceqa(Path(s.path), s.split, s.image_folder, s.skipped),
        maps_columns=False,
        splits=True,
    ),
    "hf": QuestionFormat(_hub, splits=True),
    "parquet": QuestionFormat(_parquet, maps_columns=False),
}
"""Format name -> format."""
