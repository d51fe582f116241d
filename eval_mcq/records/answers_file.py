"""The answers file: one JSON object per line, appended during a run and sorted when it is complete."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from eval_mcq.records.answer import Answer
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import new_file
from mgll_encoder.common.locks import locked


def lock_run(out: Path, wait: bool = False) -> AbstractContextManager[bool]:
    """Hold the exclusive right to write a run folder; it is released when the process ends.

    Args:
        out: The folder, which need not exist yet.
        wait: Wait for another process that is writing it.

    Raises:
        OutputTakenError: another process is writing it, and ``wait`` is not set.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f".{out.name}.run.lock")
    taken = f"another process is writing run {out} (it holds the lock {file}): wait for it, or choose another `out`"
    return locked(file, None if wait else taken)


def whole_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the complete lines of an answers file with their numbers, without a truncated last line.

    Raises:
        UserError: the file is not UTF-8 text.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.endswith("\n"):
                    yield number, line[:-1]
        except UnicodeDecodeError as error:
            raise BadDataError(f"answers file {path} is not UTF-8 text (byte {error.start})") from None


def append_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Append answers and flush them to the operating system, so that a killed process loses none."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(answer.line() for answer in answers))


def sort_answers(path: Path, order: Mapping[str, int]) -> None:
    """Sort the rows of an answers file by question and rotation, and remove duplicates.

    Args:
        path: The file, complete and validated; replaced completely or not at all.
        order: Question id -> position in the benchmark.
    """
    places: list[tuple[int, int]] = []
    starts: dict[tuple[int, int], int] = {}
    with path.open("rb") as stream:
        while line := stream.readline():
            row = json.loads(line)
            places.append((order[row["id"]], row["rotation"]))
            starts.setdefault(places[-1], stream.tell() - len(line))
        if places == sorted(starts):
            return
        with new_file(path, force=True) as partial, partial.open("wb") as in_order:
            for _, start in sorted(starts.items()):
                stream.seek(start)
                in_order.write(stream.readline())


def drop_unfinished_line(path: Path) -> None:
    """Remove a truncated last line of a killed run, so that answers can be appended."""
    if not path.is_file():
        return
    with path.open("rb+") as stream:
        size = stream.seek(0, 2)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            stream.seek(start)
            if (newline := stream.read(end - start).rfind(b"\n")) >= 0:
                stream.truncate(start + newline + 1)
                return
            end = start
        stream.truncate(0)
