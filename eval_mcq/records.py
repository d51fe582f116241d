"""What a run leaves on disk: ``run.json`` (what was asked of whom), ``answers.jsonl`` (the answers)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from eval_mcq.schema import LETTERS, SCHEMA, parse, read_lines
from mgll_encoder.common.errors import UserError

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"
SUMMARY_FILE = "summary.json"


class RunRecord(BaseModel):
    """What identifies a run; answers are reused only while all of ``identity`` is the same.

    Attributes:
        schema_version: Version of the bench and run files.
        model: Model folder as given.
        model_sha256: Hash over the bytes of weights, config, processor and tokenizer.
        bench: Bench file as given.
        bench_name: Its name for tables.
        bench_sha256: Hash of its bytes.
        categories: Diseases in table order.
        questions: Number of questions in the bench.
        mode: Scoring mode.
        prompt: Prompt version.
        dtype: Number format of the model.
        versions: Package versions, for the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: str = SCHEMA
    model: str
    model_sha256: str
    bench: str
    bench_name: str
    bench_sha256: str
    categories: list[str]
    questions: int
    mode: str
    prompt: str
    dtype: str
    versions: dict[str, str] = {}

    @property
    def identity(self) -> dict[str, str]:
        """What must agree for an answer to be this run's, in the words of an error message."""
        return {
            "model": self.model_sha256, "bench": self.bench_sha256,
            "scoring mode": self.mode, "prompt": self.prompt, "dtype": self.dtype,
        }  # fmt: skip


class Answer(BaseModel):
    """One line of ``answers.jsonl``.

    Attributes:
        id: The question.
        category: Its disease.
        cluster: Patient (or image) that its answers are clustered by.
        images_sha256: Bytes of its images.
        gold: True letter.
        chosen: Chosen letter.
        probabilities: Of the offered letters, in order.
        letter_mass: Probability of the offered letters within the whole vocabulary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    category: str
    cluster: str
    images_sha256: list[str]
    gold: str
    chosen: str
    probabilities: list[float]
    letter_mass: float

    @property
    def right(self) -> bool:
        """Whether the true option was chosen."""
        return self.chosen == self.gold

    @property
    def chance(self) -> float:
        """Share that guessing gets right."""
        return 1 / len(self.probabilities)


@dataclass(frozen=True)
class Run:
    """A run as read from disk; ``answers`` in the order in which they were given."""

    folder: Path
    record: RunRecord
    answers: list[Answer]

    @property
    def complete(self) -> bool:
        """Whether every question of the bench is answered."""
        return len(self.answers) == self.record.questions


def load_run(folder: Path) -> Run:
    """Read a run, finished or not.

    Raises:
        UserError: not a run folder, no answers in it, or a line of it is damaged.
    """
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            f"{folder} is not a run (it has no {RUN_FILE}): give the --out folder of eval-mcq run"
        )
    record = parse(RunRecord, (folder / RUN_FILE).read_text(encoding="utf-8"), str(folder / RUN_FILE))
    answers = read_answers(folder / ANSWERS_FILE)
    if not answers:
        raise UserError(
            f"run {folder} holds no answers yet: start the same eval-mcq run command again to resume it"
        )
    return Run(folder, record, answers)


def read_answers(path: Path) -> list[Answer]:
    """Read the answers file; a last line that a killed run left unfinished is passed over.

    Raises:
        UserError: another line is damaged, or a question is answered twice.
    """
    if not path.is_file():
        return []
    lines = read_lines(path, "answers file")
    if lines and not _whole(lines[-1]):
        lines.pop()
    answers = [parse(Answer, line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    seen: set[str] = set()
    for answer in answers:
        if answer.id in seen:
            raise UserError(f"{path} answers question '{answer.id}' twice: start the run anew with --force")
        seen.add(answer.id)
    return answers


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Add answers and hand them to the operating system, so that a killed process loses none."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(answer.model_dump_json() + "\n" for answer in answers))


def letter_counts(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    """Per letter: how often it was true, how often it was chosen."""
    used = max(len(answer.probabilities) for answer in answers)
    return {
        letter: (sum(a.gold == letter for a in answers), sum(a.chosen == letter for a in answers))
        for letter in LETTERS[:used]
    }


def _whole(line: str) -> bool:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict)
