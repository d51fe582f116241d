"""Weight files of multimodal LLMs are told by their content: shards, adapters and deltas under the wrong name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters.cli.swap import main
from mllm_adapters.core.provenance import read_record
from mllm_adapters.loading.delta import DELTA_WEIGHTS
from mllm_adapters.loading.load import load_mllm
from tests.builders import invoke, refused
from tests.mgll_encoder import towers


def as_torch_file(file: Path) -> None:
    """Replace a safetensors file by one of torch.save, under the same name (not in place: it may be mapped)."""
    torch.save(load_file(file), file.with_name("new"))
    file.with_name("new").replace(file)


def mislabeled(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose model.safetensors is a file of torch.save."""
    shutil.copytree(source, folder)
    as_torch_file(folder / "model.safetensors")
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.write(towers.state_of(towers.open_clip_model()), tmp_path_factory.mktemp("t") / "tower.pt")


def swap(mllm: Path, encoder: Path, out: Path, *options: object) -> Path:
    done = invoke(main, "--mllm", mllm, "--encoder", encoder, "--activation", "gelu", "--out", out, *options)
    assert done.code == 0, done.err
    return out


def test_a_torch_file_called_safetensors_is_loaded_and_swapped(
    tiny_llava: Path, tmp_path: Path, tower: Path
) -> None:
    wrong = mislabeled(tiny_llava, tmp_path / "wrong")
    right, _ = load_mllm(tiny_llava)
    assert same(load_mllm(wrong)[0], right)
    swapped, _ = load_mllm(swap(wrong, tower, tmp_path / "swapped"))
    expected, _ = load_mllm(swap(tiny_llava, tower, tmp_path / "expected"))
    assert same(swapped, expected)
    checked = invoke(main, "verify", tmp_path / "swapped", "--mllm", wrong)
    assert checked.code == 0, checked.out + checked.err


def test_a_safetensors_file_called_bin_is_loaded_and_swapped(
    tiny_llava: Path, tmp_path: Path, tower: Path
) -> None:
    wrong = Path(shutil.copytree(tiny_llava, tmp_path / "wrong"))
    (wrong / "model.safetensors").rename(wrong / "pytorch_model.bin")
    right, _ = load_mllm(tiny_llava)
    assert same(load_mllm(wrong)[0], right)
    swapped, _ = load_mllm(swap(wrong, tower, tmp_path / "swapped"))
    expected, _ = load_mllm(swap(tiny_llava, tower, tmp_path / "expected"))
    assert same(swapped, expected)


def test_a_delta_whose_weights_are_a_torch_file_is_composed(
    tiny_llava: Path, tmp_path: Path, tower: Path
) -> None:
    base = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    delta = swap(base, tower, tmp_path / "delta", "--delta-only")
    expected, _ = load_mllm(delta)
    as_torch_file(delta / DELTA_WEIGHTS)
    assert same(load_mllm(delta)[0], expected)


def test_a_moving_average_goes_into_the_swap_where_it_is_asked_for(tiny_llava: Path, tmp_path: Path) -> None:
    raw = towers.state_of(towers.open_clip_model())
    average = {name: value + 0.5 for name, value in raw.items()}
    both, alone = tmp_path / "both.pt", tmp_path / "alone.pt"
    torch.save({"state_dict": raw, "state_dict_ema": average}, both)
    torch.save({"state_dict": average}, alone)
    unsaid = invoke(main, "--mllm", tiny_llava, "--encoder", both, "--activation", "gelu", "--dry-run")
    assert "two sets of weights" in unsaid.err
    out = swap(tiny_llava, both, tmp_path / "out", "--weights", "ema")
    assert read_record(out).plan["tower_weights"] == "ema"
    assert same(load_mllm(out)[0], load_mllm(swap(tiny_llava, alone, tmp_path / "expected"))[0])


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def lora(base: Path, folder: Path, **settings: object) -> Path:
    """An adapter of the two query projections of the tiny LLaVA's language model."""
    folder.mkdir()
    config = {**LORA, "base_model_name_or_path": str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layers = [
        name.removesuffix(".weight")
        for name, _ in load_mllm(base)[0].named_parameters()
        if name.endswith("q_proj.weight")
    ]
    tensors = {}
    for layer in layers:
        width = 48 if "language_model" in layer else 32
        for part, shape in {"A": (2, width), "B": (width, 2)}.items():
            tensors[f"base_model.model.{layer}.lora_{part}.weight"] = torch.randn(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_whose_weights_are_a_torch_file_is_merged(tiny_llava: Path, tmp_path: Path) -> None:
    folder = lora(tiny_llava, tmp_path / "adapter")
    expected, _ = load_mllm(folder)
    as_torch_file(folder / "adapter_model.safetensors")
    assert same(load_mllm(folder)[0], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"params_dtype": "float32"}, "megatron_core": "evil"},
        {"corda_config": {"cache_file": "x"}},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_an_adapter_that_would_have_peft_import_or_compute_something_is_refused(
    tiny_llava: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    folder = lora(tiny_llava, tmp_path / "adapter", **settings)
    with pytest.raises(
        UnsupportedCheckpointError, match=rf"adapter_config\.json: field '{next(iter(settings))}'"
    ):
        load_mllm(folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"architectures": ["LlavaForConditionalGeneration", {}]},
        {"architectures": {"a": 1}},
        {"model_type": ["llava"]},
    ],
)
def test_a_configuration_of_other_types_is_refused_by_its_field(
    tiny_llava: Path, tmp_path: Path, damage: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(UnsupportedCheckpointError, match=f"field '{next(iter(damage))}'"):
        load_mllm(folder)


def test_a_record_with_a_damaged_plan_is_refused_by_its_field(
    tiny_llava: Path, tmp_path: Path, tower: Path
) -> None:
    out = swap(tiny_llava, tower, tmp_path / "out")
    file = out / "mgll_swap.json"
    content = json.loads(file.read_text())
    del content["plan"]["before"]["mean"][2]
    file.write_text(json.dumps(content))
    assert "field 'plan.before.mean.2'" in refused(main, "verify", out, "--quick")
