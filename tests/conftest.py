"""Fixtures: tiny real models, built once per session; the golden reference vectors and real photographs."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests import builders

torch.set_num_threads(1)  # models here are tiny, and tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # likewise for the commands that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of `make test &` in a script; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference vectors of the original implementations (``MGLL_GOLDEN_DIR``); tests/golden by default."""
    folder = Path(os.environ.get("MGLL_GOLDEN_DIR", HERE / "golden"))
    if not folder.is_dir():
        pytest.fail(f"no golden vectors at {folder}: restore tests/golden or set MGLL_GOLDEN_DIR")
    return folder


@pytest.fixture(scope="session")
def photographs() -> Path:
    """24 real fundus photographs of IDRiD (tests/data/CREDITS.md): images/ and manifest.csv."""
    return HERE / "data" / "fundus"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """All real fundus photographs, X-rays and label tables, which may not be redistributed (``MGLL_DATA_DIR``)."""
    folder = Path(os.environ.get("MGLL_DATA_DIR", HERE.parents[1] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set MGLL_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def cases() -> Path:
    """Small inputs that once failed (``MGLL_CASES_DIR``); their kinds are tested without them, too."""
    folder = Path(os.environ.get("MGLL_CASES_DIR", HERE.parents[1] / "shared" / "cases"))
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}: set MGLL_CASES_DIR")
    return folder


@pytest.fixture(scope="session")
def published() -> Path:
    """Real metadata of published checkpoints, without weights (``MGLL_PUBLISHED_DIR``)."""
    folder = Path(os.environ.get("MGLL_PUBLISHED_DIR", HERE.parents[1] / "shared" / "published"))
    if not folder.is_dir():
        pytest.skip(f"no published metadata at {folder}: set MGLL_PUBLISHED_DIR")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, for the commands that they start, too."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MGLL_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key of patients' pseudonyms, the same in all tests except those about keys."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text("5e" * 32 + "\n")
    os.environ["MGLL_KEY_FILE"] = str(file)
    return file


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA in the transformers layout, with processor. Do not write into it."""
    return builders.tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")
