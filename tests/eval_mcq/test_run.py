import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForImageTextToText

from eval_mcq.backends.fingerprint import model_fingerprint
from eval_mcq.items.schema import MCQItem, load_bench
from eval_mcq.records.batching import Shard, batches, groups
from eval_mcq.records.run_record import load_run
from eval_mcq.runs import run as run_module
from eval_mcq.runs.merge import merge
from eval_mcq.runs.run import Settings, describe_run, run_bench
from eval_mcq.scoring.prompt import shown_letters
from mgll_encoder.common.errors import (
    BadDataError,
    MismatchError,
    NotFoundError,
    OutputTakenError,
    TrainingError,
)
from tests.builders import picture
from tests.eval_mcq.helpers import identity, question, scorer, small_bench

WHOLE = Shard()


@pytest.fixture
def bench(tmp_path):
    return load_bench(small_bench(tmp_path / "data"))


@pytest.fixture(scope="module")
def model_scorer(tiny_llava):
    return scorer(tiny_llava)


@pytest.fixture
def asked(model_scorer, monkeypatch) -> list[int]:
    """Number of rows per batch that the model scored."""
    counts, answer = [], model_scorer.answer
    monkeypatch.setattr(
        model_scorer, "answer", lambda batch: counts.append(sum(len(p.rows) for p in batch)) or answer(batch)
    )
    return counts


@pytest.fixture
def put(bench, tiny_llava, model_scorer, tmp_path):
    """Run the benchmark on the tiny model; ``put.loads`` counts how often it was loaded."""

    def load():
        run.loads += 1
        return model_scorer

    def run(
        name="run", bench=bench, fingerprint="f" * 64, dtype="float32", rotations=1, shard=WHOLE, **settings
    ):
        record = describe_run(
            identity(tiny_llava, fingerprint, dtype), bench, rotations=rotations, shard=shard
        )
        settings["shard"] = shard
        return run_bench(bench, load, record, tmp_path / name, Settings(**settings))

    run.loads = 0
    return run


def rows(folder) -> list[str]:
    return sorted((folder / "answers.jsonl").read_text().splitlines())


def changed(line: str, **fields) -> str:
    """A row of the answers file with other values."""
    return json.dumps({**json.loads(line), **fields}) + "\n"


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_while_writing(run, batches: int) -> None:
    """Run in a separate process that is killed by SIGKILL halfway through writing a batch."""
    if child := os.fork():
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        return
    append = run_module.append_answers
    left = [batches]

    def dying(path, answers):
        if left[0] == 0:
            with path.open("a") as stream:
                stream.write("".join(answer.line() for answer in answers)[:-30])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        append(path, answers)

    run_module.append_answers = dying
    try:
        run()
    finally:
        os._exit(1)


def test_a_run_answers_every_question_and_leaves_its_figures(put, bench, tmp_path):
    run = put(batch_size=3)
    assert run.complete
    assert [answer.id for answer in run.answers] == [item.id for item in bench.items]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    right = sum(answer.right for answer in run.answers)
    assert sum(cell["right"] for cell in summary["arms"][0]["cells"].values()) == right
    assert summary["answered"] == 10
    assert load_run(tmp_path / "run").answers == run.answers


def test_questions_are_prepared_without_taking_the_cores_of_the_model(put, model_scorer, monkeypatch):
    aside, answering = set(), set()
    prepare, answer = model_scorer.prepare, model_scorer.answer

    def preparing(*given):
        if threading.current_thread() is not threading.main_thread():
            aside.add(torch.get_num_threads())
        return prepare(*given)

    monkeypatch.setattr(model_scorer, "prepare", preparing)
    monkeypatch.setattr(
        model_scorer, "answer", lambda batch: answering.add(torch.get_num_threads()) or answer(batch)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        put(batch_size=3)
    finally:
        torch.set_num_threads(before)
    assert (aside, answering) == ({1}, {2})


def test_a_killed_run_continues_and_ends_with_the_same_answers(put, tmp_path):
    put("whole", batch_size=2)
    partial = tmp_path / "killed"
    put("killed", batch_size=2, limit=4)
    with (partial / "answers.jsonl").open("a") as stream:
        stream.write('{"id":"q4","categ')  # the process died while writing
    assert len(load_run(partial).answers) == 4
    assert put("killed", batch_size=2).complete
    assert rows(partial) == rows(tmp_path / "whole")


def test_after_sigkill_at_most_one_batch_is_repeated_and_the_files_are_the_same_bytes(put, tmp_path, asked):
    settings = {"rotations": 3, "batch_size": 6}
    put("whole", **settings)
    killed_while_writing(lambda: put("killed", **settings), batches=3)
    left = (tmp_path / "killed" / "answers.jsonl").read_bytes()
    assert not left.endswith(b"\n")
    asked.clear()
    assert put("killed", **settings).complete
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    repeated = sum(asked)
    remaining = len(rows(tmp_path / "whole")) - left.count(b"\n")
    assert remaining <= repeated <= remaining + 6


def test_a_row_that_was_written_twice_is_dropped(put, tmp_path):
    put("whole", batch_size=2)
    put("twice", batch_size=2, limit=6)
    path = tmp_path / "twice" / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[2], lines[0]]))
    assert put("twice", batch_size=2).complete
    assert files(tmp_path / "twice") == files(tmp_path / "whole")


@pytest.fixture
def writing_process(put, model_scorer, tmp_path):
    """Start the run "run" in a separate process that continues when ``tmp_path/go`` exists; yield its exit code."""
    child = os.fork()
    if child == 0:
        code, answer = 1, model_scorer.answer

        def answer_later(batch):
            if (tmp_path / "run").exists():  # not for the look before it
                (tmp_path / "begun").touch()
                while not (tmp_path / "go").exists():
                    time.sleep(0.01)
            return answer(batch)

        model_scorer.answer = answer_later
        try:
            code = 0 if put(batch_size=2).complete else 1
        finally:
            os._exit(code)

    def end() -> int:
        (tmp_path / "go").touch()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for _ in range(6000):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.01)
    yield end
    if not (tmp_path / "go").exists():
        end()


def test_a_run_that_another_process_writes_is_left_alone(
    put, bench, tiny_llava, tmp_path, writing_process, eval_mcq
):
    for name in ("s0", "s1"):
        put(name, batch_size=2, shard=Shard(int(name[1]), 2))
    run = tmp_path / "run"
    told = rf"another process is writing run {run} .it holds the lock {tmp_path}/\.run\.run\.lock"
    for force in (False, True):
        with pytest.raises(OutputTakenError, match=told):
            put(batch_size=2, force=force)
        with pytest.raises(OutputTakenError, match=told):
            merge([tmp_path / "s0", tmp_path / "s1"], run, force=True)
    call = ("run", "--model", tiny_llava, "--bench", bench.path, "--out", run, "--device", "cpu", "--force")
    assert "another process is writing run" in eval_mcq.refuses(*call)
    assert "another process is writing run" in eval_mcq.refuses(
        "merge", tmp_path / "s0", tmp_path / "s1", "--out", run, "--force"
    )
    assert writing_process() == 0
    put("whole", batch_size=2)
    assert files(run) == files(tmp_path / "whole")
    assert put(batch_size=2).complete
    assert not list(tmp_path.glob(".*"))


def test_rotations_are_put_together_and_stored_in_the_original_order(put, bench):
    run = put(rotations=3, batch_size=100)
    assert [len(answer.rows) for answer in run.answers] == [len(item.options) for item in bench.items]
    for answer, item in zip(run.answers, bench.items, strict=True):
        assert [row.shown for row in answer.rows] == [
            shown_letters(len(item.options), r.rotation) for r in answer.rows
        ]
        mean = [
            sum(p) / len(answer.rows) for p in zip(*(row.probabilities for row in answer.rows), strict=True)
        ]
        assert answer.probabilities == pytest.approx(mean)
        assert answer.chosen == "ABC"[mean.index(max(mean))]
        assert answer.all_right == all(row.chosen == answer.gold for row in answer.rows)
    assert 0 <= run.all_right_accuracy <= run.rotation_accuracy <= 1


def test_shards_merge_to_the_bytes_of_the_whole(put, tmp_path):
    settings = {"rotations": 2, "batch_size": 4}
    put("whole", **settings)
    shards = []
    for i in range(3):
        put(f"s{i}", shard=Shard(i, 3), **settings)
        shards.append(tmp_path / f"s{i}")
    merge(shards[::-1], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


@pytest.mark.parametrize(("batch_size", "expected"), [(1, (1, 1, 0)), (32, (2, 0, 0))])
def test_more_shards_than_batches_leave_some_with_nothing_to_do(put, tmp_path, caplog, batch_size, expected):
    few = load_bench(small_bench(tmp_path / "few", n=2))
    put("whole", bench=few, batch_size=batch_size)
    for i in range(3):
        run = put(f"s{i}", bench=few, shard=Shard(i, 3), batch_size=batch_size)
        assert len(run.rows) == expected[i]
    assert "shard 2/3 has nothing to do" in "\n".join(caplog.messages)
    merge([tmp_path / f"s{i}" for i in range(3)], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("images", "per_image", "rotations", "expected"),
    [
        (60, 1, 1, [32, 28]),
        (300, 1, 1, [32] * 9 + [12]),
        (581, 1, 1, [32] * 18 + [5]),
        (2048, 1, 1, [32] * 64),
        (60, 1, 4, [32] * 7 + [16]),
        (20, 10, 1, [30] * 6 + [20]),  # whole images
        (3, 10, 4, [40, 40, 40]),  # an image with more rows than a batch is one by itself
        (1, 300, 1, [256, 44]),
    ],
)
def test_batches_are_full_however_few_images_there_are(images, per_image, rotations, expected):
    items = [
        MCQItem(**question(f"q{i}", f"{i // per_image}.png", options=["a", "b", "c", "d"]))
        for i in range(images * per_image)
    ]
    made = batches(groups(items, rotations), 32)
    assert [sum(len(group.asks) for group in batch) for batch in made] == expected
    for count in (2, 3, 7):
        shares = [Shard(i, count).of(made) for i in range(count)]
        assert [batch for i in range(len(made)) for batch in [shares[i % count][i // count]]] == made


def test_the_model_is_asked_in_full_batches_and_shards_in_the_same_ones(put, tmp_path, asked):
    look = [8, 8, 8, 1]
    put("whole", batch_size=4)
    assert asked == [*look, 4, 4, 2]
    asked.clear()
    for i in range(2):
        put(f"s{i}", batch_size=4, shard=Shard(i, 2))
    assert asked == [*look, 4, 2, *look, 4]
    merge([tmp_path / "s0", tmp_path / "s1"], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


def test_shards_of_another_batch_size_are_not_continued_and_not_merged(put, tmp_path):
    put("s0", batch_size=4, shard=Shard(0, 2))
    with pytest.raises(
        MismatchError, match=r"different `batch_size`, which determines the shards .4, now 2."
    ):
        put("s0", batch_size=2, shard=Shard(0, 2))
    put("s1", batch_size=2, shard=Shard(1, 2))
    with pytest.raises(BadDataError, match=r"s1 was made with `batch_size=2`, but .*s0 with 4"):
        merge([tmp_path / "s0", tmp_path / "s1"], tmp_path / "merged")


def test_merge_refuses_what_is_missing_twice_or_foreign_and_writes_nothing(put, tmp_path, bench):
    settings = {"rotations": 2, "batch_size": 4}
    for i in range(3):
        put(f"s{i}", shard=Shard(i, 3), **settings)
    put("whole", **settings)
    put("other", fingerprint="0" * 64, shard=Shard(2, 3), **settings)
    s0, s1, s2, other, whole = (tmp_path / name for name in ("s0", "s1", "s2", "other", "whole"))
    out = tmp_path / "merged"

    def refused(*shards, said):
        with pytest.raises(BadDataError, match=said):
            merge(shards, out)
        assert not out.exists()

    refused(s0, s1, said="shard 2/3 is missing")
    refused(s0, s1, s1, s2, said="are both shard 1/3")
    refused(s0, s1, other, said="other and .*s0 are of different runs: they differ in model")
    refused(s0, s1, whole, said="is not a shard")
    answers = s2 / "answers.jsonl"
    kept = answers.read_text()
    lines = kept.splitlines(keepends=True)
    gone = json.loads(lines[1])
    answers.write_text("".join(lines[:1] + lines[2:]))
    refused(
        s0, s1, s2, said=f"no answer to question '{gone['id']}' .rotation {gone['rotation']}. in any of .*s2"
    )
    answers.write_text(kept + (s0 / "answers.jsonl").read_text().splitlines()[0] + "\n")
    refused(s0, s1, s2, said=r"s2.answers.jsonl answers question 'q\d+' .rotation 0., and so does .*s0")
    answers.write_text(kept + changed(lines[0], letter_mass=0.5))
    refused(s0, s1, s2, said="answers question 'q.*' a second time")
    answers.write_text(kept.replace(gone["run"], "f" * 16, 1))
    refused(s0, s1, s2, said=r"s2.answers.jsonl line 1 .id 'q\d+'. is an answer of another run")
    answers.write_text(kept.replace(f'"id":"{gone["id"]}"', '"id":"stranger"'))
    refused(s0, s1, s2, said="'stranger' .* is not in the bench")
    answers.write_text(kept)
    bench.path.write_text(bench.path.read_text() + "\n")
    refused(s0, s1, s2, said="bench .* has changed")


def test_a_run_of_the_first_format_is_refused_in_one_line(put, tmp_path):
    put(limit=2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["format"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadDataError, match="has format 'eval-mcq-run/1', expected 'eval-mcq-run/2'"):
        put()


def test_a_model_that_does_not_see_is_warned_about(tiny_llava, bench, tmp_path, caplog):
    ready = scorer(tiny_llava)
    projector = ready.model.model.multi_modal_projector
    for weight in projector.parameters():
        weight.data.zero_()
    run_bench(bench, lambda: ready, describe_run(identity(tiny_llava), bench), tmp_path / "run")
    assert "the answers do not depend on the image" in "\n".join(caplog.messages)


def test_a_model_that_computes_no_numbers_stops_the_run_by_name(tiny_llava, bench, tmp_path):
    broken = scorer(tiny_llava)
    broken.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(
        TrainingError, match=r"question 'q\d': the model's probabilities are not numbers .NaN."
    ):
        run_bench(bench, lambda: broken, describe_run(identity(tiny_llava), bench), tmp_path / "run")


def test_a_finished_run_does_not_load_the_model_again(put):
    first = put()
    assert put.loads == 1
    assert put().answers == first.answers
    assert put.loads == 1


def test_answers_of_another_model_bench_or_dtype_are_never_continued(put, tmp_path):
    put(limit=2)
    other = load_bench(small_bench(tmp_path / "other", n=4))
    for change, named in (
        ({"fingerprint": "0" * 64}, "a different model"),
        ({"bench": other}, "a different bench"),
        ({"dtype": "bfloat16"}, "a different dtype"),
    ):
        with pytest.raises(MismatchError, match=named):
            put(**change)
    assert len(rows(tmp_path / "run")) == 2
    assert put(fingerprint="0" * 64, force=True).complete


def test_an_image_that_changed_under_its_answer_is_noticed(put, bench, tmp_path):
    put(limit=2)
    picture(bench.path.parent, "1.png", (1, 2, 3))
    with pytest.raises(MismatchError, match="image of question 'q1' has changed"):
        put()


def test_a_folder_that_is_no_run_is_not_written_into(put, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(OutputTakenError, match="exists and is not a run"):
        put()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_bad_image_stops_the_run_before_the_model_is_loaded_and_anything_is_written(
    put, bench, tmp_path, damage
):
    image = bench.image_paths(bench.items[7])[0]
    whole = image.read_bytes()
    image.unlink()
    if damage == "truncated":
        image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadDataError, match=r"question 'q7': image .*7\.png"):
        put()
    assert put.loads == 0
    assert not (tmp_path / "run").exists()


def test_a_letter_that_the_model_cannot_write_stops_the_run_before_anything_is_written(
    tiny_llava, bench, tmp_path
):
    def load():
        ready = scorer(tiny_llava)
        ready.processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("C", "cc")
        return ready

    with pytest.raises(BadDataError, match="option letter 'C'"):
        run_bench(bench, load, describe_run(identity(tiny_llava), bench), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_answers_file_is_named_by_line(put, tmp_path):
    put(limit=3)
    path = tmp_path / "run" / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(BadDataError, match=r"answers\.jsonl line 2"):
        put()
    path.write_text("\n".join([lines[0], lines[2]]) + "\n" + changed(lines[0], letter_mass=0.5))
    with pytest.raises(BadDataError, match=r"line 3 answers question 'q0' a second time .* differently"):
        put()


def test_the_fingerprint_follows_the_weights_and_not_the_readme(tiny_llava, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llava, copy)
    before = model_fingerprint(tiny_llava)
    (copy / "README.md").write_text("other words")
    assert model_fingerprint(copy) == before
    model = AutoModelForImageTextToText.from_pretrained(copy)
    model.model.multi_modal_projector.linear_1.bias.data[0] += 1e-3
    model.save_pretrained(copy)
    assert model_fingerprint(copy) != before
    with pytest.raises(NotFoundError, match=r"has no config\.json"):
        model_fingerprint(tmp_path)


@pytest.mark.slow
def test_accelerate_launch_gives_each_process_a_part_and_one_run(tiny_llava, bench, tmp_path):
    call = [
        "run", "--model", tiny_llava, "--bench", bench.path, "--rotations", 2, "--out", tmp_path / "launched",
    ]  # fmt: skip
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "eval_mcq.cli.main"]
    subprocess.run([sys.executable, "-m", *map(str, [*launch, *call])], check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-m", "eval_mcq.cli.main", *map(str, call[:-1]), str(tmp_path / "alone")],
        check=True, capture_output=True,
    )  # fmt: skip
    assert files(tmp_path / "launched") == files(tmp_path / "alone")
    assert not (tmp_path / "launched.shards").exists()
