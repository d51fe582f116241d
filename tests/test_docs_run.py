"""Somebody types the lines of README and of the how-to pages, one after the other, and runs the examples.

In a folder with files of the names that the pages use, on toy models and drawn pictures. What needs several GPUs, the
hub or hours is named in `ELSEWHERE` with its reason; such lines are parsed by `test_docs_commands.py`.
"""

import json
import runpy
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mgll_encoder.common.progress import show_with
from mgll_encoder.data.phantom.dataset import write_phantom
from mllm_adapters.examples.untrained import write_example
from tests import builders
from tests.documents import COMMANDS, Line, commands_of
from tests.environments import ROOT
from tests.mgll_encoder.radiographs import radiograph
from tests.mllm_adapters.llava_checkpoints import a_tower

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
GUIDES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]

ELSEWHERE = {
    "cuda": "a GPU",
    "torchrun": "several GPUs; launchers are run on two processes by tests/scripts/test_launchers.py",
    "--push-to-hub": "the hub; uploads are tested by tests/mllm_adapters/test_hub.py",
    "openai": "the hub: OpenAI's CLIP",
    "openai/clip-vit-large-patch14": "the hub: OpenAI's CLIP",
    "facebook/dinov2-small": "the hub",
    "microsoft/llava-med-v1.5-mistral-7b": "the hub: a checkpoint in its original layout; test_llava_original.py",
    "janus-pro": "the hub: the published Janus-Pro; tests/mllm_adapters/test_janus_pro.py",
    "gmai": "GMAI-MMBench; tests/eval_mcq/test_interchange.py",
    "scripts/run_table.sh": "an hour; tests/scripts/test_run_table.py",
}
"""A word of a line -> why the line is not run here."""

PROGRAMS = {"make", "git", "python", "python3", "pip", "source", "cd"}
"""What sets up or tests the project: `make test` and `make demo` are run as such."""

BRIEF = {
    "retrain-projector": ["max_steps=2", "per_device_train_batch_size=4"],
    "finetune-lora": ["max_steps=2", "per_device_train_batch_size=4"],
}
"""What shortens a line of a guide that names no number of steps."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A reader's files, under the names of the pages."""
    place = tmp_path_factory.mktemp("reader")
    write_phantom(place / "drawn", 6)
    labels = pd.read_csv(place / "drawn" / "labels.csv").rename(columns={"patient_or_source_id": "patient"})
    labels["file"] = labels["file"].str.removeprefix("images/")
    (place / "drawn" / "images").rename(place / "images")
    labels.to_csv(place / "labels.csv", index=False)
    labels.to_csv(place / "old.csv", index=False, encoding="cp1252")
    with pd.ExcelWriter(place / "study.xlsx") as book:
        pd.DataFrame({"about": ["legend"]}).to_excel(book, sheet_name="Legend", index=False)
        labels.to_excel(book, sheet_name="Data", index=False)
    findings = labels[["file", "patient"]].copy()
    for name in ("cataract", "glaucoma", "myopia", "normal"):
        findings[name] = labels["labels"].str.split(";").map(lambda found, name=name: int(name in found))
    findings.loc[findings.index[0], "cataract"] = -1
    findings.to_csv(place / "findings.csv", index=False)
    shutil.rmtree(place / "drawn")
    example = write_example(place / "made")
    shutil.copytree(example / "llava", place / "llava-med")
    (example / "photographs").rename(place / "photographs")
    shutil.rmtree(example)
    shutil.copy(golden / "mgll_official" / "checkpoint_best.pth", place / "mgll-fundus.pt")
    a_tower(place / "mgll-fundus")
    official = torch.load(place / "mgll-fundus.pt", map_location="cpu", weights_only=False)
    torch.save({**official, "model_ema": official["model"]}, place / "checkpoint.pt")
    images = sorted(file.name for file in (place / "images").iterdir())[:8]
    rows = [
        {"id": name, "image": name, "conversations": [
            {"from": "human", "value": "<image>\nWhich disease does this photograph show?"},
            {"from": "gpt", "value": "Glaucoma."}]}
        for name in images
    ]  # fmt: skip
    (place / "train.json").write_text(json.dumps(rows))
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 4096, (64, 64)).astype(np.uint16)
        radiograph(place / "dicom" / f"patient{number}" / "1.dcm", pixels)
    for command in (
        "mgll-encoder data fundus --labels labels.csv --images images --out captions.jsonl",
        "eval-mcq build --labels labels.csv --images images --min-negatives 1 --out train-bench.jsonl",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            done = run(tuple(command.split()))
            assert done.code == 0, done
    return place


def main_of(name: str) -> Callable[[], None]:
    """The function behind a command."""
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(module), function)


def run(words: tuple[str, ...]) -> builders.Outcome:
    """Run one of our commands in this process."""
    return builders.invoke(main_of(words[0]), *words[1:])


def why_not(line: Line) -> str | None:
    """Why a line is not run here; None if it is."""
    return next((reason for word, reason in ELSEWHERE.items() if word in line.words), None)


def typed(words: tuple[str, ...]) -> tuple[str, ...]:
    """A line as it is run here: trainings without a number of steps take two."""
    brief = BRIEF.get(words[0], [])
    return words if "--max-steps" in words else (*words, *brief)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_lines_of_a_guide_run_in_order(
    page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "reader"
    shutil.copytree(files, place)
    (place / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(place)
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    ran = 0
    for line in commands_of(page):
        if line.words[0] in PROGRAMS or why_not(line):
            continue
        done = run(typed(line.words))
        assert done.code == 0, f"{line}\n{done.out[-1500:]}\n{done.err[-1500:]}"
        assert "deprecated" not in done.err, line
        ran += 1
    assert ran >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    try:
        runpy.run_path(str(example), run_name="__main__")
    finally:
        show_with(None)
    assert list(tmp_path.glob(f"{example.stem}_*"))


def test_what_is_not_run_is_really_on_a_page() -> None:
    """A reason that no line needs any more goes."""
    words = {word for page in GUIDES for line in commands_of(page) for word in line.words}
    assert set(ELSEWHERE) <= words
