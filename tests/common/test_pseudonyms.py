"""A manifest is shared, and no recipient can identify a patient by guessing ids."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mgll_encoder.common.errors import BadDataError, StorageError
from mgll_encoder.common.pseudonyms import KEY_FILE, KEY_VARIABLE, Pseudonyms


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "hospital" / "labels.csv"
    path.parent.mkdir()
    path.write_text("file,labels\n")
    return path


def test_a_patient_has_one_pseudonym_per_key_and_it_is_no_hash_of_the_id(table):
    first = Pseudonyms(table).patient("Jane Roe")
    assert re.fullmatch("pt-[0-9a-f]{16}", first)
    assert Pseudonyms(table).patient(first) == first, "a pseudonym is not given another one"
    assert first == Pseudonyms(table).patient("Jane Roe")
    assert first == Pseudonyms(table.parent / "dicom").patient("Jane Roe"), (
        "a folder beside it has the same key"
    )
    assert first != Pseudonyms(table).patient("Jane Doe")
    assert first != Pseudonyms(table).file("Jane Roe")
    assert not hashlib.sha256(b"Jane Roe").hexdigest().startswith(first[3:])
    (table.parent / KEY_FILE).unlink()
    assert first != Pseudonyms(table).patient("Jane Roe"), "with another key"


def test_the_key_is_for_its_owner_alone_and_is_not_drawn_before_it_is_needed(table):
    key = table.parent / KEY_FILE
    pseudonyms = Pseudonyms(table)
    assert not key.exists()
    pseudonyms.patient("7")
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in sorted(table.parent.iterdir())] == [KEY_FILE, "labels.csv"]


def test_beside_a_read_only_input_the_key_is_the_users_own_and_that_is_said(table, caplog):
    table.parent.chmod(0o555)
    try:
        first = Pseudonyms(table).patient("7")
    finally:
        table.parent.chmod(0o755)
    key = table.parents[1] / "config" / "mgll-mllm" / "pseudonyms.key"
    assert not (table.parent / KEY_FILE).exists()
    assert key.stat().st_mode & 0o777 == 0o600
    said = "\n".join(caplog.messages)
    assert KEY_VARIABLE in said
    assert str(key) in " ".join(said.split())
    assert first != Pseudonyms(table).patient("7"), "writable again, it has a key of its own"


def test_a_key_may_be_named(table, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "safe" / "key"))
    first = Pseudonyms(table).patient("7")
    assert not (table.parent / KEY_FILE).exists()
    assert first == Pseudonyms(tmp_path / "elsewhere" / "other.csv").patient("7")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff\xfe", b"zz" * 32])
def test_a_damaged_key_is_refused_and_left_alone(table, content):
    key = table.parent / KEY_FILE
    key.write_bytes(content)
    with pytest.raises(
        BadDataError, match=rf"{KEY_FILE}.* is damaged: expected .*64 hexadecimal.*{KEY_VARIABLE}"
    ):
        Pseudonyms(table).patient("7")
    assert key.read_bytes() == content


def test_a_key_that_cannot_be_written_is_told_with_the_way_out(table, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "file" / "key"))
    with pytest.raises(StorageError, match=f"cannot be written to .*{KEY_VARIABLE}=FILE"):
        Pseudonyms(table).patient("7")


def test_processes_that_begin_together_agree_on_a_key(table):
    code = (
        f"from mgll_encoder.common.pseudonyms import *; print(Pseudonyms(Path({str(table)!r})).patient('7'))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert len({process.communicate()[0] for process in started}) == 1
