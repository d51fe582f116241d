"""``mgll-encoder inspect`` and ``convert`` as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mgll_encoder import inspect_tower
from mgll_encoder.cli import main
from tests.mgll_encoder import towers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return towers.write(towers.state_of(towers.open_clip_model()), tmp_path / "tower.pt")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line; gives exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mgll-encoder", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return run


def test_inspect_prints_the_contract_and_where_it_comes_from(typed, source: Path) -> None:
    code, out, err = typed("inspect", source)
    assert code == 0
    for said in (
        "open_clip state dict", "width 64, 3 blocks, 1 heads, MLP 256", "42 px in patches of 14", "gelu (default)",
        "256 at 224 px", "576 at 336 px", "1024 at 448 px", "to 24", "(float32)", "text tower",
    ):  # fmt: skip
        assert said in out, said
    assert "--activation quick_gelu" in err
    assert "about 1 % off" in err


def test_inspect_as_json_is_complete(typed, source: Path) -> None:
    code, out, _ = typed("inspect", source, "--json", "--activation", "quick_gelu")
    facts, header = json.loads(out), inspect_tower(source, activation="quick_gelu")
    assert code == 0
    assert (facts["activation"], facts["activation_source"]) == ("quick_gelu", "option")
    assert (
        facts["parameters"]
        == sum(t.numel() for n, t in towers.open_clip_model().visual.state_dict().items()) - 64 * 24
    )
    assert facts["dropped"] == header.dropped
    assert facts["patch_tokens"] == {"42": 9, "224": 256, "336": 576, "448": 1024}


def test_convert_writes_a_folder_and_says_what_is_next(typed, source: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "mgll fundus"
    code, out, err = typed("convert", source, "--out", out_folder, "--activation", "quick_gelu")
    assert code == 0
    assert f"swap-encoder --mllm llava-med --encoder '{out_folder}'" in out
    assert "activation" not in err
    assert inspect_tower(out_folder).spec == inspect_tower(source, activation="quick_gelu").spec
    code, _, err = typed("convert", source, "--out", out_folder)
    assert code == 2
    assert err.startswith(f"error: output {out_folder} exists")
    assert typed("convert", source, "--out", out_folder, "--force")[0] == 0
    assert inspect_tower(out_folder).spec.activation == "gelu"


def test_an_unknown_activation_is_answered_with_the_nearest(typed, source: Path) -> None:
    code, _, err = typed("inspect", source, "--activation", "quickgelu")
    assert code == 2
    assert err.strip() == (
        "error: unknown activation 'quickgelu': did you mean 'quick_gelu'? known are gelu, gelu_pytorch_tanh, "
        "quick_gelu"
    )


@pytest.mark.parametrize("command", [(), ("inspect",), ("convert",), ("data",), ("pretrain",)])
def test_help_has_an_example_and_does_not_wait_for_torch(command: tuple[str, ...]) -> None:
    program = (
        "import sys; from mgll_encoder.cli import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    if command in {("inspect",), ("convert",)}:
        assert f"Example: mgll-encoder {command[0]}" in shown.stdout
