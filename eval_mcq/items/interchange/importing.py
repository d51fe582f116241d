"""Importing questions: read rows of a format, check every question, keep its pictures, write nothing half."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eval_mcq.items.interchange import hub, vlmevalkit
from eval_mcq.items.interchange.columns import AnswerKind, ColumnMap, RawQuestion, Same, as_text, true_option
from eval_mcq.items.interchange.conversations import read_conversations, read_scienceqa, with_hint
from eval_mcq.items.interchange.pictures import PictureFolder, from_base64
from eval_mcq.items.interchange.rows import Row, read_rows
from eval_mcq.items.parquet import embedded_images
from eval_mcq.items.pictures import check_images
from eval_mcq.items.schema import BenchHeader, MCQItem, first_fault, read_bench
from mgll_encoder.common.errors import UserError

OMNIMEDVQA = ColumnMap(
    {
        "id": ("question_id",), "image": ("image_path",), "question": ("question",), "options": ("option_{}",),
        "answer": ("gt_answer",), "category": ("question_type",), "source": ("dataset",),
    },
    tagged=("modality_type", "modality"),
)  # fmt: skip
"""OmniMedVQA's QA_information files (one entry writes ``modality`` for ``modality_type``)."""


@dataclass(frozen=True)
class Source:
    """What to import.

    Attributes:
        path: File, folder or hub id.
        images: Folder that image paths are relative to; that of the file if not given.
        split: Which split, for formats that have any.
        maps: The user's ``FIELD=COLUMN`` pairs.
        skipped: Filled with what has no options or no image, and so is no question here.
    """

    path: str
    images: Path | None = None
    split: str | None = None
    maps: Sequence[str] = ()
    skipped: list[str] = field(default_factory=list)

    @property
    def image_folder(self) -> Path:
        """Folder that image paths are relative to."""
        path = Path(self.path)
        return self.images or (path if path.is_dir() else path.parent)


@dataclass
class ImportReport:
    """What came in: questions per category, circular copies folded, entries that are no question, new pictures."""

    questions: Counter[str] = field(default_factory=Counter)
    folded: int = 0
    skipped: int = 0
    pictures: int = 0


Finish = Callable[[Sequence[tuple[RawQuestion, MCQItem]]], list[MCQItem]]


def _as_they_are(found: Sequence[tuple[RawQuestion, MCQItem]]) -> list[MCQItem]:
    return [item for _, item in found]


@dataclass(frozen=True)
class Format:
    """How one tool writes questions.

    Attributes:
        read: Source to questions.
        finish: What is done to all of them at the end.
        maps_columns: Whether ``--map`` has a meaning.
        splits: Whether ``--split`` has one.
    """

    read: Callable[[Source], Iterator[RawQuestion]]
    finish: Finish = _as_they_are
    maps_columns: bool = True
    splits: bool = False


def import_questions(
    format_: str, source: Source, bench: Path, name: str = "", force: bool = False
) -> tuple[BenchHeader, list[MCQItem], ImportReport]:
    """Read questions of another tool. Embedded pictures go to ``<bench>_images``; the bench itself is not written.

    Args:
        format_: A name of :data:`FORMATS`.
        source: What to read.
        bench: Where the bench file will lie; image paths are written relative to its folder.
        name: Name of the bench for tables; the file's if not given.
        force: Replace the picture folder.

    Raises:
        UserError: a row is not of the format, a question makes no sense, an image is missing or unreadable or
            too large, two questions have one id, or nothing is found; names file, row and field.
    """
    chosen = FORMATS[format_]
    if source.maps and not chosen.maps_columns:
        raise UserError(f"--map has no meaning for format '{format_}': its fields are fixed")
    if source.split is not None and not chosen.splits:
        raise UserError(f"--split has no meaning for format '{format_}': it has no splits")
    found: list[tuple[RawQuestion, MCQItem]] = []
    with PictureFolder(bench.with_name(f"{bench.stem}_images"), force) as pictures:
        taken: dict[str, list[str]] = {}
        waiting: dict[int, str] = {}  # place in `found` to the index of the row that has the images
        for raw in chosen.read(source):
            if isinstance(raw.images[0], Same):
                waiting[len(found)] = raw.images[0].index
                images = ["(another row's)"]
            else:
                images = [_place(image, raw, source, bench, pictures) for image in raw.images]
                if raw.index is not None:
                    taken[raw.index] = images
            item = _item(raw, images, bench)
            found.append((replace(raw, images=[]), item))  # a file may hold more pictures than memory does
        for place, index in waiting.items():
            raw, item = found[place]
            found[place] = raw, item.model_copy(update={"images": _borrow(raw, index, taken)})
        items = chosen.finish(found)
        _check(items, found, source, bench, pictures.kept)
        report = ImportReport(
            Counter(item.category for item in items),
            len(found) - len(items), len(source.skipped), len(pictures.kept),
        )  # fmt: skip
    built = {"imported": format_, "from": Path(source.path).name}
    categories = list(dict.fromkeys(item.category for item in items))
    return BenchHeader(name=name, categories=categories, built=built), items, report


def _item(raw: RawQuestion, images: list[str], bench: Path) -> MCQItem:
    answer = true_option(raw.where, raw.options, raw.answer, raw.kind)
    try:
        return MCQItem(
            id=raw.id, images=images, question=raw.question, options=raw.options, answer=answer,
            category=raw.category or bench.stem, source=raw.source, patient=raw.patient, tags=raw.tags,
        )  # fmt: skip
    except ValidationError as error:
        raise UserError(f"{raw.where} (id '{raw.id}'): {first_fault(error)}") from None


def _place(
    image: bytes | str | Same, raw: RawQuestion, source: Source, bench: Path, pictures: PictureFolder
) -> str:
    if isinstance(image, Same):
        raise UserError(f"{raw.where}: the image refers to row '{image.index}' beside images of its own")
    if isinstance(image, bytes):
        return pictures.add(image, f"{raw.where} (id '{raw.id}')")
    path = Path(os.path.relpath((source.image_folder / image).absolute(), bench.absolute().parent))
    return path.as_posix()


def _borrow(raw: RawQuestion, index: str, taken: Mapping[str, list[str]]) -> list[str]:
    if index not in taken:
        raise UserError(
            f"{raw.where}: its image cell '{index}' is too short for base64 and no row of this index has an image"
        )
    return taken[index]


def _check(
    items: Sequence[MCQItem],
    found: Sequence[tuple[RawQuestion, MCQItem]],
    source: Source,
    bench: Path,
    embedded: set[str],
) -> None:
    if not items:
        skipped = f" ({len(source.skipped)} entries have no options or no image)" if source.skipped else ""
        raise UserError(f"{source.path} holds no multiple-choice question{skipped}: check --format")
    where = {id(item): raw.where for raw, item in found}
    first: dict[str, MCQItem] = {}
    for item in items:
        if item.id in first:
            raise UserError(
                f"{where[id(item)]}: id '{item.id}' is already used by {where[id(first[item.id])]}; "
                "name a column with unique ids by --map id=COLUMN"
            )
        first[item.id] = item
    folder = bench.absolute().parent
    paths = {
        (folder / image).resolve(): item.id
        for item in reversed(items)
        for image in item.images
        if image not in embedded  # those were decoded when they were kept
    }
    if paths:
        check_images(paths)


Cells = Callable[[Row, Any], list[bytes | str | Same]]


def _rows(columns: ColumnMap, cells: Cells, kind: AnswerKind) -> Callable[[Source], Iterator[RawQuestion]]:
    """A reader of files with a row per question."""

    def read(source: Source) -> Iterator[RawQuestion]:
        return questions(read_rows(Path(source.path)), columns.overridden(source.maps), cells, kind)

    return read


def questions(
    rows: Iterable[Row], columns: ColumnMap, cells: Cells, kind: AnswerKind
) -> Iterator[RawQuestion]:
    """Rows as questions, by a map of columns."""
    for number, row in enumerate(rows):
        index = as_text(row.cells.get("index"))
        yield RawQuestion(
            where=row.where, id=columns.text(row, "id") or str(number), images=cells(row, columns.cell(row, "image")),
            question=with_hint(columns.text(row, "hint"), columns.text(row, "question")),
            options=columns.options(row), answer=columns.cell(row, "answer"), category=columns.text(row, "category"),
            source=columns.text(row, "source"), patient=columns.text(row, "patient"), tags=columns.tags(row),
            kind=kind, index=index or None,
        )  # fmt: skip


def any_images(row: Row, cell: Any) -> list[bytes | str | Same]:
    """Images as ``datasets`` gives them (bytes and path), bytes, data URIs, or paths; one or a list."""
    cells = cell if isinstance(cell, list) else [cell]
    images: list[bytes | str | Same] = []
    for one in cells:
        value = (one.get("bytes") or one.get("path")) if isinstance(one, dict) else one
        if isinstance(value, str) and value.startswith("data:"):
            value = from_base64(value, row.where)
        if not value or not isinstance(value, bytes | str):
            raise UserError(f"{row.where}: the image is blank or not an image ({type(one).__name__})")
        images.append(value)
    if not images:
        raise UserError(f"{row.where}: the list of images is empty")
    return images


def _hub(source: Source) -> Iterator[RawQuestion]:
    rows = hub.read_dataset(source.path, source.split)
    return questions(rows, hub.COLUMNS.overridden(source.maps), any_images, "any")


def _parquet(source: Source) -> Iterator[RawQuestion]:
    path = Path(source.path)
    _, items = read_bench(path)
    for item, embedded in zip(items, embedded_images(path), strict=True):
        images: list[bytes | str | Same] = [*embedded] if embedded else [*item.images]
        yield RawQuestion(
            where=f"{path}: question '{item.id}'", id=item.id, images=images, question=item.question,
            options=item.options, answer=item.answer, category=item.category, source=item.source,
            patient=item.patient, tags=item.tags,
        )  # fmt: skip


FORMATS: Mapping[str, Format] = {
    "vlmevalkit": Format(
        _rows(vlmevalkit.COLUMNS, vlmevalkit.image_cells, "letter"), vlmevalkit.fold_circular
    ),
    "gmai": Format(
        _rows(vlmevalkit.GMAI_COLUMNS, vlmevalkit.image_cells, "letter"), vlmevalkit.fold_circular
    ),
    "omnimedvqa": Format(_rows(OMNIMEDVQA, any_images, "text")),
    "llava": Format(lambda s: read_conversations(Path(s.path), s.skipped), maps_columns=False),
    "scienceqa": Format(
        lambda s: read_scienceqa(Path(s.path), s.split, s.image_folder, s.skipped),
        maps_columns=False,
        splits=True,
    ),
    "hf": Format(_hub, splits=True),
    "parquet": Format(_parquet, maps_columns=False),
}
"""Format name to its reader."""
