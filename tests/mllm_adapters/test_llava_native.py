"""LLaVA in the transformers layout: llava-hf's folders of all years, and what this project writes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

from mgll_encoder import load_tower
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, IMAGENET_STD
from mllm_adapters import load_mllm
from tests.mllm_adapters.llava_checkpoints import (
    a_tower,
    normalized,
    swap,
)


def test_a_llava_in_the_transformers_layout_keeps_tokens_and_processor(
    tiny_llava: Path, tmp_path: Path
) -> None:
    tower = a_tower(tmp_path / "tower", image_size=56)
    plan = swap(tiny_llava, tower, tmp_path / "out")
    assert (plan.before.tokens, plan.after.tokens) == (4, 4)
    assert any("resampled from 4x4 to 2x2" in note for note in plan.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]}],
        add_generation_prompt=True,
    )
    picture = Image.new("RGB", (60, 30), (10, 200, 30))
    batch = processor(text=[text], images=[picture], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == 4
    assert torch.isfinite(model(**batch).logits).all()

    squashed = torch.tensor([10, 200, 30]).view(3, 1, 1).expand(3, 28, 28) / 255
    expected = normalized(squashed[None], CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=0)


def test_another_image_size_changes_the_number_of_tokens_everywhere(tiny_llava: Path, tmp_path: Path) -> None:
    plan = swap(tiny_llava, a_tower(tmp_path / "tower"), tmp_path / "out", image_size=42)
    assert plan.after.tokens == 9
    model, processor = load_mllm(tmp_path / "out")
    assert model.config.image_seq_length == 9
    assert model.config.vision_config.image_size == 42
    batch = processor(text=["<image>?"], images=[Image.new("RGB", (9, 9))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == 9
    assert batch["pixel_values"].shape[-2:] == (42, 42)
    model(**batch)


def test_shards_without_a_tower_tensor_are_hard_linked(tiny_llava: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    model, processor = load_mllm(tiny_llava)
    model.save_pretrained(source, max_shard_size="40KB")
    processor.save_pretrained(source)
    plan = swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    inodes = {file.stat().st_ino for file in source.glob("*.safetensors")}
    linked = [file for file in (tmp_path / "out").glob("*.safetensors") if file.stat().st_ino in inodes]
    assert linked
    again, _ = load_mllm(tmp_path / "out")
    for name, value in model.named_parameters():
        if "vision_tower" not in name:
            assert torch.equal(again.get_parameter(name), value), name
    held = load_tower(tmp_path / "tower").model
    projection = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(again.model.vision_tower.get_parameter(projection), held.get_parameter(projection))
    assert plan.swapped


def test_a_float16_tower_is_fitted_in_the_hosts_precision(tiny_llava: Path, tmp_path: Path) -> None:
    """Folding rounds to the host's float32, not to the tower's float16."""
    tower = a_tower(tmp_path / "tower")
    weights = {name: value.half() for name, value in load_file(tower / "model.safetensors").items()}
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    swap(tiny_llava, tower, tmp_path / "out")
    found = load_mllm(tmp_path / "out")[0].model.vision_tower.embeddings.patch_embedding.weight.detach()
    scale = torch.tensor(CLIP_STD).double() / torch.tensor(IMAGENET_STD).double()
    (name,) = (name for name in weights if name.endswith("patch_embedding.weight"))
    expected = weights[name].double() * scale[None, :, None, None]
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-6)


def test_published_processor_files_of_old_are_read(tiny_llava: Path, tmp_path: Path) -> None:
    """llava-hf: flat preprocessor_config.json, chat_template.json, a processor_config.json without image processor."""
    source = Path(shutil.copytree(tiny_llava, tmp_path / "old"))
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    settings = {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
    }  # fmt: skip
    (source / "processor_config.json").write_text(json.dumps(settings))
    (source / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28})
    )
    plan = swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    assert (plan.before.resize, plan.after.resize) == ("crop", "squash")
    assert load_mllm(tmp_path / "out")[1].chat_template == template
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").unlink()
    plan = swap(source, tmp_path / "tower", tmp_path / "assumed")
    assert any("has no image processor" in note for note in plan.notes)
    assert load_mllm(tmp_path / "assumed")[1].chat_template == template


def test_the_result_of_a_read_only_source_can_be_written(tiny_llava: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    for file in source.iterdir():
        file.chmod(0o444)
    swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    assert all(f.stat().st_mode & 0o200 for f in (tmp_path / "out").glob("*.json"))


RENAMED = {
    "old": (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector.")),
    "new": (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
            ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
            ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector.")),
}  # fmt: skip
"""Key names of the years: llava-hf's first uploads, and what transformers 5 calls its parameters."""


def renamed(name: str, years: str) -> str:
    return next(
        (f"{new}{name.removeprefix(old)}" for old, new in RENAMED[years] if name.startswith(old)), name
    )


@pytest.mark.parametrize("years", RENAMED)
def test_key_names_of_all_years_are_kept_but_for_the_towers_which_release_4_reads_too(
    years: str, tiny_llava: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    (file,) = source.glob("*.safetensors")
    weights = {renamed(name, years): value for name, value in load_file(file).items()}
    prefix = {"old": "language_model.model.", "new": "model.language_model."}[years]
    assert any(name.startswith(prefix) for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    plan = swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    both = {
        re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name) for name in weights
    }
    assert {step.name for step in plan.steps} == both
    (connector,) = plan.connectors
    assert f"{connector}.weight" in weights
    swap(tiny_llava, tmp_path / "tower", tmp_path / "direct")
    found, expected = load_mllm(tmp_path / "out")[0], load_mllm(tmp_path / "direct")[0]
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name


@pytest.mark.parametrize("settings", [None, {"patch_size": 14, "vision_feature_select_strategy": "default"}])
def test_a_processor_that_leaves_the_count_to_the_model_is_completed(
    settings: dict[str, object] | None, tiny_llava: Path, tmp_path: Path
) -> None:
    """Published llava-hf folders had no patch size, later no word of the class token."""
    source = Path(shutil.copytree(tiny_llava, tmp_path / "old"))
    (source / "processor_config.json").unlink()
    if settings:
        named = {"processor_class": "LlavaProcessor", "image_token": "<image>", **settings}
        (source / "processor_config.json").write_text(json.dumps(named))
    size = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28}
    (source / "preprocessor_config.json").write_text(json.dumps(size))
    model, processor = load_mllm(source)
    batch = processor(text=["<image>?"], images=[Image.new("RGB", (40, 30))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 4
    model(**batch)
    swap(source, a_tower(tmp_path / "tower"), tmp_path / "out", image_size=42)
    stock = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = stock(text=["<image>?"], images=[Image.new("RGB", (40, 30))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 9
