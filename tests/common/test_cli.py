"""Behavior shared by all commands: exit codes, one-line errors, outputs complete or not at all."""

from pathlib import Path

import pytest
import typer

from mgll_encoder.common.cli import new_app, run, stdout, warn
from mgll_encoder.common.errors import InvalidArgumentError, OutputTakenError, UserError, unknown_name
from mgll_encoder.common.files import new_folder, write_text
from mgll_encoder.common.images import open_image
from mgll_encoder.common.splits import assign_split
from tests.builders import invoke, picture, refused


def command(action) -> object:
    app = new_app("A command.")
    app.command()(action)
    return lambda: run(app)


def test_done_is_0() -> None:
    def hello() -> None:
        warn("a [INST] in a warning is printed as it is")
        stdout.print("hello")

    outcome = invoke(command(hello))
    assert (outcome.code, outcome.out) == (0, "hello\n")
    assert "a [INST] in a warning" in outcome.err


def test_the_users_mistake_is_2_and_one_line_whatever_it_holds() -> None:
    def wrong() -> None:
        raise UserError("prompt '[INST] x [/INST]'\n   is wrong")

    assert refused(command(wrong)) == "prompt '[INST] x [/INST]' is wrong"


def test_a_path_that_no_system_takes_does_not_fill_the_screen() -> None:
    def wrong() -> None:
        Path("x" * 70000).stat()

    said = refused(command(wrong))
    assert len(said) < 2100
    assert said.endswith("choose a shorter name (255 bytes for each part of a path)")


def test_our_fault_is_1_and_says_how_to_see_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("x")

    outcome = invoke(command(broken))
    assert outcome.code == 1
    assert "MGLL_DEBUG=1" in outcome.err
    monkeypatch.setenv("MGLL_DEBUG", "1")
    with pytest.raises(KeyError):
        invoke(command(broken))


def test_interrupting_is_130() -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    assert invoke(command(stopped)).code == 130


def test_exit_codes_of_an_action_are_kept() -> None:
    def leave() -> None:
        raise typer.Exit(3)

    assert invoke(command(leave)).code == 3


def test_an_unknown_name_gets_the_nearest() -> None:
    assert "did you mean 'llava-med'?" in str(unknown_name("family", "llavamed", ["llava-med", "qwen-vl"]))
    assert "did you mean" not in str(unknown_name("family", "xyz", ["llava-med", "qwen-vl"]))
    assert "did you mean" not in str(unknown_name("disease", "Stargardt", ["AMD", "Cataract"]))
    assert "did you mean 'vision-tower'?" in str(unknown_name("part", "tower", ["llm", "vision-tower"]))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        with new_folder(out) as partial:
            (partial / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as partial:
        (partial / "whole").write_text("x")
        assert not out.exists()
    assert (out / "whole").read_text() == "x"
    with pytest.raises(OutputTakenError, match="exists"), new_folder(out):
        pass
    with new_folder(out, force=True) as partial:
        (partial / "new").write_text("y")
    assert [f.name for f in out.iterdir()] == ["new"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_text_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    with pytest.raises(OutputTakenError, match="exists"):
        write_text(tmp_path / "a", "2")
    write_text(tmp_path / "a", "2", force=True)
    assert (tmp_path / "a").read_text() == "2"


def test_images_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    good = picture(tmp_path, "good.png")
    assert open_image(good).mode == "RGB"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    for name, message in [("none.png", "does not exist"), ("text.png", "format"), ("cut.png", "decoded")]:
        with pytest.raises(UserError, match=message) as error:
            open_image(tmp_path / name)
        assert name in str(error.value)


def test_a_patients_side_never_depends_on_the_others() -> None:
    patients = [f"p{i}" for i in range(2000)]
    sides = {p: assign_split(p, test=0.3, val=0.1) for p in patients}
    assert sides == {p: assign_split(p, test=0.3, val=0.1) for p in reversed(patients)}
    shares = {side: list(sides.values()).count(side) / 2000 for side in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.6, "val": 0.1, "test": 0.3}, abs=0.03)
    assert sides != {p: assign_split(p, test=0.3, val=0.1, seed=1) for p in patients}
    with pytest.raises(InvalidArgumentError, match="less than 1"):
        assign_split("p", test=0.8, val=0.3)
