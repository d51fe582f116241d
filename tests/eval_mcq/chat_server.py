"""A small chat-completions server on loopback that answers by the picture and the question, and fails when told to.

Real sockets, real HTTP: what a client sees of a server that is slow, busy, broken or half there.
"""

import base64
import io
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

KEY = "sk-test-5up3rs3cret"
NAME = "org/served"
INSTRUCTION = "Answer with"

Fault = Callable[["Handler"], bool]
"""Does what a broken server does instead of answering; returns whether it did."""


class ChatServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        bodies: Every request for an answer, with its headers.
        faults: Faults to show, one per request with an image, in this order.
        logprobs: Whether log-probabilities are given.
        top: Most tokens that may be asked for.
        key: The key that is demanded, if any.
        model: The name under which it answers.
        refuses: Fields that are refused, as newer models do.
        most: Largest number of requests that were open at a time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.faults: list[Fault] = []
        self.logprobs, self.top, self.key, self.model = True, 20, None, NAME
        self.refuses: set[str] = set()
        self.most = self.open = 0
        self.seconds = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures that arrived."""
        return [picture for body, _ in self.bodies for picture in _content(body)[0]]

    @property
    def asked(self) -> Counter:
        """How often each question with a picture arrived."""
        texts = (_content(body) for body, _ in self.bodies)
        return Counter(text for pictures, text in texts if pictures)


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._let_in():
            models = [{"id": NAME, "object": "model", "created": int(time.time()), "owned_by": "tests"}]
            self.send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append((body, dict(self.headers)))
            server.open += 1
            server.most = max(server.most, server.open)
            fault = server.faults.pop(0) if _content(body)[0] and server.faults else None
        try:
            time.sleep(server.seconds)
            if not self._let_in() or (fault and fault(self)):
                return
            if refused := server.refuses & set(body):
                self.send(
                    400,
                    {"error": {"message": f"Unsupported parameter: {min(refused)}", "code": "unsupported"}},
                )
            elif body.get("top_logprobs", 0) > server.top:
                self.send(400, {"error": {"message": f"top_logprobs must be at most {server.top}"}})
            else:
                self.send(200, self.answer(body))
        finally:
            with server.lock:
                server.open -= 1

    def _let_in(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self.send(401, {"error": {"message": f"Incorrect API key: {self.headers.get('Authorization')}"}})
        return False

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        pictures, text = _content(body)
        logits = letter_logits(pictures, text)
        best = max(logits, key=logits.get)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if self.server.logprobs and body.get("logprobs"):
            choice["message"] = {"role": "assistant", "content": best}
            choice["logprobs"] = {"content": [_listed(logits, body["top_logprobs"])]}
        else:
            choice["message"] = {"role": "assistant", "content": f"The answer is ({best})."}
        return {"id": "x", "object": "chat.completion", "model": self.server.model, "choices": [choice]}

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def letter_logits(pictures: list[Image.Image], text: str) -> dict[str, float]:
    """What this model thinks: a function of the picture's mean color, and of each option's text and letter."""
    options = [line.split(". ", 1) for line in text.splitlines() if line[1:3] == ". "] or [["A", ""]]
    mean = float(np.asarray(pictures[0], dtype=float).mean()) if pictures else 0.0
    return {letter: math.sin(mean + 7 * sum(map(ord, letter + option))) for letter, option in options}


def _listed(logits: dict[str, float], top: int) -> dict[str, Any]:
    """The likeliest tokens: letters with and without a space (a quarter and three quarters), and others."""
    share = 0.9 / sum(map(math.exp, logits.values()))
    found = {}
    for letter, logit in logits.items():
        for token, part in ((letter, 0.25), (f" {letter}", 0.75)):
            found[token] = math.log(share * part) + logit
    found |= {f"word{i}": math.log(0.1 / 30) for i in range(30)}
    ranked = sorted(found.items(), key=lambda item: -item[1])[:top]
    tokens = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in ranked]
    return {**tokens[0], "top_logprobs": tokens}


def _content(body: dict[str, Any]) -> tuple[list[Image.Image], str]:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return [], content
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]
    return pictures, next(part["text"] for part in content if part["type"] == "text")


def status(code: int, **headers: str) -> Fault:
    """Answers with a status."""

    def fault(handler: Handler) -> bool:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.send(code, {"error": {"message": f"no luck ({code})", "code": None}}, named)
        return True

    return fault


def quota(handler: Handler) -> bool:
    """Answers as OpenAI does if the account has no credit."""
    handler.send(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    return True


def silence(handler: Handler) -> bool:
    """Never answers."""
    time.sleep(30)
    return True


def hang_up(handler: Handler) -> bool:
    """Ends the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()
    return True


def half(handler: Handler) -> bool:
    """Announces a long answer and ends the connection in the middle of it."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True
    return True


def sends(content: Any) -> Fault:
    """Answers with this content."""

    def fault(handler: Handler) -> bool:
        handler.send(200, content)
        return True

    return fault


@contextmanager
def serving() -> Iterator[ChatServer]:
    """A server in a thread of its own."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
