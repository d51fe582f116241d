"""The benchmark file: a header with the schema version, then one question per line (JSON Lines) or row (Parquet)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from eval_mcq.items.parquet import SUFFIX, has_embedded, parquet_lines, write_rows
from mgll_encoder.common.errors import BadDataError, UserError, unknown_name
from mgll_encoder.common.files import new_file, sha256, write_text
from mgll_encoder.common.pseudonyms import is_pseudonym
from mgll_encoder.common.texts import parse_json, read_text

SCHEMA = "eval-mcq/1"
"""Version of the benchmark file; other versions are refused."""

LETTERS = ascii_uppercase
"""Option letters; a question has at most 26 options."""

LONG = 1e18
"""Numbers from this size on are not repeated in messages."""

Text = Annotated[str, Field(min_length=1)]
M = TypeVar("M", bound=BaseModel)


class MCQItem(BaseModel):
    """One multiple-choice question about one or more images.

    Attributes:
        id: Unique within the benchmark.
        images: Image paths, absolute or relative to the folder of the benchmark file.
        question: The question, without options and without instructions on how to answer.
        options: 2 to 26 different option texts, in the order in which they are shown.
        answer: Index of the true option. Files may give it as a letter or an index; it is written as a letter.
        category: The disease that the question counts for.
        source: Data set of the image.
        patient: Patient id within the source; answers of a patient form one cluster for the intervals.
        tags: Free-form tags for filtering.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    images: list[Text] = Field(min_length=1)
    question: Text
    options: list[Text] = Field(min_length=2, max_length=len(LETTERS))
    answer: int
    category: Text
    source: str = ""
    patient: str = ""
    tags: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _answer_to_index(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("answer"), str):
            letter = data["answer"].strip().upper()
            if len(letter) != 1 or letter not in LETTERS:
                raise ValueError(f"answer '{data['answer']}' is neither an option's letter nor its index")
            return {**data, "answer": LETTERS.index(letter)}
        return data

    @model_validator(mode="after")
    def _options_fit(self) -> "MCQItem":
        plain = [" ".join(option.casefold().split()) for option in self.options]
        for i, option in enumerate(plain):
            if option in plain[:i]:
                raise ValueError(
                    f"options {LETTERS[plain.index(option)]} and {LETTERS[i]} are both '{self.options[i]}'"
                )
        if not 0 <= self.answer < len(self.options):
            shown = LETTERS[self.answer] if 0 <= self.answer < len(LETTERS) else str(self.answer)
            raise ValueError(f"answer '{shown}' is not among the options A-{LETTERS[len(self.options) - 1]}")
        return self

    @field_serializer("answer")
    def _answer_as_letter(self, answer: int) -> str:
        return LETTERS[answer]

    @property
    def letter(self) -> str:
        """The letter of the true option."""
        return LETTERS[self.answer]

    @property
    def cluster(self) -> str:
        """The cluster of the answer: the patient if known, else the first image."""
        return f"{self.source}/{self.patient}" if self.patient else self.images[0]


class BenchHeader(BaseModel):
    """First line of a benchmark file.

    Attributes:
        schema_version: Must be :data:`SCHEMA`; written as ``schema``.
        name: Name of the benchmark in tables.
        categories: Diseases in table order; empty means order of appearance.
        built: How the file was built (preset, seed, split, label file), for the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: str = Field(default=SCHEMA, alias="schema")
    name: str = ""
    categories: list[Text] = []
    built: dict[str, Any] = {}


@dataclass(frozen=True)
class Bench:
    """A validated benchmark file: unique ids, every category known.

    Attributes:
        path: The file.
        digest: SHA-256 of its bytes.
        header: Its first line.
        items: Questions in the order of the file.
    """

    path: Path
    digest: str
    header: BenchHeader
    items: list[MCQItem]

    @property
    def name(self) -> str:
        """Name for tables."""
        return self.header.name or self.path.stem

    @property
    def categories(self) -> list[str]:
        """Diseases in table order."""
        return self.header.categories or list(dict.fromkeys(item.category for item in self.items))

    @cached_property
    def patients(self) -> dict[str, str]:
        """Question id -> name of its patient in outputs, empty if unknown.

        Pseudonyms are kept; any other id may identify the patient, and becomes the patient's number in the benchmark.
        """
        known = [item for item in self.items if item.patient]
        numbers: dict[tuple[str, str], int] = {}
        for item in known:
            numbers.setdefault((item.source, item.patient), len(numbers) + 1)
        names = {
            item.id: item.patient
            if is_pseudonym(item.patient)
            else f"patient {numbers[item.source, item.patient]}"
            for item in known
        }
        return {item.id: names.get(item.id, "") for item in self.items}

    @property
    def left_out(self) -> dict[str, int]:
        """Number of skipped inputs by reason, as recorded when it was built."""
        skipped = self.header.built.get("skipped")
        counts = skipped if isinstance(skipped, dict) else {}
        return {
            str(reason): count for reason, count in counts.items() if isinstance(count, int) and count > 0
        }

    def image_paths(self, item: MCQItem) -> list[Path]:
        """Return the image paths of an item."""
        folder = self.path.resolve().parent
        return [folder / image for image in item.images]


def bench_text(header: BenchHeader, items: Sequence[MCQItem]) -> str:
    """Return the benchmark file as text."""
    lines = [header.model_dump_json(by_alias=True), *(item.model_dump_json() for item in items)]
    return "\n".join(lines) + "\n"


def load_bench(path: Path) -> Bench:
    """Read and validate a benchmark file.

    Raises:
        UserError: there is no such file, it has a different schema version, an invalid question (named by line, id and
            field), a duplicate id, a category that the header does not list, no question, or images that are only
            inside a Parquet file.
    """
    header, items = read_bench(path)
    if path.suffix == SUFFIX and has_embedded(path):
        _check_unpacked(path, items)
    return Bench(path=path, digest=sha256(path), header=header, items=items)


def read_bench(path: Path) -> tuple[BenchHeader, list[MCQItem]]:
    """Read header and questions of a benchmark file, wherever its images are.

    Raises:
        UserError: as :func:`load_bench`, except for the images.
    """
    parquet = path.suffix == SUFFIX
    lines = parquet_lines(path) if parquet else read_lines(path, "bench")
    if lines == [""]:
        raise BadDataError(f"bench {path} is empty: make one with `build_benchmark()`")
    header = _header(path, lines[0])
    items: list[MCQItem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        item = parse(MCQItem, line, f"bench {path} {'row' if parquet else 'line'} {number - parquet}")
        if item.id in seen:
            raise BadDataError(
                f"bench {path} line {number}: id '{item.id}' is already used on line {seen[item.id]}"
            )
        if header.categories and item.category not in header.categories:
            error = unknown_name("category", item.category, header.categories)
            raise BadDataError(f"bench {path} line {number} (id '{item.id}'): {error}")
        seen[item.id] = number
        items.append(item)
    if not items:
        raise BadDataError(f"bench {path} has a header but no questions: make one with `build_benchmark()`")
    return header, items


def write_bench(path: Path, header: BenchHeader, items: Sequence[MCQItem], force: bool = False) -> None:
    """Write a benchmark completely or not at all: as Parquet if so named, else as JSON Lines.

    Raises:
        UserError: ``path`` exists and ``force`` is not set.
    """
    if path.suffix != SUFFIX:
        write_text(path, bench_text(header, items), force)
        return
    with new_file(path, force) as partial:
        write_rows(partial, header.model_dump_json(by_alias=True), (item.model_dump() for item in items))


def _check_unpacked(path: Path, items: Sequence[MCQItem]) -> None:
    for item in items:
        for image in item.images:
            if not (path.resolve().parent / image).is_file():
                raise BadDataError(
                    f"bench {path}: image {image} of question '{item.id}' is only inside the file: unpack it with "
                    f"`import_benchmark({path}, format=parquet, out={path.stem}.jsonl)`"
                )


def read_lines(path: Path, kind: str) -> list[str]:
    """Read the lines of a UTF-8 text file.

    Raises:
        UserError: the file is missing or is not text.
    """
    # Not splitlines(): JSON strings may contain U+2028 and similar characters unescaped.
    return read_text(path, kind).rstrip("\n").split("\n")


def parse(model: type[M], line: str, where: str) -> M:
    """Validate one JSON text, turning pydantic's report into one line.

    Raises:
        UserError: it is not JSON, or a field is missing, unknown or wrong; the first error is named.
    """
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise BadDataError(f"{where}{_id_of(line)}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """Describe the first error of a pydantic report: field, message, and the value if it is a number."""
    fault = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    # Texts are not repeated: they may be about a patient.
    if isinstance(fault["input"], int | float) and abs(fault["input"]) < LONG:
        message += f" (found {fault['input']})"
    return f"field '{field}': {message}" if field else message


def _header(path: Path, line: str) -> BenchHeader:
    data = parse_json(line, f"bench {path} line 1")
    found = data.get("schema") if isinstance(data, dict) else None
    if found is None:
        raise BadDataError(
            f'bench {path} line 1 must be the header {{"schema": "{SCHEMA}"}}: add it above the questions'
        )
    if found != SCHEMA:
        raise BadDataError(
            f"bench {path} has schema '{found}', expected '{SCHEMA}': rebuild it with `build_benchmark()`"
        )
    return parse(BenchHeader, line, f"bench {path} line 1")


def _id_of(line: str) -> str:
    try:
        data = parse_json(line, "")
    except UserError:
        return ""
    return f" (id '{data['id']}')" if isinstance(data, dict) and "id" in data else ""
