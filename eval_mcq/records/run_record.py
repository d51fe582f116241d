"""The files of a run: ``run.json`` (model, benchmark and settings) and ``answers.jsonl`` (the answers)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from eval_mcq.items.schema import LETTERS, parse
from eval_mcq.records.answer import Answer, ItemAnswer, Texts
from eval_mcq.records.answers_file import whole_lines
from eval_mcq.records.backend_record import BackendRecord
from eval_mcq.records.batching import Shard
from eval_mcq.records.leaks import Leak
from eval_mcq.records.model_history import ModelHistory
from eval_mcq.scoring.prompt import Mode
from mgll_encoder.common.errors import BadDataError, NotFoundError, UserError
from mgll_encoder.common.texts import parse_json, read_text

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"
SUMMARY_FILE = "summary.json"

RUN_FORMAT: Final = "eval-mcq-run/2"
"""Version of the run folder; other versions are refused."""


OWN_ENGINE = "eval-mcq"
"""Stands in the identity of a run for this project's own engine."""


Rotations = Annotated[int, Field(ge=1, le=len(LETTERS))]


class RunRecord(BaseModel):
    """What identifies a run; answers are reused only if the whole ``identity`` is the same.

    Attributes:
        format: Version of the run folder.
        model: Model folder as given, or the model's name at a server.
        model_sha256: Hash over the bytes of weights, config, processor and tokenizer, including subfolders; empty if
            they are on a server.
        bench: Benchmark file as given.
        bench_name: Its name for tables.
        bench_sha256: Hash of its bytes.
        categories: Diseases in table order.
        questions: Number of questions in the benchmark.
        mode: Scoring mode.
        rotations: Maximum number of rotations of the options per question; a question with n options has at most n.
        prompt: Version of the prompt, and of the answer parser if there is one.
        dtype: Number format of the model, and its quantization if any.
        code: Versions of scoring, image reader, torch and transformers.
        shard: ``i/n`` for a run with only part of the answers; None for a whole run.
        batch_size: Rows of a batch; shards consist of whole batches. None until the run starts.
        example: The full prompt of the benchmark's first question, for the reader.
        versions: Package versions, for the reader.
        leak: Test images that the model was trained on, if allowed; None for a clean run.
        left_out: What was skipped when the benchmark was built, by reason: rows of the label table, or questions of
            another tool.
        backend: The program that answered, and what it was sent; None for this project's engine, whose version is in
            ``code``.
        history: How the model was made, for the report; None if its folder has no record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal["eval-mcq-run/2"] = RUN_FORMAT
    model: str
    model_sha256: str
    bench: str
    bench_name: str
    bench_sha256: str
    categories: Texts
    questions: int = Field(ge=1)
    mode: Mode
    rotations: Rotations = 1
    prompt: str
    dtype: str
    code: str = ""
    shard: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    example: str = ""
    versions: dict[str, str] = {}
    leak: Leak | None = None
    left_out: dict[str, Annotated[int, Field(ge=0)]] = {}
    backend: BackendRecord | None = None
    history: ModelHistory | None = None

    @field_validator("shard")
    @classmethod
    def _shard_is_one(cls, shard: str | None) -> str | None:
        try:
            return shard if shard is None else Shard.parse(shard).name
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def engine(self) -> str:
        """The program that answered, with its version unless it is this project's own, which `versions` has."""
        return f"{self.backend.name} {self.backend.version}" if self.backend else OWN_ENGINE

    @property
    def identity(self) -> dict[str, str]:
        """What must agree for an answer to belong to this run, named as in error messages."""
        return {
            "backend": self.backend.text if self.backend else OWN_ENGINE,
            "model": self.model_sha256, "bench": self.bench_sha256, "scoring mode": self.mode,
            "number of rotations": str(self.rotations), "prompt": self.prompt, "dtype": self.dtype,
            "scoring version": self.code,
        }  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Short hash of the identity, written into every row."""
        identity = self.identity
        if self.backend is None:  # as before backends had a name
            del identity["backend"]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: "RunRecord") -> str | None:
        """Return the first difference to another run's identity, with both values; None if there is none."""
        for what, value in self.identity.items():
            if (theirs := other.identity[what]) != value:
                at = next((i for i, (a, b) in enumerate(zip(value, theirs, strict=False)) if a != b), 0)
                start = max(0, at - 6) if max(len(value), len(theirs)) > 24 else 0
                return f"{what} ({theirs[start : start + 24]}, now {value[start : start + 24]})"
        return None


@dataclass(frozen=True)
class Run:
    """A run as read from disk.

    Attributes:
        folder: Its folder.
        record: What identifies it.
        rows: One answer per question and rotation, in the order of the file.
    """

    folder: Path
    record: RunRecord
    rows: Sequence[Answer]

    @cached_property
    def answers(self) -> list[ItemAnswer]:
        """One answer per question with all rotations answered, in the order of the file."""
        by_item: dict[str, list[Answer]] = {}
        for row in self.rows:
            by_item.setdefault(row.id, []).append(row)
        return [
            ItemAnswer.of(sorted(rows, key=lambda row: row.rotation))
            for rows in by_item.values()
            if len(rows) == min(self.record.rotations, len(rows[0].probabilities))
        ]

    @property
    def complete(self) -> bool:
        """Whether every question of the benchmark is answered in every rotation."""
        return len(self.answers) == self.record.questions

    @property
    def rotation_accuracy(self) -> float:
        """Average accuracy of a single rotation: mean over questions of the share of correct rotations."""
        return float(np.mean([answer.share_right for answer in self.answers]))

    @property
    def all_right_accuracy(self) -> float:
        """Share of questions answered correctly in every rotation."""
        return float(np.mean([answer.all_right for answer in self.answers]))

    @property
    def unparsed(self) -> int:
        """Number of rows whose reply could not be parsed."""
        return sum(row.chosen is None for row in self.rows)


def load_run(folder: Path) -> Run:
    """Read a run, finished or not.

    Raises:
        UserError: it is not a run folder, has a different format, has no answered question, or a line is damaged.
    """
    run = read_run(folder)
    if not run.answers:
        found = "no question in all its rotations" if run.rows else "no question"
        raise BadDataError(f"run {folder} answers {found} yet: call the same `run()` again to resume it")
    return run


def read_run(folder: Path) -> Run:
    """Read a run that may have no answers yet.

    Raises:
        UserError: it is not a run folder, has a different format, or a line is damaged.
    """
    record = read_run_record(folder)
    return Run(folder, record, list(read_answers(folder / ANSWERS_FILE, record)))


def read_run_record(folder: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        UserError: it is missing, damaged, or has a different format.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise NotFoundError(f"{folder} is not a run (it has no {RUN_FILE}): give the `out` folder of `run()`")
    text = read_text(path, "run")
    found = parse_json(text, f"run {path}")
    if not isinstance(found, dict) or found.get("format") != RUN_FORMAT:
        was = str(found.get("format", "eval-mcq-run/1"))[:40] if isinstance(found, dict) else "none"
        raise BadDataError(
            f"run {path} has format '{was}', expected '{RUN_FORMAT}': start the run over with `force=True`"
        )
    return parse(RunRecord, text, f"run {path}")


def read_answers(path: Path, record: RunRecord | None = None) -> Iterator[Answer]:
    """Read the answers file line by line; a truncated last line of a killed run is ignored, and so are duplicate lines.

    Args:
        path: The file; a missing one has no answers.
        record: The run that the rows must belong to, if they name one.

    Raises:
        UserError: another line is damaged, belongs to another run, contradicts an earlier answer, or does not match the
            other rotations of its question.
    """
    lines: dict[tuple[str, int], int] = {}
    questions: dict[str, int] = {}
    for number, line in whole_lines(path):
        answer = parse(Answer, line, f"{path} line {number}")
        where = f"{path} line {number} (id '{answer.id}')"
        if record:
            _check_of(answer, record, where)
        if questions.setdefault(answer.id, answer.about) != answer.about:
            raise BadDataError(
                f"{where} differs from another rotation of its question in category, patient, true letter, image or "
                "number of options: start the run over with `force=True`"
            )
        if (before := lines.get(answer.key)) is None:
            lines[answer.key] = hash(line)
            yield answer
        elif before != hash(line):
            raise BadDataError(
                f"{path} line {number} answers question '{answer.id}' a second time (rotation {answer.rotation}), and "
                "differently: start the run over with `force=True`"
            )


def _check_of(answer: Answer, record: RunRecord, where: str) -> None:
    if answer.run not in ("", record.fingerprint):
        raise BadDataError(
            f"{where} is an answer of another run ({answer.run[:16]}, this is {record.fingerprint}): start the run "
            "over with `force=True`"
        )
    if answer.category not in record.categories:
        raise BadDataError(f"{where} has category '{answer.category}', which is not in {RUN_FILE}")
    if answer.rotation >= record.rotations:
        raise BadDataError(f"{where} is rotation {answer.rotation}, but the run has {record.rotations}")
