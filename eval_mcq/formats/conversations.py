"""Multiple-choice questions in LLaVA's conversations and ScienceQA's problems."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval_mcq.formats.columns import RawQuestion, as_text
from eval_mcq.formats.faults import MALFORMED, NO_CHOICE, NO_COLUMN, BadQuestionError, leaving_out
from eval_mcq.formats.rows import SourceRow, load_json, read_rows
from eval_mcq.items.schema import LETTERS
from eval_mcq.scoring.prompt import INSTRUCTION
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.skipped import Skipped

OPTION_LINE = re.compile(r"^\(?([A-Z])[.):]\s+", re.MULTILINE)
INLINE = re.compile(r"^Options?: *(?=\(A\))", re.MULTILINE)
INLINE_OPTION = re.compile(r"\(([A-Z])\) ")
INSTRUCTIONS = re.compile(r"^(answer|please|choose|select|respond|reply)\b", re.IGNORECASE)
ANSWER = re.compile(r"^(?:the )?(?:correct )?(?:answer|option) is:? ", re.IGNORECASE)
LETTER_AND_TEXT = re.compile(r"^\(?([A-Z])\)?[.):]\s+(.+)$", re.DOTALL)


def read_conversations(path: Path, skipped: Skipped) -> Iterator[RawQuestion]:
    """Read the questions of a conversations file; turns without options or images are counted in ``skipped``.

    Raises:
        UserError: an entry does not have the format, or its answer is not one of its options.
    """
    for row in read_rows(path):
        with leaving_out(skipped):
            yield from _asked(row, skipped)


def _asked(row: SourceRow, skipped: Skipped) -> Iterator[RawQuestion]:
    """Yield the questions of one conversation."""
    turns, images = row.cells.get("conversations"), row.cells.get("image")
    if not isinstance(turns, list):
        raise BadQuestionError(MALFORMED, f"{row.where} has no list 'conversations': is it LLaVA's format?")
    paths = images if isinstance(images, list) else [images] if images else []
    first = as_text(row.cells.get("id")) or row.where.rpartition(" ")[2]
    for number, (human, gpt) in enumerate(zip(turns[::2], turns[1::2], strict=False), start=1):
        where = row.where if len(turns) == 2 else f"{row.where} turn {number}"
        parsed = parse_prompt(_said(human, "human", where))
        if parsed is None or not paths:
            skipped.add(NO_CHOICE, f"{where} has no options or no image", trouble=False)
            continue
        question, options = parsed
        yield RawQuestion(
            where=where, id=first if len(turns) == 2 else f"{first}#{number}",
            images=paths,
            question=question, options=options, answer=parse_reply(_said(gpt, "gpt", where)),
            category=as_text(row.cells.get("category")),
        )  # fmt: skip


def read_scienceqa(path: Path, split: str | None, images: Path, skipped: Skipped) -> Iterator[RawQuestion]:
    """Read the questions of ScienceQA's ``problems.json``; those without an image are counted in ``skipped``.

    Raises:
        UserError: the file does not have the format.
    """
    problems = load_json(path)
    if not (isinstance(problems, dict) and all(isinstance(p, dict) for p in problems.values())):
        raise BadDataError(
            f"file {path} must contain an object of problems by id, like ScienceQA's problems.json"
        )
    for key, problem in problems.items():
        part = as_text(problem.get("split"))
        if split is not None and part != split:
            continue
        with leaving_out(skipped):
            if question := _problem(f"{path} problem '{key}'", key, problem, images, skipped):
                yield question


def _problem(
    where: str, key: str, problem: dict[str, Any], images: Path, skipped: Skipped
) -> RawQuestion | None:
    """Convert a problem to a question; None, and counted, if it has no image."""
    for field in ("question", "choices", "answer"):
        if field not in problem:
            raise BadQuestionError(
                NO_COLUMN, f"{where} has no '{field}': its fields are {', '.join(problem)}"
            )
    if not isinstance(problem["choices"], list):
        raise BadQuestionError(
            MALFORMED, f"{where}: choices must be a list, found {problem['choices']!r:.60}"
        )
    if not problem.get("image"):
        skipped.add(NO_CHOICE, f"{where} has no image", trouble=False)
        return None
    inner = f"{as_text(problem.get('split'))}/{key}/{as_text(problem['image'])}"
    outer = f"{key}/{as_text(problem['image'])}"
    return RawQuestion(
        where=where, id=str(key), images=[inner if (images / inner).is_file() else outer],
        question=with_hint(as_text(problem.get("hint")), as_text(problem["question"])),
        options=[as_text(choice) for choice in problem["choices"]], answer=problem["answer"],
        category=as_text(problem.get("topic") or problem.get("subject")),
        tags=[f"{n}={problem[n]}" for n in ("subject", "grade", "split") if problem.get(n)],
    )  # fmt: skip


def with_hint(hint: str, question: str) -> str:
    """Prepend the hint to the question."""
    return f"{hint}\n{question}" if hint.strip() else question


def parse_prompt(text: str) -> tuple[str, list[str]] | None:
    """Split a prompt into question and options; None if it has no options.

    Options are one per line ("A. text"), or all in one line ("Options: (A) text (B) text").
    """
    text = text.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", "")
    inline = INLINE.search(text)
    if inline:
        options = INLINE_OPTION.split(text[inline.end() :].split("\n", 1)[0])[1:]
        return text[: inline.start()].rstrip("\n"), [part.strip() for part in options[1::2]]
    marks = _run_of_letters(list(OPTION_LINE.finditer(text)))
    if len(marks) < 2:
        return None
    ends = [mark.start() - 1 for mark in marks[1:]] + [len(text)]
    options = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    options[-1] = _without_instruction(options[-1])
    return text[: marks[0].start()].rstrip("\n"), options


def _run_of_letters(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """Return the last run of marks A, B, C ... (the question itself may contain an "A. ")."""
    starts = [i for i, mark in enumerate(marks) if mark[1] == "A"]
    if not starts:
        return []
    run: list[re.Match[str]] = []
    for mark in marks[starts[-1] :]:
        if mark[1] == LETTERS[len(run)]:
            run.append(mark)
    return run


def _without_instruction(text: str) -> str:
    if text.endswith(f"\n{INSTRUCTION}"):
        return text.removesuffix(f"\n{INSTRUCTION}")
    lines = text.rstrip("\n").split("\n")
    while len(lines) > 1 and (not lines[-1].strip() or INSTRUCTIONS.match(lines[-1])):
        lines.pop()
    return "\n".join(lines)


def parse_reply(text: str) -> str:
    """Return the letter or the option text of a reply such as "B", "B. drusen" or "The answer is B."."""
    text = ANSWER.sub("", text.strip())
    both = LETTER_AND_TEXT.match(text)
    return both[1] if both else text


def _said(turn: Any, speaker: str, where: str) -> str:
    if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
        raise BadQuestionError(MALFORMED, f"{where}: expected a turn from '{speaker}' with a 'value'")
    return str(turn["value"])
