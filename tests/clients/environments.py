"""The environments of other tools that ``make test-clients`` makes."""

import os
from pathlib import Path

import pytest

ENVIRONMENTS = Path(__file__).parents[2] / ".venv-clients"


def python_of(client: str) -> Path:
    """The Python of a client; without it the test is skipped, or fails where it is required."""
    found = ENVIRONMENTS / client / "bin" / "python"
    if not found.is_file():
        if os.environ.get("MGLL_REQUIRE_CLIENTS"):
            pytest.fail(f"no environment {client}")
        pytest.skip(f"no environment {client}: make test-clients makes it")
    return found
