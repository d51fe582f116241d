"""A slice of `make soak`: what happens from outside to a long command costs no work, and leaves nothing."""

import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.__main__ import ready
from tests.soak.commands import BY_NAME, COMMANDS
from tests.soak.server import Server
from tests.soak.trial import INT, KILL, LIMIT, TERM, TWICE, Fault, Trials

QUICK = (
    ("swap", KILL), ("swap", TERM), ("swap", TWICE), ("align", INT), ("delta", LIMIT),
    ("retrain", KILL), ("retrain", TWICE), ("pretrain", TERM),
    ("data xray", KILL), ("data fundus", TWICE), ("build", TERM), ("export folder", KILL), ("export file", LIMIT),
)  # fmt: skip


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    server = Server()
    yield ready(server, tmp_path_factory.mktemp("soak"), [])
    server.close()


def disturb(trials: Trials, name: str, fault: Fault, turns: int = 1) -> None:
    draw = random.Random(zlib.crc32(f"{name} {fault.name}".encode()))
    for needed in BY_NAME[name].needs:
        trials.reference(BY_NAME[needed])
    for _ in range(turns):
        result = trials.run(BY_NAME[name], fault, draw)
        assert not result.faults, (name, fault.name, result)


@pytest.mark.parametrize(("name", "fault"), QUICK, ids=lambda value: getattr(value, "name", value))
def test_a_disturbed_command_is_done_when_it_is_typed_again(trials: Trials, name: str, fault: Fault) -> None:
    disturb(trials, name, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [KILL, TERM, INT, LIMIT, TWICE], ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_long_command_survives_every_disturbance(trials: Trials, name: str, fault: Fault) -> None:
    disturb(trials, name, fault, turns=3)


class TestTheTrials:
    """What a command does wrong is seen: trials that end badly stand in for it."""

    def test_a_leftover_a_loss_and_another_result_are_seen(self, trials: Trials, tmp_path: Path) -> None:
        class Spoiled(Fault):
            def disturb(self, trials, command, work, draw, result, typed):
                (work / ".manifest.jsonl.partial-abcdefgh").mkdir()
                (work / "manifest.jsonl").write_text("half")
                result.codes.append(1)

        result = trials.run(BY_NAME["data fundus"], Spoiled("spoiled", ()), random.Random(0))
        found = " ".join(result.faults)
        assert "exit [1]" in found
        assert "left at once: ['.manifest.jsonl.partial-abcdefgh']" in found
        assert "half-written or wrong: ['manifest.jsonl']" in found

    def test_two_commands_that_end_at_once_are_both_seen_to_end(self, trials: Trials, tmp_path: Path) -> None:
        jobs = [trials.server.start(["eval-mcq", "--help"], tmp_path, tmp_path / "log") for _ in range(2)]
        time.sleep(3)  # what the server says of both comes in one piece
        assert [job.wait(0.5) for job in reversed(jobs)] == [0, 0]

    def test_a_command_that_cannot_be_done_again_is_seen(self, trials: Trials) -> None:
        class Blocked(Fault):
            def disturb(self, trials, command, work, draw, result, typed):
                (work / "out.tsv").mkdir()
                (work / "out.tsv" / "x").touch()

        result = trials.run(BY_NAME["export file"], Blocked("blocked", ()), random.Random(0))
        assert any("not done afterwards: exit 2" in fault for fault in result.faults)
