"""A model behind a server is a row like any other: same answers, resumable, and nothing that it should not tell."""

import json
import logging
import math
import time

import numpy as np
import pytest
from PIL import Image

from eval_mcq import run
from eval_mcq.backends.server import Endpoint
from eval_mcq.items.schema import LETTERS, load_bench
from eval_mcq.records.run_record import load_run
from eval_mcq.runs.merge import merge
from eval_mcq.scoring.prompt import order, render
from mgll_encoder.common.errors import (
    EndpointError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    UnknownNameError,
)
from mgll_encoder.common.images import open_image
from tests.eval_mcq import chat_server
from tests.eval_mcq.chat_server import KEY, NAME, letter_logits, serving
from tests.eval_mcq.helpers import small_bench

QUICK = 8 * 3 + 1
"""Requests of the check for image sensitivity: eight questions with three pictures, and the prior."""


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def bench(tmp_path):
    return small_bench(tmp_path)


@pytest.fixture
def ask(server, bench, tmp_path):
    """Run the benchmark on the server."""

    def run_on(out="run", endpoint=None, **settings):
        given = {"timeout": 60.0, **(endpoint or {})}
        return run(NAME, bench, tmp_path / out, endpoint=Endpoint(server.url, **given), **settings)

    return run_on


def expected(bench, rotation=0) -> dict[str, list[float]]:
    """What the server's model thinks of each question, computed here from the file on disk."""
    loaded = load_bench(bench)
    found = {}
    for item in loaded.items:
        pictures = [open_image(path) for path in loaded.image_paths(item)]
        logits = letter_logits(pictures, render(item, rotation))
        total = sum(map(math.exp, logits.values()))
        places = order(len(item.options), rotation)
        found[item.id] = [math.exp(logits[LETTERS[places.index(i)]]) / total for i in range(len(places))]
    return found


def test_letters_are_the_probabilities_that_the_server_gives(ask, server, bench):
    done = ask(rotations=2)
    assert done.record.mode == "letters"
    for row in done.rows:
        assert row.probabilities == pytest.approx(expected(bench, row.rotation)[row.id], abs=1e-6)
        assert row.letter_mass == pytest.approx(0.9, abs=1e-6)  # both spellings of each letter
    other = expected(bench, 1)  # negative control: the other order has other probabilities
    assert (
        max(
            abs(a - b)
            for row in done.rows
            if not row.rotation
            for a, b in zip(row.probabilities, other[row.id], strict=True)
        )
        > 0.05
    )
    assert load_run(done.folder).record.example.startswith("<image>\nWhat is seen?")


def test_the_server_gets_every_pixel_and_no_metadata(ask, server, tmp_path, bench):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe 1950-01-01"
    Image.fromarray(noise).save(tmp_path / "0.png", exif=exif)
    ask(limit=1)
    for sent in server.pictures:
        assert (sent.format, sent.info, dict(sent.getexif())) == ("PNG", {}, {})
    assert any(np.array_equal(np.asarray(sent), noise) for sent in server.pictures)
    server.bodies.clear()
    ask("small", {"longest_side": 16}, limit=1)
    assert {sent.size for sent in server.pictures} == {(16, 16), (16, 11)}


def test_without_log_probabilities_replies_are_parsed(ask, server, bench, caplog):
    server.logprobs = False
    done = ask()
    assert done.record.mode == "generate"
    assert "gives no log-probabilities" in caplog.text
    assert done.rows[0].reply.startswith("The answer is (")
    for row in done.rows:
        probabilities = expected(bench)[row.id]
        assert row.chosen == LETTERS[probabilities.index(max(probabilities))]
    with pytest.raises(InvalidArgumentError, match=r"gives no log-probabilities.*`mode=generate`"):
        ask("letters", mode="letters")


@pytest.mark.parametrize(
    ("prepare", "settings"),
    [
        ({}, {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}),
        ({"top": 5}, {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}),
        ({"refuses": {"max_tokens"}}, {"max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20}),
        ({"refuses": {"logprobs", "max_tokens"}}, {"max_completion_tokens": 32}),
    ],
)
def test_what_a_server_does_not_take_is_not_sent(ask, server, prepare, settings):
    for name, value in prepare.items():
        setattr(server, name, value)
    record = ask(limit=2).record
    assert record.backend.sent["settings"] == settings
    sent = server.bodies[-1][0]
    assert {name: sent[name] for name in sent if name not in ("model", "messages")} == settings


def test_requests_run_at_the_same_time_but_not_more_than_allowed(ask, server):
    server.seconds = 0.05
    ask(endpoint={"concurrency": 4}, rotations=3)
    assert 2 <= server.most <= 4


FAULTS = {
    "busy": chat_server.status(429, Retry_After="0"),
    "busy until a date": chat_server.status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "busy without a time": chat_server.status(429),
    "overloaded": chat_server.status(503),
    "broken": chat_server.status(500),
    "gone": chat_server.hang_up,
    "half": chat_server.half,
    "no JSON": chat_server.sends(b"<html>Bad gateway</html>"),
    "empty": chat_server.sends(b""),
    "a list": chat_server.sends([1]),
}


def test_a_request_is_repeated_after_every_passing_fault(ask, server, bench):
    clean = ask("clean", rotations=2)
    server.bodies.clear()
    server.faults = list(FAULTS.values())
    done = ask("faulty", {"retries": 12}, rotations=2)
    assert not server.faults, "every fault was met"
    assert done.rows == [row.model_copy(update={"run": done.record.fingerprint}) for row in clean.rows]
    assert len(server.bodies) == 1 + QUICK + len(done.rows) + len(FAULTS)


def test_a_request_that_is_not_answered_in_time_is_repeated(ask, server):
    server.faults = [chat_server.silence]
    assert len(ask(endpoint={"timeout": 3, "retries": 20}, limit=2).rows) == 2


def test_a_busy_server_is_left_alone_as_long_as_it_asks(ask, server, monkeypatch):
    server.faults = [chat_server.status(429, Retry_After="1")]
    start = time.monotonic()
    assert len(ask(endpoint={"retries": 1}, limit=2).rows) == 2
    assert time.monotonic() - start > 1
    server.faults = [chat_server.status(429, Retry_After="100000")]
    with pytest.raises(EndpointError, match=r"asks to wait for 100000 s.*run the same command again"):
        ask("later", limit=2)


def answer(**choice) -> chat_server.Fault:
    """Answers with this choice, as the model that is asked."""
    return chat_server.sends({"model": NAME, "choices": [choice]})


def first_token(**token) -> chat_server.Fault:
    """Answers with this as the first token and the only one listed."""
    return answer(logprobs={"content": [{**token, "top_logprobs": [token]}]})


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (chat_server.status(400), EndpointError, r"refuses the request \(400\): no luck"),
        (chat_server.status(404), EndpointError, r"refuses the request \(404\)"),
        (chat_server.quota, EndpointError, r"429.*exceeded your quota"),
        (chat_server.sends({"model": NAME}), EndpointError, "no 'choices'"),
        (answer(message={"content": "A"}), EndpointError, r"gives no log-prob.*`mode=generate`"),
        (chat_server.sends({"model": "other", "choices": [{}]}), MismatchError, r"as model 'other'.*changed"),
        (first_token(tok="A"), EndpointError, "no token and logprob"),
        (first_token(token="A", logprob=0.5), EndpointError, "log-probabilities that are none"),
    ],
)
def test_a_lasting_fault_stops_the_run_and_keeps_what_is_answered(
    ask, server, tmp_path, fault, kind, message
):
    ask(limit=4, batch_size=2)
    before = (tmp_path / "run" / "answers.jsonl").read_bytes()
    server.faults = [fault]
    with pytest.raises(kind, match=rf"question 'q\d': .*{message}"):
        ask(batch_size=2)
    assert (tmp_path / "run" / "answers.jsonl").read_bytes().startswith(before)
    assert ask(batch_size=2).complete


def test_an_empty_answer_is_unread(ask, server):
    ask(limit=1, batch_size=1)
    server.faults = [answer(message={"content": None}, finish_reason="content_filter")]
    row = ask(limit=2, batch_size=1).rows[1]
    assert (row.chosen, row.probabilities, row.letter_mass) == (None, [0.0] * len(row.probabilities), 0.0)


def test_a_fault_that_does_not_pass_is_given_up_and_continued_later(ask, server, bench):
    server.faults = [chat_server.status(503)] * 100
    with pytest.raises(
        EndpointError, match=r"fails 2 times in a row: it answers 503 \(no luck \(503\)\).*continue"
    ):
        ask(endpoint={"retries": 1})
    server.faults.clear()
    assert ask().complete


def test_a_resumed_run_asks_only_the_rest(ask, server, tmp_path):
    ask(limit=6, batch_size=2)
    server.bodies.clear()
    done = ask(batch_size=2)
    assert done.complete
    assert sum(server.asked.values()) == len(done.rows) - 6
    server.bodies.clear()
    assert ask(batch_size=2).complete
    assert not server.asked


def test_shards_are_merged_to_the_bytes_of_the_whole(ask, tmp_path):
    ask("whole", batch_size=2)
    for i in range(2):
        ask(f"s{i}", batch_size=2, shard=f"{i}/2")
    merge([tmp_path / "s0", tmp_path / "s1"], tmp_path / "merged")
    assert (tmp_path / "merged" / "answers.jsonl").read_bytes() == (
        tmp_path / "whole" / "answers.jsonl"
    ).read_bytes()


def test_another_model_settings_or_picture_size_is_another_run(ask, server):
    ask(limit=2)
    for change, settings in (({"longest_side": 20}, {}), ({}, {"mode": "generate"})):
        with pytest.raises(MismatchError, match="made with a different"):
            ask(endpoint=change, **settings)
    server.model = "org/served-2026-12"
    with pytest.raises(MismatchError, match=r"different backend \(.*2026-12"):
        ask()


def test_the_key_is_sent_and_nowhere_else(ask, server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server.key = KEY
    ask(limit=2)
    assert {headers["Authorization"] for _, headers in server.bodies} == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir())
    assert KEY not in written.decode() + caplog.text
    monkeypatch.setenv("OTHER_KEY", "sk-wrong")
    with pytest.raises(EndpointError, match=r"\(401\): check the key in OTHER_KEY") as refused:
        ask("wrong", {"key_variable": "OTHER_KEY"})
    assert "sk-wrong" not in str(refused.value)
    server.faults = [
        lambda handler: handler.send(400, {"error": f"bad {handler.headers['Authorization']}"}) is None
    ]
    with pytest.raises(EndpointError, match=r"bad Bearer \(key\)"):
        ask("echo")
    assert KEY not in caplog.text
    with pytest.raises(NotFoundError, match="variable UNSET"):
        ask("unset", {"key_variable": "UNSET"})
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match=r"\(401\): set OPENAI_API_KEY"):
        ask("none")


@pytest.mark.parametrize(
    ("url", "allow", "message"),
    [
        ("https://api.example.org/v1", False, "images and questions.*api.example.org.*`allow_upload=True`"),
        ("http://10.1.2.3:8000", False, "another machine"),
        ("http://localhost.example.org/v1", False, "another machine"),
        ("http://api.example.org/v1", True, "unencrypted"),
        ("http://me:secret@localhost/v1", False, "user, a password"),
        ("http://localhost/v1?key=secret", False, "user, a password or a query"),
        ("localhost:8000", False, "not the URL of a server"),
    ],
)
def test_no_picture_leaves_the_machine_unasked_and_no_key_unencrypted(
    bench, tmp_path, monkeypatch, url, allow, message
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(InvalidArgumentError, match=message) as refused:
        run("m", bench, tmp_path / "run", endpoint=Endpoint(url, allow_upload=allow))
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_proxy_of_the_environment_does_not_get_what_stays_here(ask, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert len(ask(limit=1).rows) == 1


def test_a_model_that_the_server_does_not_have_is_named(server, bench, tmp_path):
    with pytest.raises(UnknownNameError, match=rf"unknown model at .*'org/serve'.*did you mean '{NAME}'"):
        run("org/serve", bench, tmp_path / "run", endpoint=server.url)


def test_no_server_at_all_is_said_in_one_line(bench, tmp_path):
    with pytest.raises(
        EndpointError, match=r"endpoint http://127.0.0.1:9/v1 fails 1 times in a row: ConnectError"
    ):
        run("m", bench, tmp_path / "run", endpoint=Endpoint("http://127.0.0.1:9", retries=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "options"}, "no chat server gives"),
        ({"device": "cpu"}, "`device` has no effect"),
        ({"load_in_4bit": True}, "`load_in_4bit` has no effect"),
        ({"engine": "plain"}, "`engine` has no effect"),
    ],
)
def test_what_has_no_effect_on_a_server_is_refused(ask, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ask(**settings)


def test_the_command_says_what_it_did_and_names_its_options(eval_mcq, server, bench, tmp_path):
    assert (
        eval_mcq(
            "run", "--endpoint", server.url, "--model", NAME, "--bench", bench, "--out", tmp_path / "run"
        )
        == 0
    )
    assert "Average" in eval_mcq.out
    assert load_run(tmp_path / "run").record.model == NAME
    refused = eval_mcq.refuses("run", "--model", NAME, "--bench", bench, "--concurrency", 2)
    assert "--concurrency has an effect only with --endpoint" in refused
    away = eval_mcq.refuses("run", "--endpoint", "https://api.example.org", "--model", NAME, "--bench", bench)
    assert "--allow-upload" in away


def test_the_record_says_who_answered(ask, server):
    record = ask(limit=1).record
    told = json.loads(record.model_dump_json())["backend"]
    assert told["sent"]["server_says"] == {"id": NAME, "owned_by": "tests"}
    assert told["sent"]["images"] == "png, every pixel"
    assert told["told"]["url"] == server.url
    assert (record.model, record.model_sha256, record.dtype) == (NAME, "", "")
