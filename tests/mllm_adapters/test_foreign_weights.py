"""Adapters without their base, and weights of other programs: named, with the way out, which works as it is printed."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, CLIPVisionModel

from mgll_encoder import load_tower
from mgll_encoder.cli import main as mgll_encoder
from mgll_encoder.weights.foreign import FORMATS
from mllm_adapters import load_mllm
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tower(tmp_path_factory.mktemp("towers") / "vit")


def an_adapter(kind: type, base: Path, folder: Path) -> Path:
    """A LoRA on the queries, as PEFT saves it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(kind.from_pretrained(base), config).save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def merged(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command at the end of an error message writes; it is run in this process."""
    python, option, program, *names = shlex.split(line[line.index("python -c") :])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [option, *names])
    exec(compile(program, "<the command>", "exec"), {})
    return folder / names[-1]


def test_an_adapter_in_the_place_of_a_tower_is_told_with_the_command_that_merges_it(
    tower: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = an_adapter(CLIPVisionModel, tower, tmp_path / "vit-lora")
    swap = (swap_encoder, "--mllm", tiny_llava, "--encoder", adapter, "--out", tmp_path / "out")
    for command in ((mgll_encoder, "inspect", adapter), swap):
        line = builders.refused(*command)
        assert line.startswith(f"{adapter} contains a PEFT adapter (adapter_config.json)")
    whole = load_tower(merged(line, tmp_path, monkeypatch))
    assert whole.spec == load_tower(tower).spec, "with its preprocessing"
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(whole.model.get_parameter(name), load_tower(tower).model.get_parameter(name))
    line = builders.refused(mgll_encoder, "inspect", adapter / "adapter_model.safetensors")
    assert "a PEFT adapter without the tower" in line


def test_an_adapter_in_the_place_of_a_model_is_told_with_the_command_that_merges_it(
    tower: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = an_adapter(AutoModelForImageTextToText, tiny_llava, tmp_path / "llava-lora")
    line = builders.refused(swap_encoder, "--mllm", adapter, "--encoder", tower)
    assert line.startswith(f"{adapter} contains a PEFT adapter (adapter_config.json)")
    model, processor = load_mllm(merged(line, tmp_path, monkeypatch))
    assert processor is not None
    attached, _ = load_mllm(adapter)  # what eval-mcq run does with it
    for name, value in attached.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value)
    (tmp_path / "x.json").write_text("[]")
    for training in (retrain_projector, finetune_lora):
        line = builders.refused(
            training, "--model", adapter, "--data", tmp_path / "x.json", "--images", tmp_path
        )
        assert f"{adapter} is an adapter: train from its base, or merge it first" in line


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_of_other_programs_are_named(
    suffix: str, tower: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "folder", tmp_path / f"weights{suffix}"
    folder.mkdir()
    for place in (file, folder / file.name):
        place.write_bytes(b"weights of another program")
    what = FORMATS[suffix][0]
    for command in (
        (mgll_encoder, "inspect", file),
        (mgll_encoder, "inspect", folder),
        (swap_encoder, "--mllm", file, "--encoder", tower),
        (swap_encoder, "--mllm", folder, "--encoder", tower),
    ):
        assert f"{file.name} is {what}, which is not supported; " in builders.refused(*command)
    (folder / "config.json").write_bytes((tiny_llava / "config.json").read_bytes())
    line = builders.refused(swap_encoder, "--mllm", folder, "--encoder", tower)
    assert f"holds a config.json but no weights: {folder / file.name} is {what}" in line


def test_gguf_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert f"{file} is GGUF (llama.cpp)" in builders.refused(mgll_encoder, "inspect", file)


def test_weights_that_gptq_quantised_without_a_word_in_config_json_are_named(
    tower: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "llava-gptq")
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    line = builders.refused(swap_encoder, "--mllm", folder, "--encoder", tower)
    assert line.startswith(
        f"{folder / 'quantize_config.json'} is written by GPTQ or AWQ: quantized weights can"
    )
    assert "use the unquantized checkpoint" in line
