"""A library's error about a damaged folder is reported in one line that names the folder and the cause."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.library_errors import library_reason
from mllm_adapters import load_mllm

REPORT = (
    "We encountered some issues during automatic conversion of the weights. For details look at the `CONVERSION` "
    "entries of the above report!"
)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (RuntimeError(REPORT), "its tensors do not have the shapes that its config.json describes"),
        (RuntimeError("You set `ignore_mismatched_sizes` to `False`, thus raising an error."), "its tensors do not"),
        (KeyError("swish9"), "'swish9' is missing from it, or is not known to transformers"),
        (TypeError("__init__() got an unexpected keyword argument 'depth'"), "transformers knows no field 'depth'"),
        (Exception("data did not match any variant of untagged enum ModelUntagged"), "the files of its tokenizer"),
        (ValueError("The checkpoint you are trying to load has model type `mymodel` but Transformers does not "
                    "recognize this architecture."), "transformers knows no model_type 'mymodel'"),
        (ValueError("head_dim is odd\nsecond line"), "transformers says: head_dim is odd second line"),
        (UserError("config.json is not JSON"), "config.json is not JSON"),
        (ValueError(), "ValueError()"),
    ],
)  # fmt: skip
def test_a_librarys_words_become_one_plain_line(error: Exception, meaning: str) -> None:
    reason = library_reason(error)
    assert reason.startswith(meaning)
    assert "\n" not in reason
    assert len(reason) <= 200


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tokenizer of a newer release": (
        lambda f: edit(f / "tokenizer.json", version="9.0"), "the files of its tokenizer are damaged",
    ),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
    "no SentencePiece model": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_bytes(b"rubbish" * 9)),
        "tokenizer.model is not a SentencePiece model",
    ),
    "half a generation_config.json": (
        lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_damaged_file_is_named_and_nothing_else_is_on_the_screen(
    damage: str, tiny_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = DAMAGES[damage]
    folder = shutil.copytree(tiny_llava, tmp_path / "spoilt")
    spoil(folder)
    capfd.readouterr()
    with pytest.raises(BadDataError) as refusal:
        load_mllm(folder)
    assert str(folder) in str(refusal.value)
    assert message in str(refusal.value)
    shown = [line for line in capfd.readouterr().err.splitlines() if "Loading weights" not in line]
    assert not any(shown), "neither transformers' nor sentencepiece's reports"
