"""Render chat templates in a separate process, which the kernel kills if it uses too much time or memory.

`mgll_encoder.common.chat` starts it as a script; it imports nothing from this project. One line of JSON in, one out.
"""

import json
import os
import resource
import signal
import sys
from typing import Any, TextIO

MEMORY = 1 << 30
"""Bytes that the process may allocate after startup."""

CHARACTERS = 1 << 24
"""Maximum length of a rendered text."""

TEMPLATE_FILES = ("<template>", "<unknown>")
"""File names that jinja2 gives to a template passed as a string."""


def main() -> None:
    """Answer requests until the input ends; the argument is the CPU time in seconds that each may take."""
    seconds = float(sys.argv[1])
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # keep what libraries print out of the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
    from transformers.utils.chat_template_utils import render_jinja_template

    limit = _memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _answer(out, {"ready": True})
    for line in sys.stdin:
        _answer(out, _render_all(render_jinja_template, json.loads(line), seconds))


def _render_all(render: Any, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Render the chats of a request; the answer is their texts, or the first error."""
    texts = []
    for turns, asking in request.pop("chats"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal kills the process
        answer = _render(render, {**request, "conversations": [turns], "add_generation_prompt": asking})
        signal.setitimer(signal.ITIMER_PROF, 0)
        if "text" not in answer:
            return answer
        texts.append(answer["text"])
    return {"texts": texts}


def _render(render: Any, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        (text,), _ = render(**settings)
    except MemoryError:
        return {"error": "it uses too much memory"}
    except RecursionError:
        return {"error": "it recurses without end"}
    except Exception as error:  # any error of a template is reported, with its line
        return {"error": str(error)[:500] or type(error).__name__, "line": _line(error)}
    if len(text) > CHARACTERS:
        return {"error": f"it writes more than {CHARACTERS} characters"}
    return {"text": text}


def _line(error: BaseException) -> int | None:
    """Return the line of the template in which an error was raised."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in TEMPLATE_FILES:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line if isinstance(line, int) else None


def _memory() -> int:
    """Return the size of the process's address space in bytes."""
    with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123 - avoids an import
        return int(stream.read().split()[0]) * resource.getpagesize()


def _answer(out: TextIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
