"""Whoever answers, a run resumes and merges only its own answers, and older records keep their meaning."""

import json

import pytest

from eval_mcq.backends.base import Identity
from eval_mcq.items.schema import load_bench
from eval_mcq.records.backend_record import BackendRecord
from eval_mcq.records.batching import Shard
from eval_mcq.records.run_record import RunRecord, load_run
from eval_mcq.runs.merge import merge
from eval_mcq.runs.run import Settings, describe_run, run_bench
from eval_mcq.scoring.answerer import Answerer
from eval_mcq.scoring.modes import Score
from mgll_encoder.common.errors import BadDataError, MismatchError
from tests.eval_mcq.helpers import identity, small_bench

BEFORE_BACKENDS = (
    (
        '{"format":"eval-mcq-run/2","model":"m","model_sha256":"MMM","bench":"bench.jsonl","bench_name":"bench",'
        '"bench_sha256":"BBB","categories":["DR"],"questions":1,"mode":"letters","rotations":1,"prompt":"letters-1",'
        '"dtype":"float32","code":"scoring-1, pictures-2, torch 2.14.1, transformers 5.23.0","shard":null,'
        '"batch_size":null,"example":"","versions":{},"leak":null,"left_out":{}}'
    )
    .replace("MMM", "m" * 64)
    .replace("BBB", "b" * 64)
)
"""A record as it was written before backends had a name."""


class Longest(Answerer[list]):
    """Takes the longest option for the right one: it needs no model, and its answers are known."""

    def prompt(self, item, rotation=0):
        return item.question

    def prepare(self, asks, images):
        return asks

    def answer(self, batch):
        return [
            [Score([len(option) / 1000 for option in ask.item.options]) for ask in asks] for asks in batch
        ]


def record_of(bench, version="1", shard=None, **sent) -> RunRecord:
    backend = BackendRecord(name="longest", version=version, sent=sent)
    return describe_run(Identity("longest", "", "", "", {}, backend), bench, rotations=2, shard=shard)


@pytest.fixture
def bench(tmp_path):
    return load_bench(small_bench(tmp_path))


def test_a_record_from_before_keeps_its_fingerprint():
    # computed with the commit before the field existed (cafdff8)
    assert RunRecord.model_validate_json(BEFORE_BACKENDS).fingerprint == "a7b529886a26087c"


def test_an_answerer_that_is_no_model_runs_resumes_and_merges_like_one(bench, tmp_path):
    settings = Settings(batch_size=4)
    whole = run_bench(bench, Longest, record_of(bench), tmp_path / "whole", settings)
    assert all(row.chosen == "ABC"[[len(o) for o in item.options].index(max(map(len, item.options)))]
               for item in bench.items for row in whole.rows if row.id == item.id)  # fmt: skip
    run_bench(bench, Longest, record_of(bench), tmp_path / "cut", Settings(batch_size=4, limit=3))
    resumed = run_bench(bench, Longest, record_of(bench), tmp_path / "cut", settings)
    assert resumed.rows == whole.rows
    shards = []
    for i in range(2):
        shard = Shard(i, 2)
        shards.append(tmp_path / f"s{i}")
        run_bench(
            bench, Longest, record_of(bench, shard=shard), shards[i], Settings(batch_size=4, shard=shard)
        )
    merged = merge(shards, tmp_path / "merged")
    assert (merged.folder / "answers.jsonl").read_bytes() == (whole.folder / "answers.jsonl").read_bytes()
    assert load_run(tmp_path / "merged").record.backend == record_of(bench).backend


@pytest.mark.parametrize(
    ("change", "named"),
    [({"version": "2"}, "longest 2"), ({"temperature": 0}, "temperature"), (None, "eval-mcq")],
)
def test_another_backend_never_continues_a_run(bench, tmp_path, change, named):
    run_bench(bench, Longest, record_of(bench), tmp_path / "run", Settings(limit=3))
    before = (tmp_path / "run" / "answers.jsonl").read_bytes()
    ours = identity(tmp_path, sha256="", dtype="")
    other = describe_run(ours, bench, rotations=2) if change is None else record_of(bench, **change)
    with pytest.raises(MismatchError, match=rf"different backend \(.*{named}"):
        run_bench(bench, Longest, other, tmp_path / "run")
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == before


def test_shards_of_two_backends_are_not_merged(bench, tmp_path):
    for i, version in enumerate("12"):
        shard = Shard(i, 2)
        run_bench(
            bench, Longest, record_of(bench, version, shard), tmp_path / f"s{i}",
            Settings(batch_size=4, shard=shard),
        )  # fmt: skip
    with pytest.raises(BadDataError, match="different runs: they differ in backend"):
        merge([tmp_path / "s0", tmp_path / "s1"], tmp_path / "merged")


def test_the_order_of_what_was_sent_does_not_matter(bench):
    one, other = record_of(bench, a=1, b=2), record_of(bench, b=2, a=1)
    assert one.fingerprint == other.fingerprint
    assert json.loads(one.model_dump_json())["backend"]["sent"] == {"a": 1, "b": 2}
