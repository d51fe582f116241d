"""Chat templates, rendered with limits: a template is a foreign program, and may not terminate."""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgll_encoder.common import chat_worker
from mgll_encoder.common.errors import NotFoundError, UserError

SECONDS = 5.0
"""CPU time limit of one rendering; a long conversation takes milliseconds."""

_START = 120.0
"""Seconds within which the rendering process must be ready."""

_PATIENCE = 60.0
"""Seconds within which it must render a chat; the kernel kills it sooner unless the machine is overloaded."""

_TOGETHER = 64
"""Number of chats in a request."""

_CHUNK = 1 << 16

PREFIX_TYPES = "token_type_ids"
"""A field of PaliGemma's processor: 0 in the prompt, which has bidirectional attention, 1 in the answer, which is
causal. So no part of a prompt can be computed before its end is known."""


Messages = Sequence[Mapping[str, Any]]
"""Turns of a conversation, as ``apply_chat_template`` takes them."""


class TemplateError(UserError):
    """A chat template cannot be rendered, or not for this conversation."""


def template_of(processor: Any) -> str | None:
    """Return a processor's chat template, the default one if it has several; None if it has none."""
    found = getattr(processor, "chat_template", None)
    if isinstance(found, Mapping):
        found = found.get("default")
    return found if isinstance(found, str) and found else None


def render_chat(processor: Any, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """Do what ``processor.apply_chat_template`` does, with limits of time, memory and length. Thread-safe.

    Args:
        processor: Has a chat template and a tokenizer.
        messages: Turns as in that method, pictures as placeholders.
        add_generation_prompt: Whether the text ends with the prefix of an answer.

    Raises:
        UserError: see `render_chats`.
    """
    (text,) = render_chats(processor, [(messages, add_generation_prompt)])
    return text


def render_chats(processor: Any, chats: Sequence[tuple[Messages, bool]]) -> list[str]:
    """Render many chats in few requests, each as `render_chat` does.

    Args:
        processor: Has a chat template and a tokenizer.
        chats: Turns, and whether the text ends with the prefix of an answer.

    Raises:
        TemplateError: the template is invalid, refuses the conversation, or does not terminate; the line is named if
            known.
        UserError: the processor has no chat template.
    """
    template = template_of(processor)
    if template is None:
        raise NotFoundError(
            "the model's processor has no chat template: add chat_template.jinja to its folder"
        )
    named = processor.tokenizer.special_tokens_map.items()
    special = {
        key: [str(t) for t in token] if isinstance(token, list) else str(token) for key, token in named
    }
    settings = {**special, "chat_template": template}
    return [
        text
        for first in range(0, len(chats), _TOGETHER)
        for text in _rendered({**settings, "chats": [*map(_written, chats[first : first + _TOGETHER])]})
    ]


def _written(chat: tuple[Messages, bool]) -> tuple[list[dict[str, Any]], bool]:
    turns, asking = chat
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns], asking


def _rendered(request: Mapping[str, Any]) -> list[str]:
    answer = _WORKER.ask(request)
    if "texts" in answer:
        return [_whole(text) for text in answer["texts"]]
    where = f"line {answer['line']}: " if answer.get("line") else ""
    raise TemplateError(
        f"the model's chat template cannot be rendered: {where}{answer['error']}: fix chat_template.jinja in its "
        "folder (in older folders: chat_template.json, processor_config.json or tokenizer_config.json)"
    )


def _whole(text: str) -> str:
    """Check a rendered text for lone surrogates, which a template's escapes may produce and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"the model's chat template writes half of a character (\\u{ord(text[error.start]):04x}): fix "
            "chat_template.jinja in its folder"
        ) from None
    return text


class _Worker:
    """The rendering process, started when it is first needed; a fork of this process starts its own."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                answer = _line(process, _PATIENCE * len(request["chats"]))
            except BrokenPipeError:
                answer = None
            if answer is not None:
                return answer
            self._end()
            return {"error": f"it does not finish within {self._seconds:.0f} s, or uses up all memory"}

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        script = str(Path(chat_worker.__file__))
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._owner = os.getpid()
        if _line(self._process, _START) is None:
            self._end()
            raise RuntimeError(f"{script} did not start")
        return self._process

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """Stop the process."""
        self._end()


def _line(process: "subprocess.Popen[bytes]", seconds: float) -> dict[str, Any] | None:
    """Read the next answer; None if it does not arrive in time, or the process has ended."""
    assert process.stdout is not None
    source, until, held = process.stdout.fileno(), time.monotonic() + seconds, bytearray()
    while not held.endswith(b"\n"):
        ready, _, _ = select.select([source], [], [], max(0.0, until - time.monotonic()))
        chunk = os.read(source, _CHUNK) if ready else b""
        if not chunk:
            return None
        held += chunk
    answer: dict[str, Any] = json.loads(held)
    return answer


_WORKER = _Worker()
atexit.register(_WORKER.close)
