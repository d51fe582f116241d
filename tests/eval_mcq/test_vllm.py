"""What ``--engine vllm`` refuses before anything is started; with vLLM itself: tests/clients/test_vllm.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from eval_mcq import run
from eval_mcq.backends.vllm_engine import PLACEMENT, VLLMModel, parse_options, vllm_python
from eval_mcq.backends.vllm_models import check_model
from eval_mcq.backends.vllm_process import VLLMProcess
from eval_mcq.backends.vllm_worker import split
from eval_mcq.cli.main import main
from mgll_encoder.common.errors import (
    InvalidArgumentError,
    MissingPackageError,
    NotFoundError,
    UnsupportedCheckpointError,
)
from tests.builders import refused
from tests.eval_mcq.helpers import small_bench


@pytest.fixture
def bench(tmp_path) -> Path:
    return small_bench(tmp_path)


def folder_of(tmp_path: Path, tower: str = "vision_tower.vision_model.", **config) -> Path:
    """A folder whose tower has this prefix."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{tower}embeddings.class_embedding": np.zeros(2)}, folder / "model.safetensors")
    return folder


def test_without_vllm_the_message_says_how_to_install_it_and_nothing_is_written(tmp_path, bench):
    folder = folder_of(tmp_path, model_type="llava")
    message = refused(
        main, "run", "--model", folder, "--bench", bench, "--engine", "vllm", "--out", tmp_path / "run"
    )
    assert "No module named 'vllm'" in message
    assert "pip install vllm" in message
    assert "--vllm-python vllm-env/bin/python" in message
    assert not (tmp_path / "run").exists()


def test_an_interpreter_that_is_none_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        VLLMProcess(tmp_path / "python")
    (tmp_path / "python").write_text("not a program")
    with pytest.raises(NotFoundError, match="cannot be run"):
        VLLMProcess(tmp_path / "python")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises((NotFoundError, MissingPackageError), match="cannot"):
        VLLMProcess(tmp_path / "python")


def test_the_interpreter_is_the_given_one_or_that_of_the_variable_or_this_one(monkeypatch):
    monkeypatch.delenv("MGLL_VLLM_PYTHON", raising=False)
    assert vllm_python() == Path(sys.executable)
    monkeypatch.setenv("MGLL_VLLM_PYTHON", "there/bin/python")
    assert vllm_python() == Path("there/bin/python")
    assert vllm_python("here/bin/python") == Path("here/bin/python")


def test_own_architectures_are_refused_with_the_way_out(tmp_path, bench):
    with pytest.raises(
        UnsupportedCheckpointError, match=r"'mgll_qwen2_vl', which vLLM does not have.*layout=llava"
    ):
        run(folder_of(tmp_path, model_type="mgll_qwen2_vl"), bench, tmp_path / "run", engine="vllm")


@pytest.mark.parametrize(
    ("kind", "reason"), [("aya_vision", "computes it otherwise.*33"), ("paligemma", "a SigLIP tower only")]
)
def test_a_model_that_was_tried_and_failed_is_refused(kind, reason, tmp_path, bench):
    with pytest.raises(
        UnsupportedCheckpointError, match=f"'{kind}': vLLM 0.32 .*{reason}.*leave `engine` out"
    ):
        run(folder_of(tmp_path, model_type=kind), bench, tmp_path / "run", engine="vllm")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "qwen2_5_vl"}, r"the architecture 'qwen2_5_vl' \(expected llava\)"),
        ({}, r"the architecture 'None'"),
        (
            {"model_type": "llava", "text_config": {"model_type": "gemma"}},
            r"text_config\.model_type 'gemma' .*llama",
        ),
        (
            {"model_type": "llava", "vision_config": {"model_type": "dinov2"}},
            r"vision_config\.model_type 'dinov2'",
        ),
    ],
)
def test_a_model_that_was_not_compared_is_refused_with_what_was(config, reason, tmp_path, bench):
    with pytest.raises(UnsupportedCheckpointError, match=reason + ".*not compared.*`endpoint`"):
        run(folder_of(tmp_path, **config), bench, tmp_path / "run", engine="vllm")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2", "qwen3"])
def test_llavas_that_were_compared_are_taken(language, tmp_path):
    check_model(folder_of(tmp_path, model_type="llava", text_config={"model_type": language}))
    check_model(folder_of(tmp_path, model_type="llava"))  # as transformers 4.36 wrote it


@pytest.mark.parametrize("tower", ["vision_tower.", "model.vision_tower."])
def test_a_tower_as_transformers_5_saves_it_is_refused(tower, tmp_path, bench):
    with pytest.raises(UnsupportedCheckpointError, match=r"saved by transformers 5.*put it in again"):
        run(folder_of(tmp_path, tower, model_type="llava"), bench, tmp_path / "run", engine="vllm")
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_refused(tmp_path, bench):
    base = folder_of(tmp_path, model_type="llava")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(UnsupportedCheckpointError, match=r"adapter.*merge it first"):
        run(adapter, bench, tmp_path / "run", engine="vllm")


def test_a_folder_without_a_model_is_refused(tmp_path, bench):
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        run(tmp_path, bench, tmp_path / "run", engine="vllm")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "generate"}, "`mode=letters`, not 'generate'"),
        ({"device": "cuda:1"}, "chooses its device itself"),
        ({"load_in_4bit": True}, "quantization=bitsandbytes"),
        ({"vllm_options": ["tensor_parallel_size"]}, "expected NAME=VALUE"),
        ({"vllm_options": ["max_num_seqs=1", "max-num-seqs=2"]}, "'max_num_seqs' twice"),
        ({"vllm_options": ["trust_remote_code=true"]}, "never run"),
        ({"vllm_options": ["data_parallel_size=2"]}, "`shard`"),
        ({"engine": "auto", "vllm_options": ["max_num_seqs=1"]}, "no effect without `engine=vllm`"),
        ({"engine": "auto", "vllm_python": "python"}, "no effect without `engine=vllm`"),
    ],
)
def test_what_has_no_meaning_for_vllm_is_refused(changes, reason, tmp_path, bench):
    folder = folder_of(tmp_path, model_type="llava")
    with pytest.raises(InvalidArgumentError, match=reason.replace("(", "\\(")):
        run(folder, bench, tmp_path / "run", **{"engine": "vllm", **changes})


def test_several_processes_are_refused(tmp_path, bench, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgumentError, match="starts its own processes"):
        run(folder_of(tmp_path, model_type="llava"), bench, tmp_path / "run", engine="vllm")


def test_values_of_options_are_json_or_text():
    given = ["tensor_parallel_size=2", "enforce-eager=true", "quantization=fp8", 'hf_overrides={"a": 1}']
    assert parse_options(given) == {
        "tensor_parallel_size": 2, "enforce_eager": True, "quantization": "fp8", "hf_overrides": {"a": 1}
    }  # fmt: skip


def test_where_it_computes_is_no_part_of_a_run_and_how_is(tmp_path):
    class Known(VLLMModel):
        """Its interpreter is not asked."""

        process = type(
            "Process", (), {"versions": dict.fromkeys(("vllm", "torch", "transformers", "device"), "1")}
        )

    folder = folder_of(tmp_path, model_type="llava")

    def sent(**options):
        return Known(folder, "letters", "auto", Path("python"), options).identity.backend

    assert sent() == sent(tensor_parallel_size=2, gpu_memory_utilization=0.5)
    assert sent() != sent(quantization="fp8")
    assert set(PLACEMENT).isdisjoint(
        {"quantization", "kv_cache_dtype", "hf_overrides", "mm_processor_kwargs"}
    )


def test_images_travel_as_they_are():
    from PIL import Image

    from eval_mcq.backends.vllm_process import _as_bytes

    images = [Image.effect_noise((3 + i, 5), 90).convert("RGB") for i in range(3)]
    sizes, data = _as_bytes(images)
    found, rest = split(sizes, data + b"pixels")
    assert [list(image.getdata()) for image in found] == [list(image.getdata()) for image in images]
    assert rest == b"pixels"


def test_the_process_hears_nothing_of_pythonpath(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('this is not vLLM')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingPackageError, match="No module named 'vllm'"):
        VLLMProcess(Path(sys.executable))
