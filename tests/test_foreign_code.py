"""No code of a foreign folder is run, and the user is not prompted."""

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.text.text_tower import TextTower
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.loading.load import load_mllm
from tests.builders import Outcome, invoke
from tests.eval_mcq.helpers import small_bench
from tests.mgll_encoder import towers
from tests.mgll_encoder.test_text_tower import bert_folder
from tests.mllm_adapters.retraining import color_rows, write_json

ROOT = Path(__file__).parents[1]
ASKING = ("from_pretrained", "from_config", "load_dataset")
"""Calls of transformers and datasets that ask on the terminal unless they are told not to."""

CODE = "open({marker!r}, 'w').close()\nclass Evil: ...\n"

HOSTILE: dict[str, dict[str, Any]] = {
    "config.json": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}},
    "processor_config.json": {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}},
    "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
}
"""Configuration of a LLaVA -> what has it ask for the code of its folder."""


@pytest.mark.parametrize("package", ["mgll_encoder", "mllm_adapters", "eval_mcq", "scripts"])
def test_every_call_that_could_ask_is_told_not_to(package: str) -> None:
    asking = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _could_ask(call) and not _is_told(call)
    ]
    assert not asking


def _could_ask(call: ast.Call) -> bool:
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    peft = isinstance(owner, ast.Name) and owner.id.startswith(
        "Peft"
    )  # it has no such argument, and runs no code
    return isinstance(call.func, ast.Attribute) and call.func.attr in ASKING and not peft


def _is_told(call: ast.Call) -> bool:
    return any(
        word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in call.keywords
    )


class Terminal(io.StringIO):
    """A terminal that answers yes to every prompt, and records whether there was one."""

    asked = False

    def readline(self, *_: Any) -> str:
        self.asked = True
        return "y\n"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that the code of hostile folders would write; fails if it exists or if there was a prompt."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    yield tmp_path / "marker"
    assert not terminal.asked
    assert not (tmp_path / "marker").exists()


def hostile(source: Path, file: str, marker: Path) -> Path:
    """A copy of a model folder that contains code and names it in one of its configurations."""
    folder = Path(shutil.copytree(source, marker.parent / "hostile"))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((folder / file).read_text()) | HOSTILE[file]
    (folder / file).write_text(json.dumps(settings))
    return folder


def swap(folder: Path) -> Outcome:
    tower = towers.write(towers.state_of(towers.open_clip_model()), folder.parent / "tower.pt")
    out = folder.parent / "out"
    return invoke(swap_encoder, "--mllm", folder, "--encoder", tower, "--activation", "gelu", "--out", out)


def retrain(folder: Path) -> Outcome:
    data = write_json(folder.parent / "train.json", color_rows(folder.parent / "images", 2))
    images = folder.parent / "images"
    return invoke(
        retrain_projector,
        "--model",
        folder,
        "--data",
        data,
        "--images",
        images,
        "--max-steps",
        1,
        "--dry-run",
    )


def evaluate(folder: Path) -> Outcome:
    bench = small_bench(folder.parent / "bench", 2)
    out = folder.parent / "run"
    return invoke(eval_mcq, "run", "--model", folder, "--bench", bench, "--out", out)


@pytest.mark.parametrize("command", [swap, retrain, evaluate])
@pytest.mark.parametrize("file", list(HOSTILE))
def test_a_folder_that_brings_code_is_read_without_it_or_refused(
    tiny_llava: Path, marker: Path, command: Callable[[Path], Outcome], file: str
) -> None:
    outcome = command(hostile(tiny_llava, file, marker))
    assert outcome.code in (0, 2), outcome
    if outcome.code == 2:
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert file in errors[0]
        assert "auto_map" in errors[0]


def test_a_processor_that_only_its_own_code_can_make_is_refused_by_file_and_field(
    tiny_llava: Path, marker: Path
) -> None:
    folder = hostile(tiny_llava, "processor_config.json", marker)
    with pytest.raises(
        UnsupportedCheckpointError, match=r"none of it was run: .*processor_config\.json .*'auto_map'"
    ):
        load_mllm(folder)


def test_a_processor_that_would_load_another_model_is_refused(tiny_llava: Path, marker: Path) -> None:
    folder = hostile(tiny_llava, "config.json", marker)
    file = folder / "processor_config.json"
    other = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(folder)}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"audio_tokenizer": other}))
    with pytest.raises(UnsupportedCheckpointError, match=r"processor_config\.json: field 'audio_tokenizer'"):
        load_mllm(folder)


def test_a_text_tower_of_unknown_kind_is_refused_by_file_and_field(tmp_path: Path, marker: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    asking = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(asking))
    with pytest.raises(UnsupportedCheckpointError, match=r"none of it was run: .*config\.json .*'auto_map'"):
        TextTower.pretrained(str(folder), 16)
