"""Options of ``eval-mcq run`` for a model behind a server."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.extras import require

if TYPE_CHECKING:
    from eval_mcq.backends.server import Endpoint

PANEL = "Endpoint"


def _check_url(url: str | None) -> str | None:
    if url is not None:
        require("endpoint", "--endpoint")
    return url


Url = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        rich_help_panel=PANEL,
        callback=_check_url,
        help="Base URL of an OpenAI-compatible server (vLLM, llama.cpp, Ollama, a hosted one) that answers as --model; "
        "images and questions are sent to it.",
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        help="Requests at a time (8), at most about twice --batch-size.", min=1, rich_help_panel=PANEL
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds until a request is given up and repeated (120).", min=0.1, rich_help_panel=PANEL
    ),
]
Retries = Annotated[
    int | None, typer.Option(help="Repetitions of a failed request (6).", min=0, rich_help_panel=PANEL)
]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Environment variable with the API key (OPENAI_API_KEY). The key is never stored or shown.",
        rich_help_panel=PANEL,
    ),
]
LongestSide = Annotated[
    int | None,
    typer.Option(
        help="Reduce larger images to this many pixels on their longer side (default: every pixel, as PNG).",
        min=16,
        rich_help_panel=PANEL,
    ),
]
ReplyTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a written reply (32); a model that reasons first needs more.",
        min=1,
        rich_help_panel=PANEL,
    ),
]
AllowUpload = Annotated[
    bool,
    typer.Option(
        "--allow-upload",
        help="Send the images to a server on another machine. Without it only this machine's are asked.",
        rich_help_panel=PANEL,
    ),
]


def endpoint_of(url: str | None, **given: Any) -> "Endpoint | None":
    """Return the server that the options describe, with defaults for those not given; None without ``--endpoint``.

    Raises:
        UserError: an option was given without ``--endpoint``.
    """
    from eval_mcq.backends.server import Endpoint

    used = {name: value for name, value in given.items() if value not in (None, False)}
    if url is not None:
        return Endpoint(url, **used)
    if used:
        raise InvalidArgumentError(f"`{next(iter(used))}` has an effect only with `endpoint`")
    return None
