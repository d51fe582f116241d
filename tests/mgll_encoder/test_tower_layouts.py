"""A tower saved in any known layout gives the outputs of its own library."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mgll_encoder import Tower, inspect_tower, load_tower, tower_state_dict
from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from tests.mgll_encoder import towers

State = dict[str, Tensor]


def legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def training(state: State, path: Path) -> None:
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}}, path
    )


WRITERS: dict[str, Callable[[State, Path], None]] = {
    "clip.pt": torch.save,
    "clip.bin": torch.save,
    "clip.safetensors": save_file,
    "safetensors-by-another-name.pt": save_file,
    "before-torch-1.6.bin": legacy,
    "open_clip_training.pt": training,
}


def assert_same(tower: Tower, pixels: Tensor, expected: State) -> None:
    with torch.no_grad():
        out = tower.model(pixels, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-2], expected["penultimate"], atol=1e-5, rtol=1e-5)
    if tower.projection is not None:
        pooled = out.pooler_output @ tower.projection.T
        torch.testing.assert_close(pooled, expected["pooled"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part", ["whole", "custom text", "visual"])
def test_open_clip_files_equal_open_clip(tmp_path: Path, name: str, part: str) -> None:
    model = towers.open_clip_model(custom_text=part == "custom text")
    WRITERS[name](towers.state_of(model.visual if part == "visual" else model), tmp_path / name)
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    tower = load_tower(tmp_path / name)
    assert tower.header.layout == "open_clip state dict"
    assert tower.projection is not None
    assert_same(tower, pixels, towers.open_clip_features(model, pixels))


def test_quick_gelu_equals_open_clips_and_differs_from_gelu(tmp_path: Path) -> None:
    model = towers.open_clip_model(quick_gelu=True, width=128, depth=4)
    path = towers.write(towers.state_of(model), tmp_path / "clip.pt")
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    expected = towers.open_clip_features(model, pixels)
    tower = load_tower(path, activation="quick_gelu")
    assert (tower.spec.heads, tower.spec.depth, tower.spec.image_size) == (2, 4, 42)
    assert_same(tower, pixels, expected)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(load_tower(path), pixels, expected)


def test_openai_constants_call_for_quick_gelu(tmp_path: Path) -> None:
    state = towers.state_of(towers.open_clip_model())
    plain = inspect_tower(towers.write(state, tmp_path / "open_clip.pt"))
    constants = {name: torch.tensor(42) for name in ("input_resolution", "context_length", "vocab_size")}
    openai = inspect_tower(towers.write(state | constants, tmp_path / "openai.pt"))
    assert (plain.layout, plain.spec.activation) == ("open_clip state dict", "gelu")
    assert (openai.layout, openai.spec.activation) == ("OpenAI state dict", "quick_gelu")
    assert openai.dropped["OpenAI constants"] == 3
    for header in (plain, openai):
        assert (header.spec.mean, header.spec.std, header.spec.resize) == (CLIP_MEAN, CLIP_STD, "crop")
        assert [w for w in header.warnings if "`activation=" in w]


@pytest.mark.parametrize("quick", [False, True])
def test_an_open_clip_folder_says_what_it_was_trained_with(tmp_path: Path, quick: bool) -> None:
    model = towers.open_clip_model(quick_gelu=quick, width=128)
    save_file(towers.state_of(model), tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 42, "layers": 3, "width": 128, "patch_size": 14, "head_width": 64}
    pixels = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize_mode": "squash"}
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "quick_gelu": quick},
        "preprocess_cfg": pixels,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    tower = load_tower(tmp_path)
    assert (tower.header.layout, tower.header.warnings) == ("open_clip folder", ())
    assert (tower.spec.mean, tower.spec.resize, tower.spec.heads) == (IMAGENET_MEAN, "squash", 2)
    images = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    assert_same(tower, images, towers.open_clip_features(model, images))


def hf_expected(model: torch.nn.Module, pixels: Tensor) -> State:
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        out = vision(pixels, output_hidden_states=True)
        pooled = model.visual_projection(out.pooler_output) if hasattr(model, "visual_projection") else None
    return {"penultimate": out.hidden_states[-2], "pooled": pooled}


def save_bin(model: torch.nn.Module, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(
        model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(5)[None]},
        folder / "pytorch_model.bin",
    )


def save_sharded_bin(model: torch.nn.Module, folder: Path) -> None:
    model.config.save_pretrained(folder)
    names = sorted(model.state_dict())
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, half in halves.items():
        torch.save({name: model.state_dict()[name] for name in half}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_without_prefix(model: torch.nn.Module, folder: Path) -> None:
    model.config.save_pretrained(folder)
    state = {name.removeprefix("vision_model."): t for name, t in towers.state_of(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


HF_WRITERS: dict[str, Callable[[torch.nn.Module, Path], None]] = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "sharded safetensors": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "bin": save_bin,
    "sharded bin": save_sharded_bin,
    "without prefix": save_without_prefix,
}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(
    ("kind", "way"),
    [("clip", way) for way in HF_WRITERS if way != "without prefix"]
    + [("projection", way) for way in HF_WRITERS]
    + [("vision", way) for way in HF_WRITERS if way != "bin"],
)
def test_transformers_folders_equal_transformers(
    tmp_path: Path, kind: str, way: str, activation: str
) -> None:
    model = (
        towers.clip_model(hidden_act=activation)
        if kind == "clip"
        else towers.vision_model(projection=kind == "projection", hidden_act=activation)
    )
    folder = tmp_path / "tower"
    folder.mkdir()
    HF_WRITERS[way](model, folder)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tower = load_tower(folder)
    assert (tower.header.layout, tower.header.activation_source) == ("transformers folder", "stored")
    assert tower.spec.activation == activation
    assert (tower.projection is None) == (kind == "vision")
    assert tower.header.files
    assert_same(tower, pixels, hf_expected(model, pixels))


def test_golden_clip_folder_of_llava_is_read(golden: Path) -> None:
    config = next((golden / "llava").glob("**/preprocessor_config.json"))
    header = inspect_tower(config.parent)
    stored = json.loads((config.parent / "config.json").read_text())["vision_config"]
    assert (header.spec.width, header.spec.activation) == (stored["hidden_size"], stored["hidden_act"])
    assert (header.spec.mean, header.spec.resize, header.preprocessing_source) == (
        CLIP_MEAN,
        "crop",
        "stored",
    )
    assert header.warnings == ()


def test_a_bare_transformers_file_is_read_with_warnings(tmp_path: Path) -> None:
    model = towers.vision_model(hidden_size=64, num_attention_heads=1)
    model.save_pretrained(tmp_path)
    header = inspect_tower(tmp_path / "model.safetensors")
    assert header.layout == "transformers state dict"
    assert header.spec.activation == "quick_gelu"
    assert [w for w in header.warnings if "config.json is not read: pass the folder" in w]
    assert [w for w in header.warnings if "`activation=gelu`" in w]


PREPROCESSORS = {
    "old ints": ({"size": 28, "crop_size": 28, "feature_extractor_type": "CLIPFeatureExtractor"}, "crop"),
    "shortest edge": ({"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}, "crop"),
    "both sides": ({"size": {"height": 28, "width": 28}, "do_center_crop": False}, "squash"),
    "padded": (
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_pad": True},
        "pad",
    ),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", PREPROCESSORS)
def test_preprocessing_is_read_from_any_form(tmp_path: Path, form: str, nested: bool) -> None:
    towers.vision_model().save_pretrained(tmp_path)
    fields, resize = PREPROCESSORS[form]
    content = {**fields, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps({"image_processor": content} if nested else content))
    header = inspect_tower(tmp_path)
    assert (header.spec.mean, header.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (header.spec.resize, header.preprocessing_source) == (resize, "stored")


def test_without_preprocessing_the_default_is_said(tmp_path: Path) -> None:
    towers.vision_model().save_pretrained(tmp_path)
    header = inspect_tower(tmp_path)
    assert (header.spec.mean, header.preprocessing_source) == (CLIP_MEAN, "default")
    assert any("mean, std and resize rule are not stored" in w for w in header.warnings)


def test_preprocessing_for_another_size_is_refused(tmp_path: Path) -> None:
    towers.vision_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 56, "crop_size": 56}))
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"preprocessor_config.json: images are resized to 56 px, .* image_size in config.json is 28",
    ):
        inspect_tower(tmp_path)


def test_stored_dtypes_stay_in_the_header_and_load_as_float32(tmp_path: Path) -> None:
    state = {name: t.half() for name, t in towers.state_of(towers.open_clip_model()).items()}
    path = towers.write(state, tmp_path / "half.pt")
    header, tensors = tower_state_dict(path)
    assert header.dtypes == ("float16",)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert load_tower(path).model.dtype == torch.float32
    assert load_tower(path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert not load_tower(path).model.training


def test_tensors_outside_the_tower_are_counted_and_named(tmp_path: Path) -> None:
    state = towers.state_of(towers.open_clip_model()) | {"head.weight": torch.zeros(2, 24)}
    header = inspect_tower(towers.write(state, tmp_path / "clip.pt"))
    assert header.dropped["other: head"] == 1
    assert any(
        "1 tensors outside the tower are left out, such as 'head.weight'" in w for w in header.warnings
    )
