import pytest

from tests.eval_mcq.helpers import Command


@pytest.fixture
def eval_mcq(monkeypatch, capsys) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys)
