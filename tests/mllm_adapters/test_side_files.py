"""Of a folder at work only the model goes into what is made of it: no table, no log, no token, no path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mgll_encoder.common.local_paths import without_local
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.loading.load import load_mllm
from tests.builders import Outcome, invoke
from tests.mgll_encoder import towers
from tests.mllm_adapters.retraining import color_rows, write_json

SECRET = "PLANTED"

PLANTED = (
    "patients.csv", "train.json", "hf_token", "wandb.log", "events.out.tfevents.1", "training.json", "notes.txt",
    "optimizer.pt", "config.json.bak", "tokenizer_patients.json", "run.yaml",
)  # fmt: skip


def plant(folder: Path) -> Path:
    """Put into a model folder what lies in folders at work, and paths into its configurations."""
    for name in PLANTED:
        (folder / name).write_text(json.dumps({"data": f"/home/{SECRET}/patients", "losses": []}))
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text(SECRET)
    (folder / "evil.py").write_text(f"# {SECRET}")
    (folder / "LICENSE").write_text("Apache-2.0")
    for name, fields in {
        "config.json": {
            "_name_or_path": f"/home/{SECRET}/llava",
            "auto_map": {"AutoModel": f"{SECRET}.Model"},
        },
        "tokenizer_config.json": {
            "name_or_path": f"C:\\Users\\{SECRET}\\llava",
            "special_tokens_map_file": f"/root/{SECRET}/map.json",
        },
        "generation_config.json": {"_from": f"~/{SECRET}/x"},
        "processor_config.json": {"image_processor": {"path": f"/a/{SECRET}/c"}},
    }.items():
        file = folder / name
        settings = json.loads(file.read_text()) if file.is_file() else {}
        nested = {
            k: v | settings.get(k, {}) if isinstance(v, dict) and k != "auto_map" else v
            for k, v in fields.items()
        }
        file.write_text(json.dumps({**settings, **nested}))
    return folder


def leaks(folder: Path, *also: str) -> list[str]:
    """Files of an output that hold what was planted, or a path of this machine."""
    wanted = [SECRET.encode(), *(text.encode() for text in also)]
    files = [file for file in folder.rglob("*") if file.is_file()]
    held = [file.name for file in files if any(text in file.read_bytes() for text in wanted)]
    return held + [file.name for file in files if file.name in PLANTED and file.name != "training.json"]


@pytest.fixture(scope="module")
def work(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tower, training rows and a base full of private files."""
    folder = tmp_path_factory.mktemp("work")
    towers.write(towers.state_of(towers.open_clip_model()), folder / "tower.pt")
    plant(Path(shutil.copytree(tiny_llava, folder / "base")))
    write_json(folder / "train.json", color_rows(folder / "images", 4))
    assert swap(folder, "swapped").code == 0
    return folder


def swap(work: Path, out: str, *options: object) -> Outcome:
    given = (
        "--mllm",
        work / "base",
        "--encoder",
        work / "tower.pt",
        "--activation",
        "gelu",
        "--out",
        work / out,
    )
    return invoke(swap_encoder, *given, *options)


def train(command: Callable[[], None], work: Path, model: str, out: str, *options: object) -> Outcome:
    given = (
        "--model",
        work / model,
        "--data",
        work / "train.json",
        "--images",
        work / "images",
        "--out",
        work / out,
    )
    return invoke(command, *given, "--max-steps", 1, "--workers", 0, "--report-to", "none", *options)


COMMANDS: dict[str, Callable[[Path], Outcome]] = {
    "swap": lambda work: swap(work, "swap"),
    "delta": lambda work: swap(work, "delta", "--delta-only"),
    "retrain": lambda work: train(retrain_projector, work, "base", "retrain"),
    "merge": lambda work: train(finetune_lora, work, "base", "adapter", "--merge"),
    "restore": lambda work: invoke(
        swap_encoder, "restore", work / "swapped", "--mllm", work / "base", "--out", work / "restore"
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_made_of_a_folder_holds_nothing_private(work: Path, name: str) -> None:
    outcome = COMMANDS[name](work)
    assert outcome.code == 0, outcome.err
    outs = [work / "adapter", work / "adapter-merged"] if name == "merge" else [work / name]
    for out in outs:
        assert not leaks(out, str(work))
    said = [line for line in outcome.err.splitlines() if "not copied from" in line]
    assert len(said) == 1
    for left in ("patients.csv", "hf_token", "runs/"):
        assert left in said[0]
    if name != "delta":
        assert (outs[-1] / "LICENSE").read_text() == "Apache-2.0"
        load_mllm(outs[-1])


def test_what_is_put_into_a_swap_later_goes_into_nothing_that_is_made_of_it(work: Path) -> None:
    folder = Path(shutil.copytree(work / "swapped", work / "later"))
    for name in PLANTED:
        (folder / name).write_text(SECRET)
    extracted = invoke(swap_encoder, "extract", folder, "--mllm", work / "base", "--out", work / "extracted")
    assert extracted.code == 0, extracted.err
    assert not leaks(work / "extracted", str(work))
    composed = invoke(swap_encoder, "compose", "--delta", work / "extracted", "--out", work / "composed")
    assert composed.code == 0, composed.err
    assert not leaks(work / "composed", str(work))
    assert train(retrain_projector, work, "later", "trained").code == 0
    assert not leaks(work / "trained", str(work))
    verified = invoke(swap_encoder, "verify", work / "trained", "--quick")
    assert verified.code == 0, verified.out


def test_the_record_of_a_training_goes_along_and_says_no_path(work: Path) -> None:
    assert train(retrain_projector, work, "swapped", "once").code == 0
    assert train(retrain_projector, work, "once", "twice").code == 0
    record = json.loads((work / "twice" / "training.json").read_text())
    assert record["source"] == "once"
    assert record["data"] == ["train.json"]


def test_paths_become_names_and_texts_stay() -> None:
    cache = "/home/me/.cache/huggingface/hub/models--org--llava/snapshots/0123abcd"
    settings = {
        "_name_or_path": cache, "mm_vision_tower": "/scratch/me/clip-vit-large/", "auto_map": {"AutoConfig": "x.Y"},
        "hub": "org/name", "chat_template": "/a/b", "added_tokens_decoder": {"3": {"content": "/x/y"}},
        "text_config": {"vocab_file": r"D:\me\vocab.json", "rate": 0.1}, "list": ["/a/b/c", 3], "slash": "/",
    }  # fmt: skip
    assert without_local(settings) == {
        "_name_or_path": "org/llava", "mm_vision_tower": "clip-vit-large", "hub": "org/name", "chat_template": "/a/b",
        "added_tokens_decoder": {"3": {"content": "/x/y"}}, "text_config": {"vocab_file": "vocab.json", "rate": 0.1},
        "list": ["c", 3], "slash": "/",
    }  # fmt: skip


def test_an_adapter_beside_its_base_names_it_without_a_path(work: Path) -> None:
    assert train(finetune_lora, work, "swapped", "tuned").code == 0
    assert not leaks(work / "tuned", str(work))
    model, _ = load_mllm(work / "tuned")
    assert isinstance(model, torch.nn.Module)
