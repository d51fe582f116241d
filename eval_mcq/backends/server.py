"""Requests to an OpenAI-compatible server: several at a time, repeated after failures, without leaking the key."""

import asyncio
import json
import logging
import os
import random
import re
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from mgll_encoder.common.errors import EndpointError, InvalidArgumentError, NotFoundError, one_line
from mgll_encoder.common.extras import require

_logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"

BUSY = 429
KEY_REFUSED = (401, 403)
TRANSIENT = (408, 409, 425, BUSY, 500, 502, 503, 504, 529)
"""Status codes after which the same request may succeed; 529 is used for overload."""

EXHAUSTED = "insufficient_quota"
"""OpenAI's code for an account without credit, sent with the status of a busy server."""

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
"""Seconds between two tries, doubled after each; a server may ask for more (``Retry-After``) ..."""

PATIENCE = 900.0
"""... up to this many seconds; beyond that the run stops, to be continued later."""

CONNECT = 15.0
"""Seconds within which a connection must be made."""

SHOWN = 200
"""Characters of a server's own message that are shown."""


class Refused(EndpointError):
    """The server understood a request and refuses it (status 400, 404, 422 ...)."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, and how it is asked.

    Attributes:
        url: Base URL, such as ``http://localhost:8000/v1``; ``/v1`` is added to a bare host.
        concurrency: Requests at a time.
        timeout: Seconds until a request is given up and repeated.
        retries: Repetitions of a failed request.
        key_variable: Environment variable with the API key; without a value no key is sent.
        longest_side: Larger images are reduced to this many pixels on their longer side; None sends every pixel.
        reply_tokens: Most tokens of a written reply; reasoning models need more than the default.
        allow_upload: Send images to another machine.
    """

    url: str
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    key_variable: str = KEY_VARIABLE
    longest_side: int | None = None
    reply_tokens: int = 32
    allow_upload: bool = False

    @property
    def base(self) -> str:
        """The base URL in one spelling.

        Raises:
            UserError: it is not the URL of a server, or contains a user, a password or a query.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgumentError(
                f"endpoint '{self.url:.80}' is not the URL of a server: expected one such as http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InvalidArgumentError(
                f"endpoint at {parts.hostname}: its URL contains a user, a password or a query, which would be "
                "recorded: give the bare URL, and a key in an environment variable (`key_variable`)"
            )
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        return f"{parts.scheme}://{parts.netloc}{path}"

    @property
    def host(self) -> str:
        """The server's host."""
        return urlsplit(self.url).hostname or ""

    @property
    def loopback(self) -> bool:
        """Whether the server is on this machine."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")

    def check(self) -> str | None:
        """Check everything that can be checked without a request, and return the API key.

        Raises:
            UserError: the URL is invalid, images would leave the machine without permission, or the key would travel
                unencrypted.
        """
        base = self.base
        if not self.loopback and not self.allow_upload:
            raise InvalidArgumentError(
                f"endpoint {base} is on another machine: the images and questions of the benchmark would be sent to "
                f"{self.host}; if you may do that, add `allow_upload=True`"
            )
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            if self.key_variable != KEY_VARIABLE:
                raise NotFoundError(f"environment variable {self.key_variable} (`key_variable`) is not set")
            return None
        if not (key.isascii() and key.isprintable()):
            raise InvalidArgumentError(
                f"environment variable {self.key_variable} does not contain an API key"
            )
        if not self.loopback and base.startswith("http:"):
            raise InvalidArgumentError(
                f"endpoint {base}: the key in {self.key_variable} would be sent unencrypted: use https, or unset the "
                "variable"
            )
        return key


class _Again(Exception):
    """A failure after which the same request is repeated, and for how long to wait before."""

    def __init__(self, reason: str, wait: float | None = None, busy: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.busy = busy


class Server:
    """A connection to a server. Requests run in a thread of their own; `close` ends them at once.

    Args:
        endpoint: The server.

    Raises:
        UserError: see `Endpoint.check`; or httpx2 is not installed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        require("endpoint", "an endpoint")
        import httpx2

        self.endpoint = endpoint
        self._key = endpoint.check()
        self._client = httpx2.AsyncClient(
            base_url=endpoint.base,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(endpoint.timeout, connect=min(CONNECT, endpoint.timeout), pool=None),
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
            trust_env=not endpoint.loopback,  # else a proxy of the environment would get what stays on this machine
        )
        self._failures = (httpx2.TransportError, httpx2.DecodingError, TimeoutError)
        self._answered = 0
        self._not_before = 0.0
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path.

        Raises:
            Refused: the server refuses.
            UserError: it does not answer, refuses the key, or answers something else.
        """
        return self._submit(self._asked("GET", path, None)).result()

    def post(self, path: str, body: dict[str, Any]) -> "Future[dict[str, Any]]":
        """Send a JSON object; the result is the JSON object that comes back, or an error as of `get`."""
        return self._submit(self._asked("POST", path, body))

    def close(self) -> None:
        """End all requests and the connection."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ended(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    def _submit(self, request: Coroutine[Any, Any, dict[str, Any]]) -> "Future[dict[str, Any]]":
        return asyncio.run_coroutine_threadsafe(request, self._loop)

    async def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request until it is answered or tried too often.

        While other requests are answered, one that finds the server busy is not tried too often.
        """
        tries = 0
        while True:
            before = self._answered
            try:
                async with self._slots:
                    await self._paused()
                    return await self._once(method, path, body)
            except _Again as failure:
                tries = 1 if failure.busy and self._answered > before else tries + 1
                if tries > self.endpoint.retries:
                    raise EndpointError(
                        f"endpoint {self.endpoint.base} fails {tries} times in a row: {failure}; the answers so far "
                        "are kept: run the same command again to continue"
                    ) from None
                wait = failure.wait
            if wait is None:
                wait = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
            await asyncio.sleep(wait)

    async def _paused(self) -> None:
        """Wait as long as the server has asked all requests to wait."""
        while (left := self._not_before - self._loop.time()) > 0:
            await asyncio.sleep(left)

    async def _once(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self._client.request(method, path, json=body)
        except self._failures as error:
            raise _Again(self._words(error)) from None
        if response.status_code in KEY_REFUSED:
            raise EndpointError(
                f"endpoint {self.endpoint.base} refuses the request ({response.status_code}): "
                + (
                    f"check the key in {self.endpoint.key_variable}"
                    if self._key
                    else f"set {self.endpoint.key_variable}"
                )
            )
        if not response.is_success:
            self._failed(response)
        try:
            answer = json.loads(response.content)
        except ValueError:
            raise _Again(f"its answer is not JSON ({self._quoted(response.text) or 'empty'})") from None
        if not isinstance(answer, dict):
            raise _Again(f"its answer is not a JSON object ({self._quoted(response.text)})")
        self._answered += 1
        return answer

    def _failed(self, response: Any) -> None:
        """Raise the error of a status."""
        status, (message, code) = response.status_code, self._error_of(response)
        if status not in TRANSIENT or code == EXHAUSTED:
            raise Refused(f"endpoint {self.endpoint.base} refuses the request ({status}): {message}")
        wait = _retry_after(response.headers)
        if wait is not None and wait > PATIENCE:
            raise EndpointError(
                f"endpoint {self.endpoint.base} asks to wait for {wait:.0f} s ({status}): the answers so far are "
                "kept: run the same command again then"
            )
        if status == BUSY and wait is not None:
            self._not_before = max(self._not_before, self._loop.time() + wait)
            wait = 0.0  # all requests wait, before their next try
        raise _Again(f"it answers {status} ({message})", wait, busy=status == BUSY)

    def _error_of(self, response: Any) -> tuple[str, str | None]:
        """Return message and code of an error, as OpenAI writes them, or the beginning of what came."""
        try:
            error = json.loads(response.content)
            error = error.get("error", error)
            message, code = (
                (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
            )
        except (ValueError, AttributeError):
            message, code = response.text, None
        return self._quoted(str(message)) or "no reason given", code if isinstance(code, str) else None

    def _words(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
            return f"no answer within {self.endpoint.timeout:g} s"
        return self._quoted(f"{type(error).__name__}: {error}".rstrip(": "))

    def _quoted(self, text: str) -> str:
        text = one_line(text.replace(self._key, "(key)") if self._key else text)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait; None if it does not, or not understandably."""
    given = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", given):
        return float(given)
    try:
        return max((parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def server_fault(what: str, found: Any) -> EndpointError:
    """Return the error for an answer that is JSON, but not what the interface promises."""
    return EndpointError(f"the endpoint's answer {what}: found {found!r:.120}")
