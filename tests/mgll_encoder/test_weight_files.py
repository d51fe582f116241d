"""Weight files in use: detected by content, with extra objects, averaged, sharded, or TorchScript."""

import argparse
import datetime
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mgll_encoder import inspect_tower, load_tower
from mgll_encoder.cli import main
from mgll_encoder.weights.weight_file import open_weights
from tests.builders import invoke, refused
from tests.mgll_encoder import towers
from tests.mgll_encoder.test_checkpoint import Bomb

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 1234567\n"


def state(shift: float = 0.0) -> dict[str, torch.Tensor]:
    return {name: value + shift for name, value in towers.state_of(towers.open_clip_model()).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(path: Path, **options: str) -> dict[str, torch.Tensor]:
    opened = open_weights(path, **options)
    return opened.read(opened.headers)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_whatever_it_is_called(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "tower.safetensors"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    assert same(everything(path), state())


def test_a_safetensors_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "tower.pt")
    assert same(everything(tmp_path / "tower.pt"), state())


def test_a_damaged_torch_file_called_safetensors_is_the_users_to_replace(tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    torch.save(state(), path)
    content = bytearray(path.read_bytes())
    content[200:400] = os.urandom(200)
    path.write_bytes(content)
    assert refused(main, "inspect", path).startswith(f"{path} is damaged or not a checkpoint (")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_keep_beside_the_weights_is_skipped(tmp_path: Path, zipped: bool) -> None:
    beside = {
        "best_acc": np.float64(0.83), "epoch": np.int64(3), "per_class": np.arange(3.0), "flag": np.bool_(True),
        "out": pathlib.PosixPath("/scratch/me"), "data": pathlib.PurePosixPath("x"), "when": datetime.datetime.now(),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("here")), "took": datetime.timedelta(seconds=3),
    }  # fmt: skip
    path = tmp_path / "tower.pt"
    torch.save({"state_dict": state(), **beside}, path, _use_new_zipfile_serialization=zipped)
    assert same(everything(path), state())
    assert open_weights(path).wrapper == {"state_dict", *beside}


def test_what_is_skipped_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the harmless functions named in the pickle are called."""
    path = tmp_path / "tower.pt"
    torch.save({"state_dict": state(), "when": datetime.timedelta(seconds=3), "best": np.float64(1)}, path)

    def never(*_: object) -> None:
        raise AssertionError("something was made of the pickle")

    monkeypatch.setattr("numpy._core.multiarray.scalar", never)
    monkeypatch.setattr("datetime.timedelta", never)
    assert same(everything(path), state())


def test_a_function_hidden_among_them_is_refused(tmp_path: Path) -> None:
    content = {
        "state_dict": state(),
        "best": np.float64(0.8),
        "args": argparse.Namespace(x=Bomb(tmp_path / "boom")),
    }
    torch.save(content, tmp_path / "tower.pt")
    assert "(posix.system); refused, nothing was run" in refused(main, "inspect", tmp_path / "tower.pt")
    assert not (tmp_path / "boom").exists()


def test_a_pointer_of_git_lfs_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tower.pt").write_text(POINTER)
    assert "is a Git LFS pointer" in refused(main, "inspect", tmp_path / "tower.pt")
    folder = tmp_path / "folder"
    towers.vision_model().save_pretrained(folder)
    (folder / "config.json").write_text(POINTER)
    message = refused(main, "inspect", folder)
    assert message.startswith(f"{folder}/config.json is a Git LFS pointer")
    assert "`git lfs pull`" in message


def test_a_shard_of_zero_3_is_named_with_the_command_that_consolidates(tmp_path: Path) -> None:
    """As DeepSpeed 0.15 writes ``zero_pp_rank_0_mp_rank_00_model_states.pt`` and its optimizer state."""
    empty = {f"module.{name}": torch.empty(0) for name in state()}
    shapes = [{name: value.shape for name, value in state().items()}]
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": empty, "param_shapes": shapes, "ds_version": "0.15.1"}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refused(main, "inspect", path)
    assert "ZeRO-3" in message
    assert "python zero_to_fp32.py" in message
    optimizer = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    flat = {"zero_stage": 3, "fp32_flat_groups": [torch.zeros(9)]}
    torch.save({"optimizer_state_dict": flat, "ds_version": "0.15.1"}, optimizer)
    assert "python zero_to_fp32.py" in refused(main, "inspect", optimizer)


def test_the_whole_model_states_of_zero_2_are_read(tmp_path: Path) -> None:
    shapes = [{name: value.shape for name, value in state().items()}]
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": state(), "param_shapes": shapes, "ds_version": "0.15.1"}, path)
    assert same(everything(path), state())


@pytest.mark.parametrize("wrapped", [False, True])
def test_of_two_sets_of_weights_the_user_decides(tmp_path: Path, wrapped: bool) -> None:
    average = {"module": state(1.0)} if wrapped else state(1.0)
    path = tmp_path / "tower.pt"
    torch.save({"state_dict": state(), "state_dict_ema": average, "epoch": 3}, path)
    assert same(everything(path), state())
    assert same(everything(path, weights="raw"), state())
    assert same(everything(path, weights="ema"), state(1.0))


def test_two_sets_of_weights_are_said_until_one_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "tower.pt"
    torch.save({"model": state(), "model_ema": state(1.0)}, path)
    said = "two sets of weights"
    assert any(said in warning for warning in inspect_tower(path).warnings)
    outcome = invoke(main, "inspect", path)
    assert said in outcome.err
    for chosen in ("raw", "ema"):
        outcome = invoke(main, "inspect", path, "--weights", chosen)
        assert outcome.code == 0
        assert said not in outcome.err
        assert f"{chosen} weights" in outcome.out
    averaged, raw = (load_tower(path, weights=chosen).model.state_dict() for chosen in ("ema", "raw"))
    assert not same(averaged, raw)
    assert "--weights" in refused(
        main, "inspect", towers.write(state(), tmp_path / "one.pt"), "--weights", "ema"
    )
    assert "--weights" in refused(main, "inspect", path, "--weights", "mean")


def scripted(path: Path) -> dict[str, torch.Tensor]:
    """A CLIP as published by OpenAI: a TorchScript archive, fp16, with a constant next to the weights."""
    model = towers.open_clip_model()
    model.register_buffer("input_resolution", torch.tensor(42))
    model.half()
    pixels, text = torch.zeros(1, 3, 42, 42).half(), torch.zeros(1, 8, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (pixels, text), check_trace=False).save(str(path))
    return towers.state_of(model)


def test_a_torchscript_archive_is_read_without_its_code(tmp_path: Path) -> None:
    path = tmp_path / "ViT-L-14.pt"
    expected = scripted(path)
    found = everything(path)
    assert {name: found[name] for name in expected}.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    header = inspect_tower(path)
    assert header.layout == "OpenAI state dict"
    assert header.spec.activation == "quick_gelu"


def edited(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as other:
        for info in archive.infolist():
            other.writestr(info, change(info.filename, archive.read(info)))
    return target


def test_an_archive_that_would_run_something_is_refused(tmp_path: Path) -> None:
    """Its code is not compiled, and its pickle cannot name a function."""
    scripted(tmp_path / "clip.pt")
    bomb = pickle.dumps(Bomb(tmp_path / "boom"), protocol=2)
    path = edited(
        tmp_path / "clip.pt",
        tmp_path / "bomb.pt",
        lambda name, content: bomb if name.endswith("/data.pkl") else content,
    )
    assert "(posix.system); refused, nothing was run" in refused(main, "inspect", path)
    path = edited(
        tmp_path / "clip.pt",
        tmp_path / "code.pt",
        lambda name, content: b"import nonsense" if name.endswith(".py") else content,
    )
    assert invoke(main, "inspect", path, "--activation", "quick_gelu").code == 0
    assert not (tmp_path / "boom").exists()


def test_an_archive_whose_tensors_do_not_have_their_size_is_refused(tmp_path: Path) -> None:
    scripted(tmp_path / "clip.pt")
    path = edited(
        tmp_path / "clip.pt",
        tmp_path / "cut.pt",
        lambda name, content: content[:4] if name.endswith("/data/0") else content,
    )
    assert "is damaged or not a checkpoint" in refused(main, "inspect", path)
