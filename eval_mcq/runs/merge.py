"""Merging the shards of a run, with checks for missing, duplicate and foreign answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval_mcq.items.schema import Bench, MCQItem, load_bench
from eval_mcq.records.answer import Answer
from eval_mcq.records.answers_file import lock_run, sort_answers
from eval_mcq.records.run_record import (
    ANSWERS_FILE,
    RUN_FILE,
    Run,
    RunRecord,
    load_run,
    read_answers,
    read_run_record,
)
from eval_mcq.scoring.prompt import rotations_of
from mgll_encoder.common.errors import BadDataError, NotFoundError
from mgll_encoder.common.files import check_free, new_folder, write_text


def merge(shards: Sequence[Path], out: Path, bench: Path | None = None, force: bool = False) -> Run:
    """Merge shards into a run; its bytes are those of a run without shards.

    Args:
        shards: Run folders made with ``--shard``.
        out: Run folder to write.
        bench: The benchmark file, if it is not where the shards found it.
        force: Replace ``out``.

    Raises:
        UserError: ``out`` exists or is being written by another process, a shard belongs to another run, is given twice
            or is missing, the benchmark is a different one, or a row is missing, duplicate, or of another run; names
            question and file.
    """
    check_free(out, force)
    with lock_run(out):
        return merge_held(shards, out, bench, force)


def merge_held(shards: Sequence[Path], out: Path, bench: Path | None = None, force: bool = False) -> Run:
    """Run `merge` while already holding the lock of ``out``."""
    records = [read_run_record(folder) for folder in shards]
    first = records[0]
    _check_shards(shards, records)
    from eval_mcq.runs.run import finish  # imported late: statistics are slow to import

    questions = _bench(first, bench)
    with new_folder(out, force) as partial:
        _gather(shards, first, questions, partial / ANSWERS_FILE)
        whole = first.model_copy(update={"shard": None, "example": _example(records)})
        write_text(partial / RUN_FILE, whole.model_dump_json(indent=1) + "\n")
        sort_answers(partial / ANSWERS_FILE, {item.id: place for place, item in enumerate(questions.items)})
        finish(partial, whole)
    return load_run(out)


def _check_shards(folders: Sequence[Path], records: Sequence[RunRecord]) -> None:
    first = records[0]
    seen: dict[str, Path] = {}
    for folder, record in zip(folders, records, strict=True):
        if record.shard is None:
            raise BadDataError(f"{folder} is not a shard: it was made without `shard`")
        if differs := record.difference(first):
            raise BadDataError(
                f"shard {folder} and {folders[0]} are of different runs: they differ in {differs}"
            )
        if record.batch_size != first.batch_size:
            raise BadDataError(
                f"shard {folder} was made with `batch_size={record.batch_size}`, but {folders[0]} with "
                f"{first.batch_size}: their batches differ; run one of them again"
            )
        if record.shard in seen:
            raise BadDataError(
                f"{folder} and {seen[record.shard]} are both shard {record.shard}: give each once"
            )
        seen[record.shard] = folder
    count = str(first.shard).partition("/")[2]
    for folder, record in zip(folders, records, strict=True):
        if str(record.shard).partition("/")[2] != count:
            raise BadDataError(f"{folder} is shard {record.shard}, but {folders[0]} is shard {first.shard}")
    missing = [name for name in (f"{i}/{count}" for i in range(int(count))) if name not in seen]
    if missing:
        raise BadDataError(f"shard {missing[0]} is missing: run it, or also give its folder")


def _bench(record: RunRecord, given: Path | None) -> Bench:
    path = given or Path(record.bench)
    if given is None and not path.is_file():
        raise NotFoundError(f"bench {path} of these shards does not exist: give it with `bench`")
    bench = load_bench(path)
    if bench.digest != record.bench_sha256:
        raise BadDataError(
            f"bench {path} is not the one that these shards answered: it has changed; give the original with `bench`"
        )
    return bench


def _gather(shards: Sequence[Path], record: RunRecord, bench: Bench, out: Path) -> None:
    expected = {item.id: rotations_of(len(item.options), record.rotations) for item in bench.items}
    items = {item.id: item for item in bench.items}
    origin: dict[tuple[str, int], int] = {}
    with out.open("w", encoding="utf-8") as stream:
        for number, folder in enumerate(shards):
            path = folder / ANSWERS_FILE
            for answer in read_answers(path, record):
                _check_row(answer, path, items, record)
                if (other := origin.setdefault(answer.key, number)) != number:
                    raise BadDataError(
                        f"{path} answers question '{answer.id}' (rotation {answer.rotation}), and so does "
                        f"{shards[other] / ANSWERS_FILE}: these are not shards of one run"
                    )
                stream.write(answer.line())
    for item_id, rotations in expected.items():
        for rotation in range(rotations):
            if (item_id, rotation) not in origin:
                raise BadDataError(
                    f"no answer to question '{item_id}' (rotation {rotation}) in any of "
                    f"{', '.join(str(folder / ANSWERS_FILE) for folder in shards)}: finish the shards by re-running "
                    "them"
                )


def _check_row(answer: Answer, path: Path, items: Mapping[str, MCQItem], record: RunRecord) -> None:
    if answer.run != record.fingerprint:
        raise BadDataError(f"{path}: the answer to question '{answer.id}' is not marked as one of this run")
    if answer.id not in items:
        raise BadDataError(f"{path}: question '{answer.id}' (rotation {answer.rotation}) is not in the bench")
    if not answer.answers_item(items[answer.id]):
        raise BadDataError(
            f"{path}: question '{answer.id}' has a different category, true letter or number of options in the bench"
        )


def _example(records: Sequence[RunRecord]) -> str:
    return next((record.example for record in records if record.example), "")
