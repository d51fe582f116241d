import json
import shutil

import pytest
from tokenizers import normalizers
from transformers import AutoModelForImageTextToText

from eval_mcq.records import load_run
from eval_mcq.run import describe_run, model_fingerprint, run_bench
from eval_mcq.schema import load_bench
from mgll_encoder.common.errors import UserError
from tests.builders import picture
from tests.eval_mcq.helpers import scorer, small_bench


@pytest.fixture
def bench(tmp_path):
    return load_bench(small_bench(tmp_path / "data"))


@pytest.fixture(scope="module")
def model_scorer(tiny_llava):
    return scorer(tiny_llava)


@pytest.fixture
def put(bench, tiny_llava, model_scorer, tmp_path):
    """Put the questions to the tiny model; ``put.loads`` counts how often it was loaded."""

    def load():
        run.loads += 1
        return model_scorer

    def run(name="run", bench=bench, fingerprint="f" * 64, dtype="float32", **settings):
        record = describe_run(tiny_llava, fingerprint, bench, dtype)
        return run_bench(bench, load, record, tmp_path / name, **settings)

    run.loads = 0
    return run


def rows(folder) -> list[str]:
    return sorted((folder / "answers.jsonl").read_text().splitlines())


def test_a_run_answers_every_question_and_leaves_its_figures(put, bench, tmp_path):
    run = put(batch_size=3)
    assert run.complete
    assert [answer.id for answer in run.answers] == [item.id for item in bench.items]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    right = sum(answer.right for answer in run.answers)
    assert sum(cell["right"] for cell in summary["arms"][0]["cells"].values()) == right
    assert summary["answered"] == 10
    assert load_run(tmp_path / "run").answers == run.answers


def test_a_killed_run_continues_and_ends_with_the_same_answers(put, tmp_path):
    put("whole", batch_size=2)
    partial = tmp_path / "killed"
    put("killed", batch_size=2, limit=4)
    with (partial / "answers.jsonl").open("a") as stream:
        stream.write('{"id":"q4","categ')  # the process died while writing
    assert len(load_run(partial).answers) == 4
    assert put("killed", batch_size=2).complete
    assert rows(partial) == rows(tmp_path / "whole")


def test_a_finished_run_does_not_load_the_model_again(put):
    first = put()
    assert put.loads == 1
    assert put().answers == first.answers
    assert put.loads == 1


def test_answers_of_another_model_bench_or_dtype_are_never_continued(put, tmp_path):
    put(limit=2)
    other = load_bench(small_bench(tmp_path / "other", n=4))
    for change, named in (
        ({"fingerprint": "0" * 64}, "another model"),
        ({"bench": other}, "another bench"),
        ({"dtype": "bfloat16"}, "another dtype"),
    ):
        with pytest.raises(UserError, match=named):
            put(**change)
    assert len(rows(tmp_path / "run")) == 2
    assert put(fingerprint="0" * 64, force=True).complete


def test_an_image_that_changed_under_its_answer_is_noticed(put, bench, tmp_path):
    put(limit=2)
    picture(bench.path.parent, "1.png", (1, 2, 3))
    with pytest.raises(UserError, match="image of question 'q1' has changed"):
        put()


def test_a_folder_that_is_no_run_is_not_written_into(put, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="exists and is not a run"):
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
    with pytest.raises(UserError, match=r"question 'q7': image .*7\.png"):
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

    with pytest.raises(UserError, match="option letter 'C'"):
        run_bench(bench, load, describe_run(tiny_llava, "f", bench, "float32"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_answers_file_is_named_by_line(put, tmp_path):
    put(limit=3)
    path = tmp_path / "run" / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"answers\.jsonl line 2"):
        put()
    path.write_text("\n".join([lines[0], lines[0], lines[2]]) + "\n")
    with pytest.raises(UserError, match="answers question 'q0' twice"):
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
    with pytest.raises(UserError, match=r"has no config\.json"):
        model_fingerprint(tmp_path)
