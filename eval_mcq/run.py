"""Running a bench: answers are flushed per batch, and a killed run continues where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from eval_mcq.pictures import check_images
from eval_mcq.prompt import LETTER_PROMPT
from eval_mcq.records import (
    ANSWERS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    Answer,
    Run,
    RunRecord,
    append_answers,
    load_run,
    read_answers,
    read_record,
)
from eval_mcq.schema import LETTERS, Bench, MCQItem
from eval_mcq.summary import as_json, compare
from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import new_folder, sha256, write_text
from mgll_encoder.common.images import open_image

if TYPE_CHECKING:
    from eval_mcq.score import LetterScorer

MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that its answers depend on."""


def model_fingerprint(folder: Path) -> str:
    """Hash over the bytes of a model folder: weights, config, processor and tokenizer; of an adapter, its base's, too.

    Raises:
        UserError: not a folder with a ``config.json``, and no adapter whose base is one.
    """
    from mllm_adapters.adapters import base_of_adapter

    base = base_of_adapter(folder)
    before = [f"base {model_fingerprint(base)}\n"] if base else []
    if not base and not (folder / "config.json").is_file():
        raise UserError(f"model {folder} is not a model folder: it has no config.json")
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_SUFFIXES and path.is_file())
    lines = [f"{path.name} {sha256(path)}\n" for path in track(files, "Hashing the model's files")]
    return hashlib.sha256("".join([*before, *lines]).encode()).hexdigest()


def describe_run(model: Path, fingerprint: str, bench: Bench, dtype: str) -> RunRecord:
    """The record of a run of letter scoring, before its first answer."""
    return RunRecord(
        model=str(model), model_sha256=fingerprint,
        bench=str(bench.path), bench_name=bench.name, bench_sha256=bench.digest,
        categories=bench.categories, questions=len(bench.items),
        mode="letters", prompt=LETTER_PROMPT.version, dtype=dtype,
        versions={package: version(package) for package in ("mgll-mllm", "torch", "transformers")},
    )  # fmt: skip


def check_resumable(out: Path, record: RunRecord, force: bool = False) -> None:
    """Refuse an output folder that holds something else than this very run.

    Raises:
        UserError: the folder is no run, or a run of another model, bench, prompt or number format.
    """
    if not out.exists() or force:
        return
    if not (out / RUN_FILE).is_file():
        raise UserError(
            f"output {out} exists and is not a run: choose another --out, or replace it with --force"
        )
    if differs := record.difference(read_record(out)):
        raise UserError(
            f"run {out} was made with another {differs}: its answers cannot be continued; choose another --out, or "
            "replace it with --force"
        )


def run_bench(
    bench: Bench, load_scorer: Callable[[], "LetterScorer"], record: RunRecord, out: Path,
    batch_size: int = 8, limit: int | None = None, force: bool = False,
) -> Run:  # fmt: skip
    """Answer the questions of a bench that ``out`` does not answer yet.

    All images are decoded before the model is loaded, so that a bad one stops the run before it writes.

    Args:
        bench: The questions.
        load_scorer: Loads the model; not called if nothing is left to answer.
        record: What identifies the run, see :func:`describe_run`.
        out: Run folder; made if missing, continued if it is this run.
        batch_size: Questions per forward pass.
        limit: Only the first so many questions of the bench.
        force: Start anew although ``out`` exists.

    Raises:
        UserError: ``out`` is taken by something else, an image is missing or unreadable or has changed since
            its question was answered, or an option letter is not a single token for this model.
    """
    check_resumable(out, record, force)
    asked = bench.items[:limit]
    digests = check_images({path: item.id for item in reversed(asked) for path in bench.image_paths(item)})
    hashes = {item.id: [digests[path] for path in bench.image_paths(item)] for item in asked}
    old = [] if force else list(read_answers(out / ANSWERS_FILE, record.fingerprint))
    for answer in old:
        if hashes.get(answer.id, answer.images_sha256) != answer.images_sha256:
            raise UserError(
                f"run {out}: an image of question '{answer.id}' has changed since it was answered; "
                "start anew with --force"
            )
    done = {answer.id for answer in old}
    todo = [item for item in asked if item.id not in done]
    scorer = load_scorer() if todo else None
    if scorer:
        scorer.check_letters(todo)
    if force or not out.exists():
        with new_folder(out, force) as partial:
            write_text(partial / RUN_FILE, record.model_dump_json(indent=1) + "\n")
    _drop_unfinished_line(out / ANSWERS_FILE, old)
    if scorer:
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        for new in _answers(bench, scorer, batches, hashes, record.fingerprint):
            append_answers(out / ANSWERS_FILE, new)
    run = load_run(out)
    write_text(out / SUMMARY_FILE, json.dumps(as_json(compare({out.name: run})), indent=1) + "\n", force=True)
    return run


def _answers(
    bench: Bench,
    scorer: "LetterScorer",
    batches: Sequence[Sequence[MCQItem]],
    hashes: dict[str, list[str]],
    fingerprint: str,
) -> Iterator[list[Answer]]:
    for items in track(batches, "Answering, in batches"):
        images = [[open_image(path) for path in bench.image_paths(item)] for item in items]
        scores = scorer.score(items, images)
        yield [
            Answer(
                id=item.id,
                category=item.category,
                cluster=item.cluster,
                images_sha256=hashes[item.id],
                gold=item.letter,
                chosen=LETTERS[score.choice],
                probabilities=[round(p, 6) for p in score.probabilities],
                letter_mass=round(score.letter_mass, 6),
                run=fingerprint,
            )
            for item, score in zip(items, scores, strict=True)
        ]


def _drop_unfinished_line(path: Path, answers: Sequence[Answer]) -> None:
    """Rewrite the file without what a killed run left of its last line, so that appending stays sound."""
    whole = "".join(answer.line() for answer in answers)
    if path.is_file() and path.read_text(encoding="utf-8") != whole:
        write_text(path, whole, force=True)
