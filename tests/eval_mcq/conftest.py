from collections.abc import Iterator
from typing import Any

import pytest

from tests import browser as browsers
from tests.eval_mcq.helpers import Command


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if reason := browsers.missing():
        pytest.skip(reason)
    with browsers.opened() as driver:
        yield driver


@pytest.fixture
def eval_mcq(monkeypatch, capsys) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys)
