"""Fixtures: tiny real models, made once per session; the golden reference vectors where they are at hand."""

import os
from pathlib import Path

import pytest
import torch

from tests import builders

torch.set_num_threads(1)  # models here are tiny, and tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # likewise for the commands that tests start


def _folder_from(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, Path(__file__).parents[2] / "shared" / default))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference vectors of the original implementations (``MGLL_GOLDEN_DIR``)."""
    folder = _folder_from("MGLL_GOLDEN_DIR", "golden")
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {folder}: set MGLL_GOLDEN_DIR")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real fundus photographs and X-rays (``MGLL_DATA_DIR``)."""
    folder = _folder_from("MGLL_DATA_DIR", "data")
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set MGLL_DATA_DIR")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, for the commands that they start, too."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MGLL_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA in the transformers layout, with processor. Do not write into it."""
    return builders.tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")
