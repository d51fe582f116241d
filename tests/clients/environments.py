"""The environments of other tools that ``make test-clients`` makes."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ENVIRONMENTS = Path(__file__).parents[2] / ".venv-clients"


def python_of(client: str) -> Path:
    """The Python of a client; without it the test is skipped, or fails where it is required."""
    found = ENVIRONMENTS / client / "bin" / "python"
    if not found.is_file():
        not_here(f"environment {client}")
    return found


def not_here(what: str) -> None:
    """Skip a test that needs what is not here, or let it fail where it is required."""
    if os.environ.get("MGLL_REQUIRE_CLIENTS"):
        pytest.fail(f"no {what}")
    pytest.skip(f"no {what}: make test-clients makes it")


@cache
def workplace(client: str) -> Path:
    """A folder for the files of a client's tests, which lives as long as this process."""
    place = TemporaryDirectory(prefix=f"{client}-")
    _places.append(place)
    return Path(place.name)


_places: list[TemporaryDirectory[str]] = []
