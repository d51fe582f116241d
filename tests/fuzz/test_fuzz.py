"""Whatever is in a file: it is read, or refused in one line. A slice of `make fuzz`, and what it once found."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.harness import Case, Worker, warm, worker_of
from tests.fuzz.readers import READERS, Reader
from tests.fuzz.search import check_valid, reader_of, replay, search

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
INPUTS = 10
"""Of each reader; a second or so."""


@pytest.fixture(scope="module")
def warmed() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    warm()


@pytest.fixture(params=READERS, ids=lambda reader: reader.name, scope="module")
def worker(
    request: pytest.FixtureRequest, warmed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    reader: Reader = request.param
    made = worker_of(reader, tmp_path_factory.mktemp(reader.name))
    yield made
    made.close()


def test_every_damaged_input_is_read_or_refused_in_one_line(worker: Worker) -> None:
    check_valid(worker)
    found = search(worker, INPUTS, chance=0, save=None)
    assert not found.findings
    assert found.drawn == INPUTS


def test_what_was_found_once_is_not_found_again(worker: Worker) -> None:
    for damaged in CORPUS:
        if reader_of(damaged) == worker.reader:
            for command, _, verdict in replay(worker, damaged):
                assert verdict.kind != "finding", (damaged.name, command, verdict.what)


def test_the_corpus_belongs_to_readers() -> None:
    assert {reader_of(damaged).name for damaged in CORPUS} >= {
        "runs",
        "labels",
        "dicom",
        "recipes",
        "weights",
    }


class TestTheHarness:
    """Crashes, hangs and leftovers are seen: commands that do such things stand in for a reader's."""

    @pytest.fixture
    def judged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """What a command made of some code is judged to do."""

        def judge(code: str) -> str:
            def build(folder: Path) -> None:
                (folder / "x.txt").write_text("x")

            from tests.fuzz import harness

            monkeypatch.setattr(harness, "commands", lambda: {"do": lambda: exec(code, {})})
            monkeypatch.setattr(harness, "SECONDS", 1.0)
            made = worker_of(Reader("do", build, ("x.txt",), ("do",)), tmp_path / "scratch")
            try:
                return made.run(Case("x.txt", "x.txt", "do", ()))[1].what
            finally:
                made.close()

        return judge

    @pytest.mark.parametrize(
        ("code", "found"),
        [
            ("raise SystemExit(0)", ""),
            ("import sys; print('error: x', file=sys.stderr); sys.exit(2)", "error: x"),
            ("import sys; print('error: x\\nerror: y', file=sys.stderr); sys.exit(2)", "2 error lines"),
            ("import sys; print('error: \\x1b[31m', file=sys.stderr); sys.exit(2)", "control characters"),
            ("import sys; sys.exit(1)", "exit 1"),
            ("{}['x']", "KeyError"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
            ("import os; os._exit(3)", "left with 3"),
            ("while True: pass", "hangs"),
            ("x = bytearray(1 << 40)", "MemoryError"),
            ("open('.partial-x', 'w'); raise SystemExit(0)", "leftover .partial-x"),
            (
                "import sys; open('o', 'w'); print('error: x', file=sys.stderr); sys.exit(2)",
                "o is written",
            ),
            ("open('executed', 'w'); raise SystemExit(0)", "planted code was run"),
            ("print('accuracy nan'); raise SystemExit(0)", "nan in what is printed"),
            ("open('o.json', 'w').write('[NaN]'); raise SystemExit(0)", "NaN is no JSON"),
        ],
    )
    def test_a_fault_is_seen(self, code: str, found: str, judged) -> None:
        assert found in judged(code)
