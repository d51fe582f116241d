"""An official MGLL training checkpoint gives the outputs of the original code."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mgll_encoder import inspect_tower, load_tower, tower_state_dict
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD

FEATURES = (
    "embeddings_ln_pre",
    "penultimate_all",
    "last_all",
    "last_ln_post_all",
    "last_ln_post_proj_all",
    "pooled",
)


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "mgll_official"


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, facts: dict) -> Path:
    return folder / facts["checkpoint"]


def features(path: Path, activation: str | None, pixels: Tensor) -> dict[str, Tensor]:
    tower = load_tower(path, activation=activation)
    with torch.no_grad():
        out = tower.model(pixels, output_hidden_states=True)
        normed = tower.model.post_layernorm(out.last_hidden_state)
    return {
        "embeddings_ln_pre": out.hidden_states[0],
        "penultimate_all": out.hidden_states[-2],
        "last_all": out.last_hidden_state,
        "last_ln_post_all": normed,
        "last_ln_post_proj_all": normed @ tower.projection.T,
        "pooled": out.pooler_output @ tower.projection.T,
    }


@pytest.mark.parametrize(("activation", "prefix"), [(None, ""), ("gelu", ""), ("quick_gelu", "quick_gelu.")])
def test_features_equal_the_original_code(
    checkpoint: Path, expected: dict[str, Tensor], activation: str | None, prefix: str
) -> None:
    found = features(checkpoint, activation, expected["pixel_values"])
    for name in FEATURES:
        torch.testing.assert_close(found[name], expected[prefix + name], atol=1e-5, rtol=1e-5)


def test_the_other_activation_gives_other_features(checkpoint: Path, expected: dict[str, Tensor]) -> None:
    found = features(checkpoint, "quick_gelu", expected["pixel_values"])
    for name in ("penultimate_all", "last_all", "pooled"):
        assert (found[name] - expected[name]).abs().max() > 1e-4, name


def test_the_contract_is_read_from_the_weights(checkpoint: Path, facts: dict) -> None:
    header, dims = inspect_tower(checkpoint), facts["dims"]
    spec = header.spec
    assert (spec.width, spec.depth, spec.patch_size) == (dims["width"], dims["layers"], dims["patch"])
    assert (spec.image_size, spec.projection_dim) == (dims["image"], dims["embed_dim"])
    assert spec.heads == dims["width"] // dims["head_width"]
    assert (spec.mean, spec.std, spec.resize) == (IMAGENET_MEAN, IMAGENET_STD, "squash")
    assert header.layout == "mgll training checkpoint"


def test_every_tensor_is_taken_or_counted(checkpoint: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        source = torch.load(checkpoint, weights_only=True)["model"]
    header, tensors = tower_state_dict(checkpoint)
    taken = sum("clip.visual." in key for key in source)
    assert sum(header.dropped.values()) == len(source) - taken
    assert set(header.dropped) <= {"text tower", "temperature", "MGLL cross-attention"}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == header.tensors


def test_the_default_activation_is_said_with_its_consequence(checkpoint: Path) -> None:
    header = inspect_tower(checkpoint)
    assert header.activation_source == "default"
    (said,) = [w for w in header.warnings if "activation" in w]
    assert "using gelu" in said
    assert "about 1 % off" in said
    assert "`activation=quick_gelu`" in said
    chosen = inspect_tower(checkpoint, activation="gelu")
    assert chosen.activation_source == "option"
    assert not [w for w in chosen.warnings if "activation" in w]


@pytest.mark.parametrize("prefix", ["module.", "module.model.", ""])
def test_other_prefixes_are_the_same_tower(
    checkpoint: Path, expected: dict[str, Tensor], tmp_path: Path, prefix: str
) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, weights_only=True)
    content["model"] = {prefix + key: value for key, value in content["model"].items()}
    torch.save(content, tmp_path / "prefixed.pth")
    header = inspect_tower(tmp_path / "prefixed.pth")
    assert header.layout == "mgll training checkpoint"
    assert not any(group.startswith("other") for group in header.dropped)
    found = features(tmp_path / "prefixed.pth", None, expected["pixel_values"])
    torch.testing.assert_close(found["pooled"], expected["pooled"], atol=1e-5, rtol=1e-5)
