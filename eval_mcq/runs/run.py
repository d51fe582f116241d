"""Running a benchmark: answers are flushed per batch, and a killed run continues where it stopped."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from eval_mcq.items.image_checks import check_images, hash_images
from eval_mcq.items.schema import Bench, MCQItem
from eval_mcq.records.answer import Answer
from eval_mcq.records.answers_file import append_answers, drop_unfinished_line, lock_run, sort_answers
from eval_mcq.records.batching import Group, Shard, asks_of, batches, groups
from eval_mcq.records.leaks import Leak
from eval_mcq.records.model_history import ModelHistory
from eval_mcq.records.run_record import (
    ANSWERS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    Run,
    RunRecord,
    read_answers,
    read_run_record,
)
from eval_mcq.runs.image_sensitivity import QUICK, image_sensitivity
from eval_mcq.scoring.modes import LIKELIHOODS, Score, chosen_letter, prompt_version, rounded
from eval_mcq.scoring.prompt import Mode
from eval_mcq.tables.summary import as_json, compare
from mgll_encoder.common.errors import BadDataError, MismatchError, OutputTakenError, TrainingError, UserError
from mgll_encoder.common.faults import writing
from mgll_encoder.common.files import new_folder, write_text
from mgll_encoder.common.images import open_image
from mgll_encoder.common.progress import counting, saying_what_is_kept

if TYPE_CHECKING:
    from PIL.Image import Image

    from eval_mcq.backends.base import Identity
    from eval_mcq.scoring.answerer import Answerer

_logger = logging.getLogger(__name__)

ROWS = 32
"""Default rows of a batch."""

Key = tuple[str, int]


@dataclass(frozen=True)
class Settings:
    """Settings of a run that do not change its answers.

    Attributes:
        batch_size: Rows (questions times rotations) of a batch, see `eval_mcq.records.batching.batches`.
        limit: Use only this many questions from the beginning of the benchmark.
        force: Start over if the output exists.
        shard: The part of the benchmark to run.
    """

    batch_size: int = ROWS
    limit: int | None = None
    force: bool = False
    shard: Shard = Shard()  # noqa: RUF009 - it is immutable


def describe_run(
    identity: "Identity", bench: Bench, mode: Mode = "letters", rotations: int = 1, shard: Shard | None = None,
    leak: Leak | None = None, history: ModelHistory | None = None,
) -> RunRecord:  # fmt: skip
    """Create the record of a run, before its first answer."""
    most = max(len(item.options) for item in bench.items)
    return RunRecord(
        model=identity.model, model_sha256=identity.model_sha256,
        bench=str(bench.path), bench_name=bench.name, bench_sha256=bench.digest,
        categories=bench.categories, questions=len(bench.items),
        mode=mode, rotations=min(rotations, most), prompt=prompt_version(mode), dtype=identity.dtype,
        code=identity.code, shard=(shard or Shard()).name, versions=dict(identity.versions), leak=leak,
        left_out=bench.left_out, backend=identity.backend, history=history,
    )  # fmt: skip


def check_resumable(out: Path, record: RunRecord, force: bool = False) -> None:
    """Refuse an output folder that is anything but this run.

    Raises:
        UserError: the folder is not a run, or has a different model, benchmark, prompt, number format or shard.
    """
    if not out.exists() or force:
        return
    if not (out / RUN_FILE).is_file():
        raise OutputTakenError(
            f"output {out} exists and is not a run: choose another `out`, or replace it with `force=True`"
        )
    old = read_run_record(out)
    differs = record.difference(old)
    if differs is None and old.shard != record.shard:
        differs = f"shard ({old.shard or 'none'}, now {record.shard or 'none'})"
    if differs is None and record.shard and record.batch_size and old.batch_size != record.batch_size:
        differs = f"`batch_size`, which determines the shards ({old.batch_size}, now {record.batch_size})"
    if differs:
        raise MismatchError(
            f"run {out} was made with a different {differs}: its answers cannot be continued; choose another `out`, or "
            "replace it with `force=True`"
        )


def run_bench(
    bench: Bench, load: "Callable[[], Answerer[Any]]", record: RunRecord, out: Path,
    settings: Settings = Settings(),
) -> Run:  # fmt: skip
    """Answer the questions of a benchmark that are not yet answered in ``out``.

    All remaining images are decoded before the model is loaded, so that a damaged one stops the run before it writes.

    Args:
        bench: The questions.
        load: Loads the model; not called if nothing is left to answer.
        record: What identifies the run, see :func:`describe_run`.
        out: Run folder; created if missing, continued if it is this run.
        settings: Settings of the run.

    Raises:
        UserError: ``out`` is something else or is being written by another process, an image is missing, unreadable or
            has changed since its question was answered, or an option letter is not a single token for this model.
    """
    record = record.model_copy(update={"batch_size": settings.batch_size})
    with lock_run(out), writing(out):
        return _run(bench, load, record, out, settings)


def _run(
    bench: Bench, load: "Callable[[], Answerer[Any]]", record: RunRecord, out: Path, settings: Settings
) -> Run:
    check_resumable(out, record, settings.force)
    planned = _planned(bench, record, settings)
    places = {place for batch in planned for group in batch for place, _ in group.asks}
    done = set() if settings.force else _done(out, record, bench)
    todo = [
        batch
        for batch in planned
        if any((bench.items[p].id, r) not in done for g in batch for p, r in g.asks)
    ]
    shown = {place for batch in todo for group in batch for place, _ in group.asks}
    digests = check_images(_first_use(bench, shown)) | hash_images(_first_use(bench, places - shown))
    hashes = {
        bench.items[p].id: [digests[path] for path in bench.image_paths(bench.items[p])] for p in places
    }
    if not settings.force:
        _check_same_images(out, hashes)
    with closing(load()) if todo else nullcontext() as scorer:
        if scorer:
            _check_options(scorer, bench, shown)
            if record.mode in LIKELIHOODS and not done:
                for warning in image_sensitivity(scorer, bench, QUICK).warnings:
                    _logger.warning(warning)
        if settings.force or not out.exists():
            example = scorer.prompt(bench.items[0]) if scorer else ""
            with new_folder(out, settings.force) as partial:
                text = record.model_copy(update={"example": example}).model_dump_json(indent=1)
                write_text(partial / RUN_FILE, text + "\n")
        answers = out / ANSWERS_FILE
        answers.touch()
        order = {item.id: place for place, item in enumerate(bench.items)}
        drop_unfinished_line(answers)
        sort_answers(answers, order)
        if scorer:
            wanted = {(bench.items[p].id, r) for batch in planned for group in batch for p, r in group.asks}
            kept = done & wanted
            again = "the same command" + (" without `force=True`" if settings.force else "")
            if kept:
                _logger.info(f"{len(kept):,} of {len(wanted):,} already answered")
            with saying_what_is_kept(
                lambda: f"{len(kept):,} of {len(wanted):,} answers are kept in {out}; {again} continues"
            ):
                _answer_rest(bench, scorer, todo, answers, kept, hashes, record)
    sort_answers(answers, order)
    return finish(out, record)


def _answer_rest(
    bench: Bench, scorer: "Answerer[Any]", todo: Sequence[Sequence[Group]], answers: Path, kept: set[Key],
    hashes: dict[str, list[str]], record: RunRecord,
) -> None:  # fmt: skip
    """Append the remaining answers batch by batch; ``kept`` holds the keys of those in the file, and grows with it."""
    what = "Answering questions" + (f" in {record.rotations} rotations" if record.rotations > 1 else "")
    with counting(what, sum(len(group.asks) for batch in todo for group in batch)) as advance:
        for batch, scores in scored(bench, scorer, todo):
            rows = list(_rows(bench, batch, scores, hashes, record.fingerprint))
            append_answers(answers, [row for row in rows if row.key not in kept])
            kept.update(row.key for row in rows)
            advance(len(rows))


def finish(out: Path, record: RunRecord) -> Run:
    """Read the answers back and write the summary; a shard without questions has none."""
    run = Run(out, record, list(read_answers(out / ANSWERS_FILE, record)))
    if run.answers:
        figures = as_json(compare({Path(record.model).name: run}))
        write_text(out / SUMMARY_FILE, json.dumps(figures, indent=1) + "\n", force=True)
    return run


def planned_rows(bench: Bench, record: RunRecord, settings: Settings, shards: int) -> list[int]:
    """Return the number of rows of each shard."""
    planned = batches(groups(bench.items, record.rotations), settings.batch_size)
    return [
        sum(len(group.asks) for batch in Shard(i, shards).of(planned) for group in batch)
        for i in range(shards)
    ]


def answered(folder: Path) -> int:
    """Return the number of complete rows in a run folder, 0 if there are none yet."""
    path = folder / ANSWERS_FILE
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _planned(bench: Bench, record: RunRecord, settings: Settings) -> list[list[Group]]:
    """Return the batches of this run, truncated at the limit."""
    whole = batches(groups(bench.items, record.rotations), settings.batch_size)
    if settings.shard.index >= len(whole):
        _logger.info(
            f"shard {settings.shard.name} has nothing to do: the bench has {len(whole)} batches of up to "
            f"{settings.batch_size} rows; a smaller `batch_size`, the same for all shards, gives more batches"
        )
    planned = settings.shard.of(whole)
    if settings.limit is None:
        return planned
    limited = []
    for batch in planned:
        cut = [Group(tuple(ask for ask in group.asks if ask[0] < settings.limit)) for group in batch]
        if kept := [group for group in cut if group.asks]:
            limited.append(kept)
    return limited


def _done(out: Path, record: RunRecord, bench: Bench) -> set[Key]:
    items = {item.id: item for item in bench.items}
    done = set()
    for answer in read_answers(out / ANSWERS_FILE, record):
        if answer.id not in items or not answer.answers_item(items[answer.id]):
            raise MismatchError(
                f"{out / ANSWERS_FILE} answers '{answer.id}' (true: {answer.gold}), which is not in {bench.path} or "
                "differs there: start the run over with `force=True`"
            )
        done.add(answer.key)
    return done


def _check_same_images(out: Path, hashes: dict[str, list[str]]) -> None:
    for answer in read_answers(out / ANSWERS_FILE):
        if hashes.get(answer.id, answer.images_sha256) != answer.images_sha256:
            raise MismatchError(
                f"run {out}: an image of question '{answer.id}' has changed since it was answered; "
                "start over with `force=True`"
            )


def _check_options(scorer: "Answerer[Any]", bench: Bench, shown: set[int]) -> None:
    try:
        scorer.check_options([bench.items[place] for place in sorted(shown)])
    except UserError as error:
        raise BadDataError(f"bench {bench.path}: {error}") from None


def _first_use(bench: Bench, places: set[int]) -> dict[Path, str]:
    """Return image path -> id of the first question that uses it."""
    items = [bench.items[place] for place in sorted(places, reverse=True)]
    return {path: item.id for item in items for path in bench.image_paths(item)}


def scored(
    bench: Bench, scorer: "Answerer[Any]", todo: Sequence[Sequence[Group]]
) -> Iterator[tuple[Sequence[Group], list[list[Score]]]]:
    """Yield scores batch by batch; the next batches are prepared in parallel."""

    def prepare(batch: Sequence[Group]) -> list[Any]:
        return [
            scorer.prepare(asks_of(group, bench.items), _opened(bench, bench.items[group.first]))
            for group in batch
        ]

    with ThreadPoolExecutor(1, initializer=_single_threaded) as worker:
        waiting: list[tuple[Sequence[Group], Future[list[Any]]]] = []
        coming = iter(todo)
        try:
            while True:
                while len(waiting) <= scorer.ahead and (batch := next(coming, None)) is not None:
                    waiting.append((batch, worker.submit(prepare, batch)))
                if not waiting:
                    return
                batch, prepared = waiting.pop(0)
                yield batch, scorer.answer(prepared.result())
        finally:
            worker.shutdown(wait=False, cancel_futures=True)


def _single_threaded() -> None:
    """Disable OpenMP threads in this thread: next to a second thread team, the model is a quarter slower."""
    if torch := sys.modules.get("torch"):
        torch.get_num_threads()  # the first call in a thread sets its number of threads, which would undo the limit
    threadpool_limits(1, user_api="openmp")


def _opened(bench: Bench, item: MCQItem) -> list["Image"]:
    try:
        return [open_image(path) for path in bench.image_paths(item)]
    except UserError as error:
        raise BadDataError(f"question '{item.id}': {error}") from None


def _cluster(bench: Bench, item: MCQItem, image: str) -> str:
    """Return a row's name of its patient or, if unknown, its image: not an id or path, which may contain a name."""
    patient = bench.patients[item.id]
    return f"{item.source}/{patient}" if patient else image[:16]


def _rows(
    bench: Bench, batch: Sequence[Group], scores: Sequence[Sequence[Score]], hashes: dict[str, list[str]],
    fingerprint: str,
) -> Iterator[Answer]:  # fmt: skip
    for group, of_group in zip(batch, scores, strict=True):
        for ask, score in zip(asks_of(group, bench.items), of_group, strict=True):
            if not all(map(isfinite, score.probabilities)):
                raise TrainingError(
                    f"question '{ask.item.id}': the model's probabilities are not numbers (NaN): its weights are "
                    "damaged or overflow; try `precision=float32`"
                )
            yield Answer(
                id=ask.item.id,
                rotation=ask.rotation,
                category=ask.item.category,
                cluster=_cluster(bench, ask.item, hashes[ask.item.id][0]),
                images_sha256=hashes[ask.item.id],
                gold=ask.item.letter,
                chosen=chosen_letter(score),
                probabilities=rounded(score.probabilities),
                shown=ask.letters,
                letter_mass=None if score.letter_mass is None else round(score.letter_mass, 6),
                log_likelihoods=None if score.log_likelihoods is None else rounded(score.log_likelihoods, 4),
                tokens=score.tokens,
                reply=score.reply,
                run=fingerprint,
            )
