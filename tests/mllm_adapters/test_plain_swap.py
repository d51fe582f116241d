"""A swap in a LLaVA of the transformers layout needs no modelling code, and what is done without it is right."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from mgll_encoder import MismatchError, inspect_tower
from mllm_adapters.core.contract import Family
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.loading.expected_state_dict import NAMES, Names, is_complete, llava_shapes
from tests.mllm_adapters.llava_checkpoints import a_tower

SWAP = """
import sys
from mllm_adapters.cli.swap import main
try:
    main()
finally:
    print("imported:", *{name.partition(".")[0] for name in sys.modules})
"""

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 14}  # fmt: skip
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 70,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"text_config": {"model_type": "llama", **TEXT}},
    "fewer keys than queries": {"text_config": {"model_type": "llama", **TEXT, "num_key_value_heads": 2}},
    "heads of another width": {"text_config": {"model_type": "llama", **TEXT, "head_dim": 16}},
    "mistral": {"text_config": {"model_type": "mistral", **TEXT}},
    "tied": {"text_config": {"model_type": "llama", **TEXT, "tie_word_embeddings": True}},
    "as published, by defaults": {"text_config": {"model_type": "llama", "vocab_size": 32064}},
    "mistral by defaults": {"text_config": {"model_type": "mistral"}},
}


def described(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model", **VISION}, **fields}


def built(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of the model that transformers builds; tied ones once, as they are saved."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
    tied = model.config.tie_word_embeddings
    state = model.state_dict().items()
    return {name: tuple(value.shape) for name, value in state if not (tied and name == "lm_head.weight")}


def test_a_plain_swap_imports_torch_and_nothing_of_transformers(tiny_llava: Path, tmp_path: Path) -> None:
    tower, out = a_tower(tmp_path / "tower"), tmp_path / "out"
    command = [sys.executable, "-c", SWAP, "--mllm", tiny_llava, "--encoder", tower, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (out / "processor_config.json").is_file()
    imported = set(done.stdout.rpartition("imported: ")[2].split())
    assert {"torch", "safetensors", "mllm_adapters"} <= imported
    assert not imported & {
        "transformers",
        "torchvision",
        "tokenizers",
        "huggingface_hub",
        "peft",
        "scipy",
        "sklearn",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    config = described(CONFIGS[name])
    shapes = built(config)
    assert is_complete(config, shapes)
    saved = LlavaConfig(**config).to_dict()
    assert is_complete(saved, shapes), "also as transformers writes the configuration out"


def test_one_tensor_too_few_too_many_or_of_another_shape_is_not_complete() -> None:
    config = described(CONFIGS["llama"])
    shapes = built(config)
    for name, shape in shapes.items():
        assert not is_complete(config, {key: value for key, value in shapes.items() if key != name})
        assert not is_complete(config, {**shapes, name: (*shape[:-1], shape[-1] + 1)})
    assert not is_complete(config, {**shapes, "model.language_model.layers.2.input_layernorm.weight": (48,)})


@pytest.mark.parametrize(
    "fields",
    [
        {"text_config": {"model_type": "qwen2", **TEXT}},
        {"text_config": {"model_type": "llama", **TEXT, "attention_bias": True}},
        {
            "text_config": {
                "model_type": "llama",
                **TEXT,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            }
        },
        {"multimodal_projector_bias": False, **CONFIGS["llama"]},
        {"projector_hidden_act": "relu", **CONFIGS["llama"]},
        {"vision_feature_layer": [-2, -1], **CONFIGS["llama"]},
        {"vision_config": {"model_type": "siglip_vision_model", **VISION}, **CONFIGS["llama"]},
    ],
)
def test_what_is_not_plainly_known_is_left_to_transformers(fields: dict[str, Any]) -> None:
    config = described(fields)
    AutoConfig.for_model(**config)
    assert list(llava_shapes(config)) == []


@pytest.mark.parametrize("names", NAMES)
def test_transformers_reads_every_kind_of_name(names: Names) -> None:
    config = described(CONFIGS["llama"])
    shapes = list(llava_shapes(config))[NAMES.index(names)]
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    _, report = LlavaForConditionalGeneration.from_pretrained(
        None, config=LlavaConfig(**config), state_dict=state, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_processors_files_are_those_that_transformers_writes(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint, family, _ = open_checkpoint(tiny_llava)
    plan = family.plan(checkpoint, inspect_tower(a_tower(tmp_path / "tower")))
    plain, library = tmp_path / "plain", tmp_path / "library"
    for folder, write in (
        (plain, family.processor_writer(plan)),
        (library, Family.processor_writer(family, plan)),
    ):
        folder.mkdir()
        write(folder)
    written = sorted(file.name for file in plain.iterdir())
    assert written == ["chat_template.jinja", "preprocessor_config.json", "processor_config.json"]
    for name in written:
        assert (plain / name).read_text().strip() == (library / name).read_text().strip()
    kept = {file.name for file in library.iterdir()} - set(written)
    assert kept == {"tokenizer.json", "tokenizer_config.json"}, "the rest is the tokenizer, which is copied"


def test_a_tokenizer_that_gives_the_placeholder_another_id_is_refused(
    tiny_llava: Path, tmp_path: Path
) -> None:

    checkpoint, family, _ = open_checkpoint(tiny_llava)
    plan = family.plan(checkpoint, inspect_tower(a_tower(tmp_path / "tower")))
    with pytest.raises(MismatchError, match=r"tokenizer and config\.json do not belong together"):
        family.processor_writer(plan.model_copy(update={"image_token_id": plan.image_token_id - 1}))
