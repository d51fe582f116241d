"""Chat templates are other people's programs: they are rendered as transformers does, and within bounds."""

import json
import shutil
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.common import chat
from mgll_encoder.common.chat import TemplateError, render_chat, render_chats
from mgll_encoder.common.errors import NotFoundError
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.families import read_template
from tests.builders import refused
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters.retraining import color_rows, write_json

TEMPLATES = sorted(
    file.name
    for file in (files("mllm_adapters") / "families" / "templates").iterdir()
    if not file.name.startswith("internvl")  # they are filled in first
)
QUESTION: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "What is <seen>?\n“é” {{ x }}"}],
}
ANSWER: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": "Drusen."}]}

HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "multiplication": "{{ 'a' * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "filter": "{{ 'a'|center(10**10) }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "length": "{{ 'a' * 20000000 }}",
    "escape": "{{ ''.__class__.__mro__ }}",
}


@pytest.fixture
def processor(tiny_llava: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_llava)


@pytest.fixture(scope="module")
def hurried() -> chat._Worker:
    return chat._Worker(seconds=0.5)


@pytest.mark.parametrize("template", ["own", *TEMPLATES])
@pytest.mark.parametrize("turns", [[QUESTION], [QUESTION, ANSWER]])
def test_a_template_is_rendered_as_transformers_renders_it(
    processor: Any, template: str, turns: list[dict[str, Any]]
) -> None:
    if template != "own":
        processor.chat_template = read_template(template)
    for asking in (False, True):
        expected = processor.apply_chat_template(turns, add_generation_prompt=asking)
        assert render_chat(processor, turns, add_generation_prompt=asking) == expected


def test_of_several_templates_the_default_one_counts(processor: Any) -> None:
    processor.chat_template = {"tools": "{{ 'no' }}", "default": "{{ bos_token }}{{ messages|length }}"}
    assert render_chat(processor, [QUESTION, ANSWER]) == "<s>2"
    processor.chat_template = {"tools": "{{ 'no' }}"}
    with pytest.raises(NotFoundError, match="has no chat template"):
        render_chat(processor, [QUESTION])


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_without_end_is_ended(
    processor: Any, hurried: chat._Worker, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(chat, "_WORKER", hurried)
    own, processor.chat_template = processor.chat_template, HOSTILE[kind]
    began = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render_chat(processor, [QUESTION])
    assert time.monotonic() - began < 30
    assert "chat_template.jinja" in str(caught.value)
    processor.chat_template = own
    assert "What is <seen>" in render_chat(processor, [QUESTION]), "the next one is rendered"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("a\nb\n{% for %}", "line 3: "),
        ("a\n{{ messages[0].role.nothing.more }}\n", "line 2: "),
        (
            "{% if true %}\n\n{{ raise_exception('roles must alternate') }}{% endif %}",
            "line 3: roles must alternate",
        ),
        ("\n{{ 1 / 0 }}", "line 2: division by zero"),
        ("{% macro m() %}\n{{ missing.x }}\n{% endmacro %}\n\n{{ m() }}", "line 2: "),
    ],
)
def test_a_template_that_fails_is_told_with_its_line(processor: Any, template: str, complaint: str) -> None:
    processor.chat_template = template
    with pytest.raises(TemplateError) as caught:
        render_chat(processor, [QUESTION])
    assert f"cannot be rendered: {complaint}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_half_of_a_character_is_told(processor: Any) -> None:
    processor.chat_template = "{{ '\\ud800' }}"
    with pytest.raises(TemplateError, match=r"half of a character \(.ud800\)"):
        render_chat(processor, [QUESTION])


def test_threads_get_each_their_own(processor: Any) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        turn = {"role": "user", "content": f"number {number}"}
        found[number] = render_chat(processor, [turn])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"number {number}" in found[number] for number in range(8))


def test_commands_refuse_a_hostile_template_in_one_line(tiny_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    (folder / "chat_template.jinja").write_text("\n" + HOSTILE["range"])
    bench = small_bench(tmp_path / "bench", 2)
    message = refused(eval_mcq, "run", "--model", folder, "--bench", bench, "--out", tmp_path / "run")
    assert "chat template cannot be rendered: line 2: " in message
    data = write_json(tmp_path / "train.json", color_rows(tmp_path / "images", 2))
    rows = ("--data", data, "--images", tmp_path / "images", "--out", tmp_path / "out")
    message = refused(retrain_projector, "--model", folder, *rows, "--max-steps", 1)
    assert "chat template cannot be rendered: line 2: " in message
    assert not (tmp_path / "out").exists()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    refused(eval_mcq, "run", "--model", folder, "--bench", bench, "--out", tmp_path / "run")


def test_many_chats_are_rendered_in_few_requests_each_as_alone(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    ask = chat._WORKER.ask
    monkeypatch.setattr(chat._WORKER, "ask", lambda request: requests.append(request) or ask(request))
    chats = [([{"role": "user", "content": f"number {i}"}], bool(i % 2)) for i in range(130)]
    together = render_chats(processor, chats)
    assert len(requests) == 3
    assert together == [
        render_chat(processor, turns, add_generation_prompt=asking) for turns, asking in chats
    ]
    assert render_chats(processor, []) == []


def test_many_slow_chats_have_the_time_of_each(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor.chat_template = "{% for i in range(10000) %}{% for j in range(80) %}{% endfor %}{% endfor %}x"
    render_chat(processor, [QUESTION])  # the process has started
    began = time.monotonic()
    render_chat(processor, [QUESTION])
    monkeypatch.setattr(chat, "_PATIENCE", 8 * (time.monotonic() - began))
    assert render_chats(processor, [([QUESTION], False)] * 60) == ["x"] * 60


def test_one_chat_that_a_template_refuses_is_told_among_many(processor: Any) -> None:
    processor.chat_template = (
        "\n{% if messages[0].content == 'bad' %}{{ raise_exception('no such turn') }}{% endif %}"
    )
    chats = [([{"role": "user", "content": word}], False) for word in ("good", "bad", "good")]
    with pytest.raises(TemplateError, match="line 2: no such turn"):
        render_chats(processor, chats)
