"""Models behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, or a hosted one."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from eval_mcq.backends import chat
from eval_mcq.backends.base import Identity
from eval_mcq.backends.server import Endpoint, Refused, Server
from eval_mcq.items.schema import MCQItem
from eval_mcq.records.backend_record import BackendRecord
from eval_mcq.scoring.answerer import Answerer
from eval_mcq.scoring.modes import Score
from eval_mcq.scoring.prompt import Ask, Mode
from mgll_encoder.common.errors import (
    EndpointError,
    InvalidArgumentError,
    MismatchError,
    UserError,
    unknown_name,
)
from mgll_encoder.common.images import READER_VERSION

if TYPE_CHECKING:
    from PIL.Image import Image

_logger = logging.getLogger(__name__)

PATH = "chat/completions"

DESCRIBES = ("id", "owned_by", "root", "max_model_len", "meta")
"""Fields of a server's list of models that tell which model it is, and do not change at every start."""

PROBE = "Answer with the letter A."
"""A message without an image, by which is found out what a server accepts."""

MODES: tuple[Mode, ...] = ("letters", "generate")

Sent = list[tuple[Ask, "Future[dict[str, Any]]"]]
"""Questions with their coming answers."""


@dataclass(frozen=True)
class Offer:
    """What a server accepts and gives.

    Attributes:
        mode: Scoring mode.
        settings: What is sent besides model and messages.
        listed: Number of likeliest tokens that it lists; 0 in mode ``generate``.
        answers_as: The model's name in its answers: for an alias, the release that it stands for.
        fingerprint: What the server says about its build; empty if nothing.
    """

    mode: Mode
    settings: chat.Settings
    listed: int
    answers_as: str
    fingerprint: str


@dataclass(frozen=True)
class ServedModel:
    """A model behind a server, which is asked what it offers when mode or identity are first needed.

    Attributes:
        name: The model's name at the server.
        endpoint: The server.
        asked_mode: ``letters``, ``generate``, or ``auto``: letters if the server gives log-probabilities.
    """

    name: str
    endpoint: Endpoint
    asked_mode: Mode | Literal["auto"] = "auto"
    folder: None = None

    @property
    def mode(self) -> Mode:
        """The scoring mode in which it answers."""
        return self.offer.mode

    @cached_property
    def offer(self) -> Offer:
        """What the server accepts, found out by a message without an image.

        Raises:
            UserError: the mode is not possible, or the server does not answer.
        """
        with Server(self.endpoint) as server:
            return self._offered(server)

    def _offered(self, server: Server) -> Offer:
        if self.asked_mode not in ("auto", *MODES):
            raise InvalidArgumentError(
                f"`mode={self.asked_mode}` needs the likelihood of given texts, which no chat server gives: use "
                "`mode=letters` or `mode=generate`"
            )
        if self.asked_mode != "generate":
            for settings in chat.letter_settings():
                answer = self._tried(server, settings)
                listed = chat.top_tokens(answer) if answer else None
                if answer and listed:
                    return self._offer("letters", settings, len(listed), answer)
            if self.asked_mode == "letters":
                raise InvalidArgumentError(
                    f"endpoint {self.endpoint.base} gives no log-probabilities for '{self.name}': use `mode=generate`"
                )
            _logger.warning(
                f"endpoint {self.endpoint.base} gives no log-probabilities for '{self.name}': its written replies are "
                "parsed instead (`mode=generate`); compare it with runs of the same mode"
            )
        refusal: Refused | None = None
        for settings in chat.reply_settings(self.endpoint.reply_tokens):
            try:
                return self._offer("generate", settings, 0, self._probed(server, settings))
            except Refused as error:
                refusal = refusal or error
        assert refusal is not None, "there are settings to try"
        raise refusal

    @cached_property
    def identity(self) -> Identity:
        """What its answers depend on, as far as the server says it.

        Raises:
            UserError: the server does not answer, or does not have the model.
        """
        side = self.endpoint.longest_side
        with Server(self.endpoint) as server:
            described = self._described(server)
        backend = BackendRecord(
            name="endpoint",
            version=chat.CHAT_VERSION,
            sent={
                "model": self.name,
                "answers_as": self.offer.answers_as,
                "server_says": described,
                "settings": dict(self.offer.settings),
                "images": f"png, {'every pixel' if side is None else f'longer side at most {side}'}",
            },
            told={"url": self.endpoint.base, "system_fingerprint": self.offer.fingerprint},
        )
        versions = {package: version(package) for package in ("mgll-mllm", "httpx2")}
        return Identity(self.name, "", "", f"pictures-{READER_VERSION}", versions, backend)

    def load(self) -> "ServerAnswerer":
        """Connect.

        Raises:
            UserError: see `Server`.
        """
        return ServerAnswerer(self, Server(self.endpoint))

    def _described(self, server: Server) -> dict[str, Any] | None:
        """Return what the server says about the model; None if it has no list of models.

        Raises:
            UserError: the list does not have the model.
        """
        try:
            listed = server.get("models").get("data")
        except Refused:
            return None
        models = {str(one["id"]): one for one in listed or () if isinstance(one, dict) and "id" in one}
        if not models:
            return None
        if self.name not in models:
            raise unknown_name(f"model at {self.endpoint.base}", self.name, models)
        return {field: models[self.name][field] for field in DESCRIBES if field in models[self.name]}

    def _tried(self, server: Server, settings: chat.Settings) -> dict[str, Any] | None:
        try:
            return self._probed(server, settings)
        except Refused as refusal:
            _logger.debug(str(refusal))
            return None

    def _probed(self, server: Server, settings: chat.Settings) -> dict[str, Any]:
        message = {"role": "user", "content": PROBE}
        return server.post(PATH, {"model": self.name, "messages": [message], **settings}).result()

    def _offer(self, mode: Mode, settings: chat.Settings, listed: int, answer: dict[str, Any]) -> Offer:
        named, build = answer.get("model"), answer.get("system_fingerprint")
        return Offer(mode, settings, listed, named if isinstance(named, str) else "", str(build or ""))


class ServerAnswerer(Answerer[Sent]):
    """Sends questions to a server. Requests start when questions are prepared, so they continue across batches.

    Args:
        model: The model.
        server: The connection to its server; closed with `close`.
    """

    def __init__(self, model: ServedModel, server: Server) -> None:
        self._model = model
        self._server = server

    def prompt(self, item: MCQItem, rotation: int = 0) -> str:
        """Return the user's turn; the server's chat template is not known."""
        return chat.example(Ask(item, rotation))

    def check_options(self, items: Sequence[MCQItem]) -> None:
        """Check that the server lists as many tokens as a question has options.

        Raises:
            UserError: it does not; names the question.
        """
        offer, widest = self._model.offer, max(items, key=lambda item: len(item.options))
        if offer.mode == "letters" and offer.listed < len(widest.options):
            raise InvalidArgumentError(
                f"question '{widest.id}' has {len(widest.options)} options, but the endpoint lists only {offer.listed} "
                "tokens: use `mode=generate`"
            )

    def prepare(self, asks: Sequence[Ask], images: "list[Image]") -> Sent:
        """Send the questions on some images."""
        model = self._model
        pictures = [chat.picture_url(image, model.endpoint.longest_side) for image in images]
        return [
            (
                ask,
                self._server.post(
                    PATH,
                    {"model": model.name, "messages": chat.messages(ask, pictures), **model.offer.settings},
                ),
            )
            for ask in asks
        ]

    def answer(self, batch: Sequence[Sent]) -> list[list[Score]]:
        """Wait for the answers, and read them.

        Raises:
            UserError: the server fails or refuses, answers as another model, or its answer cannot be read; names the
                question.
        """
        return [[self._read(ask, answer) for ask, answer in sent] for sent in batch]

    def close(self) -> None:
        """End all requests."""
        self._server.close()

    def _read(self, ask: Ask, coming: "Future[dict[str, Any]]") -> Score:
        offer = self._model.offer
        try:
            answer = coming.result()
            if (named := answer.get("model", "")) != offer.answers_as:
                raise MismatchError(
                    f"the endpoint answers as model '{named}', but answered as '{offer.answers_as}' before: its "
                    "model has changed"
                )
            score = (chat.read_letters if offer.mode == "letters" else chat.read_reply)(ask, answer)
        except UserError as error:
            raise type(error)(f"question '{ask.item.id}': {error}") from None
        if score is None:
            raise EndpointError(
                f"question '{ask.item.id}': the endpoint gives no log-probabilities here, though it does elsewhere: "
                "use `mode=generate`"
            )
        return score
