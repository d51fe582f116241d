"""What every family refuses in one line, whatever the family: nothing is written then, and no traceback is shown."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.family_table import FAMILIES
from mllm_adapters.core.registry import open_checkpoint
from tests import builders
from tests.mllm_adapters import complete

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete.encoder(tmp_path_factory.mktemp("towers") / "mgll")


@pytest.fixture(scope="module", params=FAMILIES)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts") / request.param
    return complete.BUILDERS[request.param](folder, lambda: request.getfixturevalue("golden"))


def config_of(folder: Path) -> Path:
    """Med-Flamingo's own folder has none: its language model's."""
    return next(f for f in (folder / "config.json", folder / "llama-7b-hf" / "config.json") if f.is_file())


def edited(folder: Path, **fields: object) -> None:
    file = config_of(folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def weights_of(folder: Path) -> Path:
    return next(p for s in (".safetensors", ".bin", ".pt") for p in sorted(folder.glob(f"*{s}")))


def cut(folder: Path) -> None:
    file = weights_of(folder)
    data = file.read_bytes()
    file.unlink()  # it may be a hard link
    file.write_bytes(data[: len(data) // 2])


DAMAGES: Mapping[str, tuple[Change, tuple[str, ...]]] = {
    "no JSON": (lambda f: config_of(f).write_text("{"), ("config.json is not JSON",)),
    "a list": (lambda f: config_of(f).write_text("[1]"), ("config.json contains a JSON list",)),
    "quantised": (
        lambda f: edited(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("quanti", "unquantized"),
    ),
    "an adapter beside it": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), ("adapter",),
    ),
    "half a weight file": (cut, ("truncated or damaged", "download it again")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, host: Path, tower: Path, tmp_path: Path
) -> None:
    spoil, words = DAMAGES[damage]
    broken = shutil.copytree(host, tmp_path / "broken")
    if damage == "an adapter beside it" and not (broken / "config.json").is_file():
        pytest.skip("loose weight files: an adapter's are none of them")
    spoil(broken)
    message = builders.refused(swap_encoder, "--mllm", broken, "--encoder", tower, "--out", tmp_path / "out")
    assert str(broken) in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_an_option_that_cannot_be_is_refused_by_name(host: Path, tower: Path, tmp_path: Path) -> None:
    spec = open_checkpoint(host)[1].spec
    given = ("--mllm", host, "--encoder", tower, "--out", tmp_path / "out")
    message = builders.refused(swap_encoder, *given, "--part", "nonsense=x")
    assert "--part" in message
    assert not message.endswith("known are "), "an empty list helps nobody"
    assert "unknown --layout 'own2'" in builders.refused(swap_encoder, *given, "--layout", "own2")
    for side in (223, 0, 100_000, 140_000):
        assert f"{side}" in builders.refused(swap_encoder, *given, "--image-size", side) or side == 0
    assert "is the input" in builders.refused(swap_encoder, *given[:4], "--out", host, "--force")
    if spec.not_llava:
        message = builders.refused(swap_encoder, *given, "--layout", "llava")
        assert message == f"--layout llava: {spec.not_llava}; use --layout own"
    else:
        assert builders.invoke(swap_encoder, *given, "--layout", "llava", "--dry-run").code == 0
    assert not (tmp_path / "out").exists()


def test_a_language_model_of_a_million_layers_is_refused_before_it_fills_the_memory(
    tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_llava, tmp_path / "broken")
    text = json.loads((broken / "config.json").read_text())["text_config"]
    edited(broken, text_config={**text, "num_hidden_layers": 10**12})
    message = builders.refused(swap_encoder, "--mllm", broken, "--encoder", tower, "--out", tmp_path / "out")
    assert "text_config: num_hidden_layers is 1000000000000, but the weights have" in message


@pytest.mark.parametrize("files", [(), ("README.md",)])
def test_a_folder_without_a_checkpoint_is_refused(
    files: tuple[str, ...], tower: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("# A model\n")
    message = builders.refused(swap_encoder, "--mllm", folder, "--encoder", tower)
    assert "is not a checkpoint folder: expected a folder with a config.json" in message


def test_parts_without_the_checkpoint_that_they_belong_to_are_refused(
    host: Path, tower: Path, tmp_path: Path
) -> None:
    if (host / "config.json").is_file():
        pytest.skip("of weight files with their parts beside them")
    broken = shutil.copytree(host, tmp_path / "broken")
    weights_of(broken).unlink()
    message = builders.refused(swap_encoder, "--mllm", broken, "--encoder", tower)
    assert "contains no config.json and no weights of a known family" in message


def test_a_damaged_tower_beside_weight_files_is_named(host: Path, tower: Path, tmp_path: Path) -> None:
    if (host / "config.json").is_file():
        pytest.skip("of weight files with their parts beside them")
    broken = shutil.copytree(host, tmp_path / "broken")
    cut(broken / "clip-vit")
    message = builders.refused(swap_encoder, "--mllm", broken, "--encoder", tower)
    assert "clip-vit/model.safetensors is truncated or damaged" in message
