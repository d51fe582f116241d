"""Every packaged recipe is valid, fits a checkpoint of its family, and states its memory requirement.

``python -m tests.scripts.test_recipes`` updates the lines about memory.
"""

import re
import tempfile
from functools import cache
from pathlib import Path

import pytest

from mgll_encoder import inspect_tower
from mgll_encoder.common.deepspeed import read_deepspeed
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.registry import family, open_checkpoint
from mllm_adapters.training.memory import estimates
from mllm_adapters.training.recipe_file import resolve
from tests import builders
from tests.mllm_adapters import complete
from tests.mllm_adapters.families.full_size import published_tower
from tests.mllm_adapters.retraining import turns, write_json
from tests.mllm_adapters.test_support import PUBLISHED

SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPES = sorted((SCRIPTS / "recipes").rglob("*.yaml"))
FAMILIES = (
    "llava", "llava-med", "qwen-vl", "internvl", "mini-gemini", "instructblip", "med-flamingo", "janus-pro",
)  # fmt: skip
KINDS = ("projector", "lora", "qlora")
COMMANDS = {"projector": retrain_projector, "lora": finetune_lora, "qlora": finetune_lora}

BEGIN, END = "# memory", "#\n# one GPU"


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def test_all_eight_families_have_all_three_recipes() -> None:
    assert {name(file) for file in RECIPES} == {f"{f}/{kind}" for f in FAMILIES for kind in KINDS}
    assert len(RECIPES) == 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    builders.picture(folder / "images", "0.png")
    rows = [{"id": 0, "image": "0.png", "conversations": turns("<image>\nWhich?", "Glaucoma")}]
    return write_json(folder / "train.json", rows), folder / "images"


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory, golden: Path):
    """Family -> a tiny checkpoint of it with an MGLL tower."""
    folder = tmp_path_factory.mktemp("models")
    encoder = complete.encoder(folder / "mgll")

    @cache
    def make(of: str) -> Path:
        host = complete.BUILDERS[of](folder / of, lambda: golden)
        out = folder / f"{of}-mgll"
        done = builders.invoke(swap_encoder, "--mllm", host, "--encoder", encoder, "--out", out)
        assert done.code == 0, done.err
        return out

    return make


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_a_recipe_fits_a_checkpoint_of_its_family(file: Path, swapped, data, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="recipes name DeepSpeed's settings: pip install '.[train]'")
    pytest.importorskip("bitsandbytes", reason="qlora needs it: pip install '.[train]'")
    rows, images = data
    kind = file.stem
    shown = builders.invoke(
        COMMANDS[kind], "--recipe", file, "--model", swapped(file.parent.name), "--data", rows, "--images", images,
        "--out", tmp_path / "out", "--dry-run",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert f"Stage: {'projector' if kind == 'projector' else 'lora'}" in shown.out
    assert "Recipe:" in shown.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_a_recipe_explains_every_line_and_names_itself(file: Path) -> None:
    text = file.read_text()
    settings = [line for line in text.splitlines() if re.match(r"\w+:", line)]
    assert all("  # " in line for line in settings)
    keys = [line.partition(":")[0] for line in settings]
    assert len(keys) == len(set(keys))
    commands = re.findall(r"--recipe (\S+)", text)
    assert set(commands) == {f"scripts/recipes/{name(file)}.yaml"}


@pytest.mark.parametrize("file", sorted((SCRIPTS / "deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_deepspeeds_settings_leave_the_recipe_to_the_recipe(file: Path) -> None:
    pytest.importorskip("deepspeed")
    settings = read_deepspeed(file).model_dump(exclude_unset=True)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
    assert not {"optimizer", "scheduler"} & settings.keys()


def memory(file: Path, folder: Path) -> str:
    """The lines of a recipe's header about memory."""
    resolved = resolve(file)
    recipe = resolved.recipe
    of = file.parent.name
    if not (folder / of).exists():
        PUBLISHED[of](folder / of)
    if not (folder / "mgll").exists():
        published_tower(folder / "mgll")
    checkpoint, found, _ = open_checkpoint(folder / of)
    config = found.plan(checkpoint, inspect_tower(folder / "mgll", activation="gelu")).config
    lines = [
        f"# memory per device (mllm_adapters/training/memory.py) of {family(of).spec.hub_id} with an MGLL ViT-L/14, "
        f"all examples {recipe.max_length} tokens long:"
    ]
    for place, found_bytes in estimates(config, recipe, resolved.options).items():
        host = f" and {found_bytes.host / 1e9:.1f} GB of the host's" if found_bytes.host else ""
        lines.append(f"#   {place + ':':<27}{found_bytes.device / 1e9:6.1f} GB{host}")
    return "\n".join(lines) + "\n"


def parts(file: Path) -> tuple[str, str, str]:
    """A recipe before, in and after the lines about memory."""
    text = file.read_text()
    start, end = text.index(BEGIN), text.index(END)
    return text[:start], text[start:end], text[end:]


QUICK = ("llava/projector",)


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=() if name(f) in QUICK else pytest.mark.slow) for f in RECIPES],
    ids=map(name, RECIPES),
)
def test_a_recipe_says_what_it_takes_of_memory(file: Path, tmp_path: Path) -> None:
    assert parts(file)[1] == memory(file, tmp_path)


def write() -> None:
    """Update the lines about memory."""
    with tempfile.TemporaryDirectory() as folder:
        for file in RECIPES:
            before, _, after = parts(file)
            file.write_text(before + memory(file, Path(folder)) + after)


if __name__ == "__main__":
    write()
