"""Errors of the operating system are the user's to fix: exit code 2, one line, nothing half-written."""

import errno
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from mgll_encoder.common.cli import new_app, run
from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.faults import find_fault
from mgll_encoder.common.files import (
    appearing,
    cache_folder,
    made_once,
    new_file,
    new_folder,
    regular_file,
    write_text,
)
from mgll_encoder.common.texts import read_text
from tests.builders import invoke, refused


def command(action) -> object:
    app = new_app("A command.")
    app.command()(action)
    return lambda: run(app)


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit of 60 kB per file, which acts like a full disk and needs no rights to mount one."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def text(path: Path) -> None:
    path.write_text("x" * 100_000)


def safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, path)


def torch_file(path: Path) -> None:
    torch.save(torch.zeros(100_000), path)


def arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink:
        sink.write(b"x" * 100_000)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [text, safetensors, torch_file, arrow])
@pytest.mark.parametrize("opened", [new_file, new_folder, appearing])
def test_a_disk_that_takes_no_more_is_told_with_the_output_whichever_library_writes(
    write, opened, tmp_path: Path
) -> None:
    def full() -> None:
        with opened(tmp_path / "out") as partial:
            write(partial if opened is not new_folder else partial / "file")

    message = refused(command(full))
    assert message.startswith(f"{tmp_path / 'out'} cannot be written: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "No space left"),
        (errno.EDQUOT, "Disk quota"),
        (errno.EROFS, "Read-only"),
        (errno.EIO, "Input/output"),
    ],
)
def test_every_command_says_what_the_disk_said_and_where(number: int, reason: str) -> None:
    def broken() -> None:
        raise OSError(number, os.strerror(number), "/data/model.safetensors")

    message = refused(command(broken))
    assert message.startswith(f"/data/model.safetensors: {reason}")


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def name_too_long(folder: Path) -> Path:
    return folder / ("n" * 300)


def link_to_nothing(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "gone")
    return folder / "out"


@pytest.mark.parametrize("place", [below_a_file, name_too_long, link_to_nothing])
@pytest.mark.parametrize("opened", [new_file, new_folder])
def test_an_output_that_cannot_be_is_named(place, opened, tmp_path: Path) -> None:
    out = place(tmp_path)
    before = sorted(tmp_path.iterdir())

    def impossible() -> None:
        with opened(out, force=True):
            raise AssertionError("there is nothing to write to")

    assert str(tmp_path) in refused(command(impossible))
    assert sorted(tmp_path.iterdir()) == before


def test_a_cache_that_cannot_be_made_says_what_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(below_a_file(tmp_path)))

    def compute() -> None:
        made_once(cache_folder("rows") / "x", lambda partial: partial.touch())

    assert "set MGLL_CACHE_DIR to a writable folder" in refused(command(compute))


def test_a_missing_file_is_named_and_so_is_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    link_to_nothing(tmp_path)
    assert f"{tmp_path / 'none'}: No such file" in refused(command(lambda: (tmp_path / "none").read_text()))
    assert "is a link to" in refused(command(lambda: (tmp_path / "out").read_text()))


def test_a_fault_of_ours_stays_one_though_a_file_was_looked_for_before(tmp_path: Path) -> None:
    def wrong() -> None:
        try:
            (tmp_path / "cache").read_text()
        except FileNotFoundError:
            {}["a"]

    assert invoke(command(wrong)).code == 1
    assert find_fault(OSError("Can't load the tokenizer")) is None


def test_a_file_of_another_kind_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    kinds = {"pipe": "pipe", "link": "pipe", "folder": "folder", "socket": "socket", "/dev/zero": "device"}
    for name, kind in kinds.items():
        with pytest.raises(BadDataError, match=f"image {tmp_path / name} is a {kind}"):
            regular_file(tmp_path / name, "image")
    for name in ("none", "no\0name", "n" * 300, "folder/x/y"):
        with pytest.raises(UserError, match="image "):
            regular_file(tmp_path / name, "image")
    write_text(tmp_path / "text", "\ufeffbom")
    assert read_text(tmp_path / "text", "text") == "bom"
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(BadDataError, match="not UTF-8"):
        read_text(tmp_path / "text", "text")


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_outputs_have_the_permissions_that_the_umask_leaves(
    umask: int, file: int, folder: int, tmp_path: Path
) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    old = os.umask(umask)
    try:
        write_text(tmp_path / "file", "x")
        with appearing(tmp_path / "cached") as partial:
            safetensors(partial)
        with new_folder(tmp_path / "out") as made:
            safetensors(made / "weights")
            os.link(tmp_path / "file", made / "linked")
    finally:
        os.umask(old)
    assert {mode(tmp_path / name) for name in ("file", "cached", "out/weights", "out/linked")} == {file}
    assert mode(tmp_path / "out") == folder


@pytest.mark.parametrize("stderr", [subprocess.PIPE, "/dev/full"])
def test_results_that_cannot_be_printed_are_not_passed_over(stderr: int | str) -> None:
    program = (
        "from mgll_encoder.common.cli import new_app, run, stdout\n"
        "app = new_app('x')\n"
        "app.command()(lambda: stdout.print('a result'))\n"
        "run(app)"
    )
    with Path("/dev/full").open("w") as full:
        errors = full if stderr == "/dev/full" else stderr
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=errors, text=True, check=False
        )
    assert done.returncode == 2
    if stderr == subprocess.PIPE:
        assert done.stderr.startswith("error: No space left on device")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = (
        "from mgll_encoder.common.cli import *\napp = new_app('x')\n@app.command()\ndef many():\n"
        "    for _ in range(100_000): stdout.print('x')\nrun(app)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
