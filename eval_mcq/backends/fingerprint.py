"""Hashes and versions that identify what a run's answers depend on."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from eval_mcq.scoring.modes import SCORING_VERSION
from mgll_encoder.common.errors import NotFoundError
from mgll_encoder.common.files import sha256
from mgll_encoder.common.images import READER_VERSION
from mgll_encoder.common.progress import track
from mllm_adapters import base_of_adapter

MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that its answers depend on."""


def model_fingerprint(folder: Path) -> str:
    """Hash the bytes of a model folder: weights, config, processor and tokenizer, including subfolders.

    The hash of an adapter includes that of its base model.

    Raises:
        UserError: the folder has no ``config.json``, and is not an adapter whose base has one.
    """
    base = base_of_adapter(folder)
    before = [f"base {model_fingerprint(base)}\n"] if base else []
    if not base and not (folder / "config.json").is_file():
        raise NotFoundError(f"model {folder} is not a model folder: it has no config.json")
    files = sorted(path for path in folder.rglob("*") if path.suffix in MODEL_SUFFIXES and path.is_file())
    shown = [(path.relative_to(folder).as_posix(), path) for path in files]
    visible = [(name, path) for name, path in shown if not any(p.startswith(".") for p in name.split("/"))]
    lines = [f"{name} {sha256(path)}\n" for name, path in track(visible, "Hashing the model's files")]
    return hashlib.sha256("".join([*before, *lines]).encode()).hexdigest()


def code_version() -> str:
    """Return the versions that determine the numbers of an answer.

    Builds of torch for different devices count as the same version.
    """
    return (
        f"{SCORING_VERSION}, pictures-{READER_VERSION}, torch {version('torch').split('+')[0]}, "
        f"transformers {version('transformers')}"
    )


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that compute an answer here, for the reader of a record."""
    return {package: version(package) for package in ("mgll-mllm", "torch", "transformers")}
