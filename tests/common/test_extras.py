"""Missing optional packages and incompatible versions: reported in one line before work begins."""

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.common.errors import MissingPackageError
from mgll_encoder.common.extras import CORE, needs, require
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from tests import environments
from tests.builders import picture, refused

COMMANDS = {
    "swap-encoder": "mllm_adapters.cli.swap:main",
    "mgll-encoder": "mgll_encoder.cli:main",
    "retrain-projector": "mllm_adapters.cli.retrain:main",
    "finetune-lora": "mllm_adapters.cli.lora:main",
    "eval-mcq": "eval_mcq.cli.main:main",
}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pip install mgll-mllm``, without any extra."""
    return environments.environment(tmp_path_factory.mktemp("environments") / "core")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_without_any_extra(core: Path, name: str) -> None:
    done = environments.command(core, COMMANDS[name], "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("mgll-encoder pretrain --manifest m.jsonl --out o", "pretrain"),
        ("mgll-encoder data phantom --out o", "pretrain"),
        ("mgll-encoder data xray --dicom d --out o", "dicom"),
        ("mgll-encoder probe --encoder e --labels l.csv --images i", "probe"),
        ("mgll-encoder zero-shot --encoder e --labels l.csv --images i", "probe"),
        ("mgll-encoder explain --encoder e --images i --out o", "probe"),
        ("swap-encoder export m --gguf o", "gguf"),
        ("retrain-projector --model m --data t.json", "train"),
        ("finetune-lora --model m --data t.json", "train"),
        ("eval-mcq build --labels l.csv --images i --out b.jsonl", "eval"),
        ("eval-mcq run --model m --bench b.jsonl", "eval"),
        ("eval-mcq table r", "eval"),
        ("eval-mcq report r --out r.html", "report"),
    ],
)
def test_a_missing_extra_is_told_with_the_command_that_installs_it(core: Path, line: str, extra: str) -> None:
    name, *arguments = line.split()
    done = environments.command(core, COMMANDS[name], *arguments)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        rf"error: this command needs [\w, -]+, not installed here: pip install 'mgll-mllm\[{extra}\]'\n",
        done.stderr,
    )


def test_the_core_swaps_aligns_verifies_and_loads(
    core: Path, golden: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    """In one process, since importing torch is what takes the time."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        picture(pictures, f"{i}.png", (25 * i, 200 - 20 * i, 40))
    script = """
import sys
sys.argv[0] = "swap-encoder"
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
mllm, encoder, pictures, out = sys.argv[1:]
for line in (
    ["--mllm", mllm, "--encoder", encoder, "--out", out, "--align", pictures],
    ["verify", out, "--encoder", encoder],
    ["--mllm", mllm, "--encoder", encoder, "--out", out + "-delta", "--delta-only"],
):
    sys.argv[1:] = line
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
for model, processor in (load_mllm(out), load_mllm(mllm, delta=out + "-delta")):
    print(type(model).__name__, type(processor).__name__)
"""
    encoder = golden / "mgll_official" / "checkpoint_best.pth"
    done = environments.python(core, "-c", script, tiny_llava, encoder, pictures, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LlavaForConditionalGeneration LlavaProcessor") == 2


def test_a_first_swap_needs_nothing_but_the_core(core: Path, tmp_path: Path) -> None:
    """The three commands of the README, as they are typed, with an example that comes with the package."""
    lines = [
        "example --out example",
        "--mllm example/llava --encoder example/tower --align example/photographs --out example/swapped",
        "verify example/swapped --encoder example/tower",
    ]
    for line in lines:
        done = environments.command(core, COMMANDS["swap-encoder"], *line.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout + done.stderr
        if line.startswith("example"):
            assert done.stderr.startswith("writing a toy model")
        if "--align" in line:
            following = done.stdout.split("Next: ")[1].split()
            named = [word for word in following if word.startswith("example/")]
            assert named == ["example/swapped", "example/train.json", "example/photographs"]
            assert all((tmp_path / word).exists() for word in named), "the path does not dead-end"
    assert (tmp_path / "example" / "swapped" / "mgll_swap.json").is_file()
    again = environments.command(core, COMMANDS["swap-encoder"], *lines[0].split(), cwd=tmp_path)
    assert again.returncode == 2
    assert "example exists" in again.stderr


def test_a_torchvision_of_another_torch_is_named_and_no_checkpoint_is_blamed(
    tmp_path: Path, tiny_llava: Path, golden: Path
) -> None:
    """torch for CPUs with the torchvision for CUDA: `--align` said that config.json cannot be used."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for number in range(12):
        picture(tmp_path / "pictures", f"{number}.png", (20 * number, 90, 200 - 20 * number))
    encoder = golden / "mgll_official" / "checkpoint_best.pth"
    line = [
        "--mllm",
        tiny_llava,
        "--encoder",
        encoder,
        "--align",
        tmp_path / "pictures",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from mllm_adapters.cli.swap import main; main()", *map(str, line)],
        capture_output=True, text=True, timeout=240, cwd=environments.ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{environments.ROOT}"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert re.search(r"torch \S+ and torchvision \S+ do not fit each other", said)
    assert "pip install --force-reinstall torch torchvision" in done.stderr
    assert "config.json" not in done.stderr


def test_every_package_that_is_imported_is_asked_for() -> None:
    """By the core or by an extra; a package that is only an indirect dependency may disappear."""
    asked = {
        re.sub(r"[-_.]+", "-", one.name).lower()
        for extra in (metadata.metadata(environments.PACKAGE).get_all("Provides-Extra") or ())
        if extra not in ("dev", "test")
        for one in environments.requirements(environments.PACKAGE, extra)
    }
    homes = metadata.packages_distributions()
    imported: dict[str, Path] = {}
    for package in ("mgll_encoder", "mllm_adapters", "eval_mcq"):
        for file in (environments.ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= dict.fromkeys((name.partition(".")[0] for name in names), file)
    ours = {"mgll_encoder", "mllm_adapters", "eval_mcq"}
    imported.pop("vllm")  # by a worker in an interpreter of its own
    foreign = {name: file for name, file in imported.items() if name not in sys.stdlib_module_names | ours}
    astray = {
        name: str(file)
        for name, file in foreign.items()
        if not asked & {re.sub(r"[-_.]+", "-", home).lower() for home in homes.get(name, [name])}
    }
    assert astray == {}
    assert {"torch", "peft", "captum", "pyarrow"} <= set(foreign)


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fakes installed versions of packages through their metadata; everything else is real."""

    def install(requires: str = "", **found: str) -> None:
        for name, version in found.items():
            lines = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            environments.installed(tmp_path / "older", name, version, lines + requires)
        monkeypatch.syspath_prepend(tmp_path / "older")

    return install


def test_an_adapter_library_too_old_for_transformers_is_told_before_a_model_is_looked_for(versions) -> None:
    versions(peft="0.19.1")
    said = refused(finetune_lora, "--model", "nope", "--data", "t.json")
    assert re.fullmatch(
        r"transformers \S+ needs peft>=\S+, but 0\.19\.1 is installed: pip install 'mgll-mllm\[train\]'", said
    )
    assert said == refused(retrain_projector, "--model", "nope", "--data", "t.json")


def test_what_an_older_setuptools_left_in_the_working_folder_hides_nothing(
    versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "mgll_mllm.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: mgll-mllm\nVersion: 0.0.1\n")
    versions(peft="0.19.1")
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(finetune_lora, "--model", "nope", "--data", "t.json")
    assert said.endswith("but 0.19.1 is installed: pip install 'mgll-mllm[train]'")


def test_training_in_four_bits_needs_the_quantizers_version(versions, tmp_path: Path) -> None:
    versions(bitsandbytes="0.40.0")
    expected = r"transformers \S+ needs bitsandbytes>=\S+, but 0\.40\.0 is installed: pip install 'mgll-mllm\[qlora\]'"
    assert re.fullmatch(expected, refused(finetune_lora, "--model", "nope", "--data", "t.json", "--qlora"))
    assert re.fullmatch(
        expected, refused(eval_mcq, "run", "--model", "nope", "--bench", "b.jsonl", "--load-in-4bit")
    )


def test_deepspeed_too_old_for_transformers_is_told_when_a_recipe_names_its_settings(
    versions, tmp_path: Path
) -> None:
    versions(deepspeed="0.9.0")
    (tmp_path / "zero.json").write_text("{}")
    said = refused(
        finetune_lora, "--model", "nope", "--data", "t.json", "--deepspeed", tmp_path / "zero.json"
    )
    assert re.fullmatch(
        r"transformers \S+ needs deepspeed>=\S+, but 0\.9\.0 is installed: pip install 'mgll-mllm\[deepspeed\]'",
        said,
    )


def test_a_torch_that_torchvision_was_not_built_for_stops_a_swap_before_it_begins(versions) -> None:
    versions(torch="2.7.0")
    said = refused(swap_encoder, "--mllm", "llava", "--encoder", "tower.pt")
    assert re.fullmatch(
        r"torchvision \S+ needs torch\S+, but 2\.7\.0 is installed: pip install mgll-mllm", said
    )


def test_a_pair_within_our_ranges_is_mended_by_the_version_that_is_asked_for(versions) -> None:
    """If both versions satisfy our ranges, reinstalling this package would change nothing."""
    versions("Requires-Dist: accelerate>=1.99\n", peft=metadata.version("peft"))
    mended = r"peft \S+ needs accelerate>=1\.99, but \S+ is installed: pip install 'accelerate>=1\.99'$"
    with pytest.raises(MissingPackageError, match=mended):
        require("train", "training")


def test_only_the_packages_that_matter_are_asked_for(core: Path) -> None:
    """An uncompressed radiograph needs no decoders."""
    environments.installed(core, "pydicom", "3.0.1")
    script = "from mgll_encoder.common.extras import require; require('dicom', 'a radiograph', *{!r})"
    assert environments.python(core, "-c", script.format(["pydicom"])).returncode == 0
    assert "needs pylibjpeg" in environments.python(core, "-c", script.format([])).stderr


def test_a_command_keeps_its_name_and_signature() -> None:
    @needs(CORE)
    def command(a: int, b: str = "x") -> str:
        """Say b a times."""
        return b * a

    assert command(2) == "xx"
    assert (command.__name__, command.__doc__) == ("command", "Say b a times.")


STEPS = {
    "pretrain": (
        "mgll-encoder data phantom --out phantom --images-per-disease 20 --image-size 32",
        "mgll-encoder data fundus --labels phantom/labels.csv --images phantom --out phantom/manifest.parquet",
        "mgll-encoder pretrain --manifest phantom/manifest.parquet --tower-size tiny --epochs 1 --out tower",
    ),
    "probe": (
        "mgll-encoder probe --encoder tower --labels phantom/labels.csv --images phantom --labels-column labels "
        "--patient-column patient_or_source_id --min-positives 1",
        "mgll-encoder zero-shot --encoder tower --labels phantom/labels.csv --images phantom --labels-column labels "
        "--patient-column patient_or_source_id --min-positives 1",
        "mgll-encoder explain --encoder tower --images phantom/images --limit 2 --text glaucoma --out look.png",
    ),
    "eval": (
        "eval-mcq build --labels phantom/labels.csv --images phantom --patient-column patient_or_source_id "
        "--out bench.jsonl",
        "eval-mcq export bench.jsonl --images phantom --out train.json",
        "eval-mcq run --model llava --bench bench.jsonl --limit 4 --out run",
        "eval-mcq table run",
    ),
    "report": ("eval-mcq report run --out report.html",),
    "train": (
        "retrain-projector --model llava --data train.json --images phantom --max-steps 1 --out projector",
        "finetune-lora --model llava --data train.json --images phantom --max-steps 1 --merge --out lora",
    ),
    "qlora": (
        "finetune-lora --model llava --data train.json --images phantom --max-steps 1 --qlora --out q",
    ),
}
"""Extra -> commands that it is all they need for; a step takes up what those before it have written."""


@pytest.mark.slow
def test_an_extra_is_all_that_its_commands_need(tmp_path: Path, tiny_llava: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "llava").symlink_to(tiny_llava)
    for extra, lines in STEPS.items():
        site = environments.environment(tmp_path / f"site-{extra}", extra)
        for line in lines:
            name, *arguments = line.split()
            done = environments.command(site, COMMANDS[name], *arguments, cwd=work)
            assert done.returncode == 0, (extra, line, done.stderr)
