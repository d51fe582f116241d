"""The wheel: exactly the packages, small, nothing of the building machine; it works without this repository."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import environments, tiny_example
from tests.environments import ROOT

PACKAGES = ("mgll_encoder", "mllm_adapters", "eval_mcq")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: a source archive, and a wheel of what is in it."""
    folder = tmp_path_factory.mktemp("dist")
    script = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run = [sys.executable, "-c", script, str(folder)]
    made = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    with tarfile.open(folder / made) as archive:
        assert [name for name in archive.getnames() if "/tests/" in name] == []
        archive.extractall(folder, filter="data")
    source = folder / made.removesuffix(".tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_packages_file_by_file_and_nothing_else(wheel: Path) -> None:
    assert wheel.stat().st_size < 2_000_000
    here = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == here
        for name in archive.namelist():
            content = archive.read(name)
            for place in (ROOT, Path.home(), Path(sys.prefix)):
                assert bytes(place) + b"/" not in content, (name, place)


@pytest.mark.slow
def test_the_installed_wheel_swaps_verifies_and_loads_without_extras_or_this_repository(
    wheel: Path, tmp_path: Path
) -> None:
    site = environments.environment(tmp_path / "site", wheel=wheel)
    tiny_example.write(tmp_path)
    script = """
import sys
import mllm_adapters
from mllm_adapters.cli.swap import main
assert "site" in mllm_adapters.__file__, mllm_adapters.__file__
for line in (["--mllm", "llava", "--encoder", "tower", "--out", "out"], ["verify", "out", "--encoder", "tower"]):
    sys.argv = ["swap-encoder", *line]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
model, processor = mllm_adapters.load_mllm("out")
print(type(model).__name__, mllm_adapters.__version__)
"""
    done = environments.python(site, "-c", script, cwd=tmp_path, sources=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("LlavaForConditionalGeneration ")
