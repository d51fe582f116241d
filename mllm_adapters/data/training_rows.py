"""Training files of any format, read as a stream and cached as memory-mapped Arrow: one row per conversation.

The format is detected from the content: a JSON list or JSON Lines of conversations, a benchmark of eval-mcq
(its first line has a ``schema``), a manifest of ``mgll-encoder data`` (its first line has a ``format``), or
a data set of the library ``datasets``.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypedDict, TypeVar

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from pydantic import BaseModel, ValidationError

from mgll_encoder.common.errors import BadDataError, UserError, unknown_name
from mgll_encoder.common.files import cache_folder, made_once, regular_file
from mgll_encoder.common.hf_datasets import is_dataset
from mgll_encoder.common.progress import track
from mgll_encoder.common.texts import NAN_DECODER, check_content, parse_json
from mgll_encoder.data.manifest import image_folder, read_header
from mgll_encoder.data.manifest import read_rows as read_manifest
from mgll_encoder.data.manifest_formats import format_of
from mllm_adapters.data.captions import ALL, CAPTION_PROMPTS_VERSION, caption, caption_prompt
from mllm_adapters.data.dataset_rows import content_digest, dataset_records, refuse_archive
from mllm_adapters.data.llava_format import Conversation, Turn, faults_of
from mllm_adapters.data.mcq_rows import ANSWERS, BENCH_SCHEMA, BenchQuestion
from mllm_adapters.data.row_shapes import IMAGE_TAG

ROWS_VERSION = 2
"""Part of the key of cached rows: changes when a file's rows would change."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("system", pa.string()),
        ("turns", pa.list_(pa.string())),
        ("train", pa.bool_()),
    ]
)
"""``id`` as JSON; ``turns`` alternate, the human first; ``train`` is false for rows of another side of a split."""

PICTURES = "pictures"
"""Cache folder for embedded images of data sets, named by their hash."""

CHUNK = 1 << 20
BATCH = 1000
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class DataOptions:
    """How rows are made from files.

    Attributes:
        answer: Training target for multiple-choice rows: ``letter``, ``text`` or ``both``.
        caption: Granularity of a manifest used as caption, or ``all`` for all of them in order.
        strict: Whether images that cannot be read stop the run; otherwise their rows are left out and counted.
        seed: Chooses the questions for captions.
    """

    answer: str = "letter"
    caption: str = ALL
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answer not in ANSWERS:
            raise unknown_name("`answer`", self.answer, ANSWERS)


class Row(TypedDict):
    """A row of `SCHEMA`."""

    id: str
    images: list[str]
    system: str | None
    turns: list[str]
    train: bool


M = TypeVar("M", bound=BaseModel)

Reader = Callable[[Path, DataOptions], Iterator[Row]]


class RowTable(Sequence[Conversation]):
    """Rows on disk that behave like a list of conversations.

    Attributes:
        table: The rows, see `SCHEMA`.
        key: Hash of their files and options.
    """

    def __init__(self, table: Dataset, key: str) -> None:
        self.table, self.key = table, key

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return to_conversation(self.table[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(to_conversation, self.table)


def to_conversation(row: Mapping[str, Any]) -> Conversation:
    """Make the conversation of a row that has already been checked."""
    turns = [
        Turn.model_construct(speaker=("human", "gpt")[i % 2], value=t) for i, t in enumerate(row["turns"])
    ]
    return Conversation.model_construct(
        id=json.loads(row["id"]), images=tuple(row["images"]), system=row["system"], turns=tuple(turns)
    )


def to_row(conversation: Conversation) -> Row:
    """Make the row of a conversation."""
    return {
        "id": json.dumps(conversation.id),
        "images": list(conversation.images),
        "system": conversation.system,
        "turns": [turn.value for turn in conversation.turns],
        "train": True,
    }


def read_table(paths: Sequence[Path], options: DataOptions) -> tuple[RowTable, int]:
    """Read training files into one table. Rows are cached by the hash of their file.

    Returns:
        The rows to train on, and the number of rows that the files' own splits exclude from training.

    Raises:
        UserError: a file is missing, empty or of an unknown format, or a row is malformed; the message names
            the first such row, its fault, and the number of further ones.
    """
    tables, keys = zip(*(_cached(path, options) for path in paths), strict=True)
    table = concatenate_datasets(list(tables)) if len(tables) > 1 else tables[0]
    trained = table.data.column("train").to_numpy()
    kept = table if trained.all() else table.select(trained.nonzero()[0])
    if not len(kept):
        raise BadDataError(f"{paths[0]}: none of the {len(table)} rows is in the split 'train'")
    return RowTable(kept, hashlib.sha256("".join(keys).encode()).hexdigest()), len(table) - len(kept)


def in_memory(rows: Iterable[Conversation]) -> Dataset:
    """Make an in-memory table of rows."""
    return Dataset(pa.Table.from_pylist([dict(to_row(row)) for row in rows], SCHEMA))


def _cached(path: Path, options: DataOptions) -> tuple[Dataset, str]:
    """Return the table of a file, and its key; the file is read if it is not cached."""
    read = detect(path)
    said = {**asdict(options), "strict": None, "prompts": CAPTION_PROMPTS_VERSION}
    made_of = [ROWS_VERSION, read.__name__, content_digest(path), str(path.resolve().parent), said]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def make(partial: Path) -> None:
        _write(track(read(path, options), f"Reading rows of {path.name}"), partial, path)

    file = cache_folder("rows") / f"{key}.arrow"
    if read is _dataset and not cache_folder(PICTURES).is_dir():
        file.unlink(missing_ok=True)  # its rows name images that no longer exist
    made_once(file, make)
    return Dataset.from_file(str(file)), key


def _write(rows: Iterator[Row], file: Path, source: Path) -> None:
    count = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        while batch := list(islice(rows, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist([dict(row) for row in batch], SCHEMA))
            count += len(batch)
    if not count:
        raise BadDataError(
            f"{source} holds no conversations: expected a JSON list, or one JSON object per line"
        )


def detect(path: Path) -> Reader:
    """Return the reader for this file, detected from its first line.

    Raises:
        UserError: the file is missing, a folder, or not text; or its header has an unsupported version.
    """
    refuse_archive(path)
    head = _head(path)
    if "format" in head and "granularities" in head:
        return _captions
    if "schema" in head:
        if head["schema"] != BENCH_SCHEMA:
            raise BadDataError(
                f"{path} line 1 has schema '{head['schema']}', expected '{BENCH_SCHEMA}': rebuild it with "
                "`build_benchmark()`"
            )
        return _questions
    return _dataset if is_dataset(path) else _conversations


def built_of(path: Path) -> dict[str, Any]:
    """Return how a manifest or benchmark was made, from its header; empty for other files."""
    built = _head(path).get("built")
    return built if isinstance(built, dict) else {}


def _head(path: Path) -> dict[str, Any]:
    """Return the object in the first line; empty if it is not one: a list over many lines, a data set, or damaged."""
    if is_dataset(path):
        first = format_of(path).header(path).decode() if path.is_file() else ""
    else:
        with _open(path) as stream:
            first = next((line for line in stream if line.strip()), "")
    try:
        head = parse_json(first, str(path))
    except UserError:
        return {}
    return head if isinstance(head, dict) else {}


def _dataset(path: Path, options: DataOptions) -> Iterator[Row]:  # noqa: ARG001 (of a Reader)
    pictures = cache_folder(PICTURES)
    pictures.mkdir(parents=True, exist_ok=True)
    records = ((f"row {number}", record) for number, record in dataset_records(path, pictures))
    yield from map(to_row, _checked(path, records, Conversation.model_validate))


def _conversations(path: Path, options: DataOptions) -> Iterator[Row]:  # noqa: ARG001 (of a Reader)
    yield from map(to_row, conversations(path))


def conversations(path: Path) -> Iterator[Conversation]:
    """Yield the checked conversations of a JSON list or JSON Lines file.

    Raises:
        UserError: after the last row, if rows are malformed; at once, if the file is not JSON.
    """
    yield from _checked(
        path, ((f"row {number}", record) for number, record in _records(path)), Conversation.model_validate
    )


def _questions(path: Path, options: DataOptions) -> Iterator[Row]:
    folder = path.resolve().parent
    records = ((f"line {number}", record) for number, record in islice(_records(path), 1, None))
    for question in _checked(path, records, BenchQuestion.model_validate):
        asked = f"{IMAGE_TAG}\n" * len(question.images) + question.asked()
        yield {
            "id": json.dumps(question.id),
            "images": [str(folder / image) for image in question.images],
            "system": None,
            "turns": [asked, question.answered(options.answer)],  # type: ignore[arg-type] # checked by DataOptions
            "train": True,
        }


def _captions(path: Path, options: DataOptions) -> Iterator[Row]:
    header = read_header(path)
    if options.caption not in (ALL, *header.granularities):
        raise unknown_name(f"`caption` for {path}", options.caption, [ALL, *header.granularities])
    folder = image_folder(path.resolve(), header)
    for number, _, row in read_manifest(path):
        said = caption(row.texts, header.granularities, options.caption)
        if said is not None:
            prompt = caption_prompt(row.image, options.seed)
            yield {
                "id": json.dumps(f"line {number}"),
                "images": [str(folder / row.image)],
                "system": None,
                "turns": [f"{IMAGE_TAG}\n{prompt}", said],
                "train": row.split == "train",
            }


def _checked(path: Path, records: Iterable[tuple[str, Any]], parse: Callable[[Any], M]) -> Iterator[M]:
    """Yield parsed records; faults are counted, and reported at the end."""
    first, faults = "", 0
    for where, record in records:
        try:
            yield parse(record)
        except ValidationError as error:
            name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
            first = first or f"{path}: {where}{name}: {faults_of(error)}"
            faults += 1
    if faults:
        raise BadDataError(first + (f" (and {faults - 1} more bad rows)" if faults > 1 else ""))


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    try:
        with regular_file(path, "data file").open(encoding="utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8 text: {error}") from None


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield row numbers (line numbers in JSON Lines) and rows, one at a time."""
    with _open(path) as stream:
        start = next((line for line in stream if line.strip()), "").lstrip()
        stream.seek(0)
        yield from _listed(stream, path) if start.startswith("[") else _lines(stream, path)


def _lines(stream: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number},", nan=True)


def _listed(stream: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list that need not fit into memory."""
    text = stream.read(CHUNK).lstrip()
    at, size, number = _skip(text, 1), CHUNK, 1
    if text[at:] == "]":
        return
    while True:
        try:
            item, end = NAN_DECODER.raw_decode(text, at)
            end = _skip(text, end)
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected ',' or ']'", text, end)
        except json.JSONDecodeError as error:
            # The item may be incomplete; growing pieces keep the cost of a broken file from being quadratic.
            if not (more := stream.read(size)):
                raise BadDataError(f"{path}, row {number}, is not JSON: {error.msg}") from None
            text, at, size = text[at:] + more, 0, size * 2
            at = _skip(text, at)
            continue
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise BadDataError(f"{path}, row {number}, cannot be read: {reason}") from None
        check_content(item, f"{path}, row {number},")
        yield number, item
        if text[end] == "]":
            break
        at, size, number = _skip(text, end + 1), CHUNK, number + 1
    if (text[end + 1 :] + stream.read()).strip():
        raise BadDataError(f"{path} is not JSON: there is text after the list")


def _skip(text: str, at: int) -> int:
    """Return the end of the white space at a position."""
    return SPACE.match(text, at).end()  # type: ignore[union-attr] # it matches the empty string, too
