"""Export of questions, and of a run's answers, to other tools' formats."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eval_mcq.formats import lmms_eval, vlmevalkit
from eval_mcq.items.image_checks import content_name, with_pictures
from eval_mcq.items.parquet import EMBEDDED, write_rows
from eval_mcq.items.schema import Bench, MCQItem, bench_text
from eval_mcq.records.run_record import Run
from eval_mcq.scoring.prompt import render
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import new_file, write_text

Row = Callable[[MCQItem, list[str]], dict[str, object]]
"""Makes a row of a JSON list from a question and its image paths."""


def _listed(row: Row, bench: Bench, out: Path, images: Path, force: bool) -> None:
    """Write a JSON list with one row per question; image paths are relative to a folder."""
    start = images.resolve()
    rows = [
        row(
            item,
            [Path(os.path.relpath(path.resolve(), start)).as_posix() for path in bench.image_paths(item)],
        )
        for item in bench.items
    ]
    write_text(out, json.dumps(rows, indent=1) + "\n", force)


def _asked(item: MCQItem) -> str:
    return "<image>\n" * len(item.images) + render(item)


def _llava_row(item: MCQItem, paths: list[str]) -> dict[str, object]:
    """LLaVA's conversations: the scorer's prompt, answered by the true letter."""
    return {
        "id": item.id,
        "image": paths[0] if len(paths) == 1 else paths,
        "conversations": [
            {"from": "human", "value": _asked(item)},
            {"from": "gpt", "value": item.letter},
        ],
    }


def _messages_row(item: MCQItem, paths: list[str]) -> dict[str, object]:
    """``messages`` and ``images``, as read by LLaMA-Factory and ms-swift."""
    return {"id": item.id, "messages": _chat(_asked(item), item), "images": paths}


def _trl_row(item: MCQItem, paths: list[str]) -> dict[str, object]:
    """Likewise, as read by TRL, which adds the placeholders itself."""
    return {"id": item.id, "messages": _chat(render(item), item), "images": paths}


def _chat(asked: str, item: MCQItem) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": item.letter}]


def _vlmevalkit(bench: Bench, out: Path, images: Path, force: bool) -> None:  # noqa: ARG001 (images are embedded)
    with new_file(out, force) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(vlmevalkit.to_tsv(bench))


def _lmms_eval(bench: Bench, out: Path, images: Path, force: bool) -> None:  # noqa: ARG001
    lmms_eval.write_task(bench, out, force)


def _jsonl(bench: Bench, out: Path, images: Path, force: bool) -> None:  # noqa: ARG001
    items = [_named(bench, _moved(bench, item, out)) for item in bench.items]
    write_text(out, bench_text(bench.header, items), force)


def _parquet(bench: Bench, out: Path, images: Path, force: bool) -> None:  # noqa: ARG001
    with new_file(out, force) as partial:
        write_rows(partial, bench.header.model_dump_json(by_alias=True), _embedded(bench), embed=True)


def _embedded(bench: Bench) -> Iterator[dict[str, Any]]:
    for item, pictures in with_pictures(bench):
        names = [content_name(data, suffix) for data, suffix in pictures]
        row = _named(bench, item.model_copy(update={"images": names}))
        yield {**row.model_dump(), EMBEDDED: [data for data, _ in pictures]}


def _named(bench: Bench, item: MCQItem) -> MCQItem:
    """Return the question with the patient's name for outputs."""
    return item.model_copy(update={"patient": bench.patients[item.id]})


def _moved(bench: Bench, item: MCQItem, out: Path) -> MCQItem:
    """Return the question with image paths relative to the folder of another file."""
    folder = out.absolute().parent
    paths = [Path(os.path.relpath(path.absolute(), folder)).as_posix() for path in bench.image_paths(item)]
    return item.model_copy(update={"images": paths})


BY_PATH: Mapping[str, Row] = {"llava": _llava_row, "messages": _messages_row, "trl": _trl_row}
"""Formats that are JSON lists and refer to images by path."""

EXPORTERS: Mapping[str, Callable[[Bench, Path, Path, bool], None]] = {
    **{name: partial(_listed, row) for name, row in BY_PATH.items()},
    "vlmevalkit": _vlmevalkit,
    "lmms-eval": _lmms_eval,
    "parquet": _parquet,
    "jsonl": _jsonl,
}
"""Format name -> function of benchmark, output, image folder and force that writes it."""


def write_predictions(bench: Bench, run: Run, out: Path, force: bool = False) -> int:
    """Write a run's answers as a table for VLMEvalKit to score.

    Returns:
        Number of predictions.

    Raises:
        UserError: the run used a different benchmark.
    """
    if run.record.bench_sha256 != bench.digest:
        raise BadDataError(
            f"run {run.folder} answered {run.record.bench} ({run.record.bench_sha256[:12]}), not {bench.path} "
            f"({bench.digest[:12]}): give the bench that was run"
        )
    chosen = {answer.id: answer.chosen or vlmevalkit.UNREAD for answer in run.answers}
    with new_file(out, force) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(vlmevalkit.predictions(bench, chosen))
    return len(chosen)
