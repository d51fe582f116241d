"""From the hub and to it, against a hub on this machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mgll_encoder import inspect_tower, load_tower
from mgll_encoder.cli import main as mgll_encoder
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.phantom.dataset import write_phantom
from mllm_adapters.cli.swap import main
from mllm_adapters.swap.verify import Verification
from tests.builders import invoke, refused
from tests.mllm_adapters.fake_hub import FakeHub, serving
from tests.mllm_adapters.llava_checkpoints import a_tower

UNWANTED = (
    "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
    "consolidated.00.pth", "optimizer.pt", "training_args.bin", "onnx/model.onnx",
)  # fmt: skip


@contextmanager
def reached(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A hub with the files of a folder and some that nobody reads, in the place of huggingface.co."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with serving(files | dict.fromkeys(UNWANTED, b"much")) as server:
        address = server.url
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


@pytest.fixture
def hub(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with reached(tiny_llava, monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return a_tower(tmp_path / "mgll")


def test_a_model_on_the_hub_is_swapped_and_only_what_is_needed_is_downloaded(
    hub: FakeHub, tower: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = invoke(main, "--mllm", "org/model", "--encoder", tower, "--out", out)
    assert outcome.code == 0, outcome.err
    assert sorted(hub.asked) == sorted(file.name for file in tiny_llava.iterdir())
    assert "base_model: org/model" in (out / "README.md").read_text()
    checks = {check.name: check for check in Verification(out).checks(quick=True)}
    assert all(checks[name].passed for name in ("files", "tensors", "tower", "plan", "loading")), checks

    asked = list(hub.asked)
    outcome = invoke(main, "--mllm", "org/model", "--encoder", tower, "--out", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    assert hub.asked == asked, "the second time it is there"


def test_an_interrupted_download_is_completed(hub: FakeHub, tower: Path, tmp_path: Path) -> None:
    assert invoke(main, "--mllm", "org/model", "--encoder", tower, "--out", tmp_path / "one").code == 0
    (snapshot,) = (tmp_path / "cache").glob("models--org--model/snapshots/*")
    (snapshot / "model.safetensors").resolve().unlink()
    (snapshot / "model.safetensors").unlink()
    hub.asked.clear()
    assert invoke(main, "--mllm", "org/model", "--encoder", tower, "--out", tmp_path / "two").code == 0
    assert hub.asked == ["model.safetensors"]


def test_weights_that_are_there_in_bin_only_are_downloaded(
    hub: FakeHub, tower: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    for name in (*UNWANTED[:2], "model.safetensors"):
        del hub.files[name]
    torch.save(load_file(tiny_llava / "model.safetensors"), tmp_path / "weights")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    outcome = invoke(main, "--mllm", "org/model", "--encoder", tower, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "pytorch_model.bin" in hub.asked


def test_what_is_not_read_is_refused_before_its_weights_are_downloaded(
    hub: FakeHub, tower: Path, tmp_path: Path
) -> None:
    hub.files["config.json"] = (
        b'{"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}'
    )
    message = refused(main, "--mllm", "org/medgemma", "--encoder", tower, "--out", tmp_path / "out")
    assert message.startswith("org/medgemma/config.json (model_type 'gemma3'")
    assert "MedGemma are not supported" in message
    assert hub.asked == ["config.json"]


def test_a_tower_on_the_hub_is_read_by_every_command_that_takes_one(
    tiny_llava: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with reached(tower, monkeypatch, tmp_path / "cache") as hub:
        inspected = invoke(mgll_encoder, "inspect", "org/vit", "--json")
        assert inspected.code == 0, inspected.err
        assert json.loads(inspected.out)["width"] == inspect_tower(tower).spec.width
        assert sorted(hub.asked) == sorted(file.name for file in tower.iterdir())
        swapped = invoke(main, "--mllm", tiny_llava, "--encoder", "org/vit")
        assert swapped.code == 0, swapped.err
        assert sorted(hub.asked) == sorted(file.name for file in tower.iterdir()), "it is there already"
    out = tmp_path / f"{tiny_llava.name}-vit"
    record = json.loads((out / "mgll_swap.json").read_text())
    assert record["inputs"]["tower"]["hub_id"] == "org/vit"
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # it has to be in the cache
    verified = invoke(main, "verify", out, "--encoder", "org/vit", "--quick")
    assert verified.code == 0, verified.err
    assert invoke(mgll_encoder, "convert", "org/vit", "--out", tmp_path / "converted").code == 0
    assert load_tower("org/vit").header.spec == load_tower(tmp_path / "converted").header.spec


def test_a_tower_that_is_neither_here_nor_reachable_says_what_to_do(
    hub: FakeHub, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for command in (
        (mgll_encoder, "inspect", "org/other"),
        (mgll_encoder, "probe", "--encoder", "org/other", "--labels", "labels.csv", "--images", tmp_path),
        (main, "--mllm", tiny_llava, "--encoder", "org/other"),
        (main, "--mllm", tiny_llava, "--encoder", "org/other", "--part", "vision-tower=org/other"),
    ):
        message = refused(*command)
        assert "'org/other' is not a local file or folder, is not in the Hugging Face cache" in message or (
            "labels.csv" in message
        )
    (tmp_path / "towers").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "towers/mgll does not exist: check the path" in refused(mgll_encoder, "inspect", "towers/mgll")
    assert "runs/mgll.pt does not exist: check the path" in refused(mgll_encoder, "inspect", "runs/mgll.pt")


def test_another_kind_of_tower_is_refused_before_its_weights_are_downloaded(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files["config.json"] = b'{"model_type": "siglip2"}'
    assert "a NaFlex SigLIP 2, whose images keep their aspect ratio" in refused(
        mgll_encoder, "inspect", "org/siglip"
    )
    write_phantom(tmp_path / "set", 2, image_size=32)
    manifest = tmp_path / "manifest.jsonl"
    build_fundus(FundusTable(tmp_path / "set" / "labels.csv"), tmp_path / "set", manifest)
    training = ("pretrain", "--manifest", manifest, "--init", "org/siglip", "--out", tmp_path / "tower")
    assert "a NaFlex SigLIP 2, whose images keep their aspect ratio" in refused(mgll_encoder, *training)
    assert set(hub.asked) == {"config.json"}


def test_the_result_is_pushed_in_one_commit(
    hub: FakeHub, tower: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    hub.files.clear()
    out = tmp_path / "out"
    given = (
        "--mllm",
        tiny_llava,
        "--encoder",
        tower,
        "--out",
        out,
        "--push-to-hub",
        "org/model",
        "--private",
    )
    outcome = invoke(main, *given)
    assert outcome.code == 0, outcome.err
    assert f"Pushed: {hub.url}/org/model/commit/" in outcome.out
    assert hub.created[0]["name"] == "model"
    assert hub.created[0]["visibility"] == "private"
    assert hub.commits == ["Upload out"]
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_cannot_be_pushed_is_told_before_the_work(
    hub: FakeHub, tower: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--mllm", tiny_llava, "--encoder", tower, "--out", tmp_path / "out")
    assert "--private requires --push-to-hub" in refused(main, *given, "--private")
    assert "--push-to-hub a/b/c" in refused(main, *given, "--push-to-hub", "a/b/c")
    assert "expected OWNER/NAME" in refused(main, *given, "--push-to-hub", "model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "nobody is logged in" in refused(main, *given, "--push-to-hub", "org/model")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_leaves_the_folder_and_says_how_to_go_on(
    hub: FakeHub, tower: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    out = tmp_path / "out"
    message = refused(
        main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--push-to-hub", "org/model"
    )
    assert f"{out} is complete, but could not be pushed to org/model" in message
    assert f"`hf upload org/model {out}`" in message
    assert (out / "config.json").is_file()
    message = refused(main, "--mllm", "org/other", "--encoder", tower, "--out", tmp_path / "other")
    assert (
        "'org/other' is not a local file or folder, is not in the Hugging Face cache, and cannot be downloaded"
        in message
    )
