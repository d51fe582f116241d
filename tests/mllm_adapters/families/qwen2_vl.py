"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL; the reference is the stock class, whose checkpoints are made here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from mllm_adapters.core.contract import Plan
from mllm_adapters.families.qwen2_vl.modeling import to_patches
from tests.mllm_adapters.families.case import Case, Golden

IMAGE = 93
START, END, VIDEO = 90, 91, 94

TEXT = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6,
}  # fmt: skip
MROPE = {"type": "mrope", "mrope_section": [2, 2, 2]}
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    "tie_word_embeddings": False,
}  # fmt: skip

CONFIGS: Mapping[str, dict[str, Any]] = {
    # The first two as published: the language model's fields lie beside those of the whole.
    "qwen2_vl": {
        **TEXT, **TOKENS, "rope_theta": 1e6, "rope_scaling": MROPE,
        "vision_config": {"depth": 2, "embed_dim": 40, "hidden_size": 48, "num_heads": 2, "patch_size": 14},
    },
    "qwen2_5_vl": {
        **TEXT, **TOKENS, "rope_theta": 1e6, "rope_scaling": MROPE,
        "vision_config": {
            "depth": 2, "hidden_size": 40, "out_hidden_size": 48, "intermediate_size": 56, "num_heads": 2,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
    },
    "qwen3_vl": {
        **TOKENS,
        "text_config": {
            **TEXT, "head_dim": 12, "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 2, 2]},
        },
        "vision_config": {
            "depth": 3, "hidden_size": 40, "out_hidden_size": 48, "intermediate_size": 56, "num_heads": 2,
            "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
    },
}  # fmt: skip

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALIZATION = {"qwen2_vl": CLIP, "qwen2_5_vl": CLIP, "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
"""Mean and standard deviation of the published image processors."""


def old_prefixes(name: str) -> str:
    """``model.visual.x`` -> ``visual.x``, ``model.language_model.x`` -> ``model.x``: files before transformers 4.52."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def write_checkpoint(
    folder: Path, model_type: str, rename: Callable[[str], str] = str, **changes: Any
) -> Any:
    """Write a random checkpoint of the stock class; gives the model."""
    torch.manual_seed(0)
    settings = {**CONFIGS[model_type], **changes}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    state = {rename(name): value.clone() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))
    return model


def question(images: Tensor, patch_size: int) -> dict[str, Tensor]:
    """What the processor makes of arbitrary words about square pictures (n, 3, S, S)."""
    side = images.shape[-1] // patch_size
    per_image = [START, *[IMAGE] * (side // 2) ** 2, END]
    ids = torch.tensor([[1, 5, *per_image * len(images), 7, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": to_patches(images, patch_size, 2, 2),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(images)),
    }


def build(model_type: str, rename: Callable[[str], str] = str) -> Callable[[Path], Golden]:
    """A builder of a checkpoint and of what the stock class makes of it, in the form of a golden folder."""

    @torch.no_grad()
    def write(folder: Path) -> Golden:
        write_checkpoint(folder / "checkpoint", model_type, rename)
        # Not the model that was written: the reference reads the file, as a user of transformers would.
        model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
        patch = model.config.vision_config.patch_size
        pictures = torch.randn(2, 3, 6 * patch, 6 * patch)
        expected, index = {}, {"seq0": [0], "seq1": [0, 1]}
        for sequence, chosen in index.items():
            given = question(pictures[chosen], patch)
            expected |= {f"{sequence}.{name}": value for name, value in given.items()}
            expected[f"{sequence}.logits"] = model(**given).logits
        both = question(pictures, patch)
        vision = model.get_image_features(both["pixel_values"], both["image_grid_thw"])
        expected["vision_features"] = vision.last_hidden_state
        expected["visual_tokens"] = torch.cat(list(vision.pooler_output))
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
        (folder / "expected.json").write_text(json.dumps({"image_index": index}))
        return Golden(folder)

    return write


def features(model: Any, golden: Golden) -> Tensor:
    return _vision(model, golden).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return torch.cat(list(_vision(model, golden).pooler_output))


def _vision(model: Any, golden: Golden) -> Any:
    expected = golden.expected
    return model.get_image_features(expected["seq1.pixel_values"], expected["seq1.image_grid_thw"])


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    return {name: golden.expected[f"{sequence}.{name}"] for name in names}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    return found, golden.expected[f"{sequence}.logits"]


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """A prompt about one picture, for the swapped model."""
    return question(pixels, plan.after.patch_size)


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.visual.vision_tower")


CASES = tuple(
    Case(
        name=name, golden="", build=build(model_type, rename), features=features, tokens=tokens, inputs=inputs,
        logits=logits, tower=tower, prompt=prompt,
    )
    for name, model_type, rename in (
        ("qwen2_vl", "qwen2_vl", old_prefixes),
        ("qwen2_5_vl", "qwen2_5_vl", str),
        ("qwen3_vl", "qwen3_vl", str),
    )
)  # fmt: skip
