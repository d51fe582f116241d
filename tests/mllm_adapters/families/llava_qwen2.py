"""LLaVA on Qwen2 in HuatuoGPT-Vision's layout; the reference is CLIP, projector and Qwen2 put together here.

There are no golden vectors: its code is the original LLaVA's around transformers' own ``Qwen2ForCausalLM``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

from tests import builders
from tests.mllm_adapters.families import llava
from tests.mllm_adapters.families.case import Case, Golden

IMAGE = -200
TOWER = "./vit/clip_vit_large_patch14_336"
SHARD = "model-0000{}-of-00002.safetensors"


@dataclass(frozen=True)
class Reference:
    """The three parts of a LLaVA, as the original code runs them."""

    tower: CLIPVisionModel
    projector: nn.Module
    language_model: Qwen2ForCausalLM

    def features(self, pixels: Tensor) -> Tensor:
        """Patches of the last hidden layer but one: [n, patches, width]."""
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Logits of one row of ids in which -200 stands for a picture: [1, length, vocabulary]."""
        embed = self.language_model.get_input_embeddings()
        pictures = iter(self.projector(self.features(pixels)))
        parts = [next(pictures) if i == IMAGE else embed(torch.tensor([i])) for i in ids.tolist()]
        return self.language_model(inputs_embeds=torch.cat(parts)[None]).logits

    def state(self) -> dict[str, Tensor]:
        """Its tensors under the original names."""
        tied = self.language_model.config.tie_word_embeddings
        text = {
            n: v for n, v in self.language_model.state_dict().items() if not (tied and n == "lm_head.weight")
        }
        projector = {f"model.mm_projector.{n}": v for n, v in self.projector.state_dict().items()}
        vision = {n.removeprefix("vision_model."): v for n, v in self.tower.state_dict().items()}
        inside = {f"model.vision_tower.vision_tower.vision_model.{n}": v for n, v in vision.items()}
        return {n: v.contiguous() for n, v in {**text, **projector, **inside}.items()}


@torch.no_grad()
def reference(vocabulary: int = 96, *, tied: bool = False, projector: str = "mlp2x_gelu") -> Reference:
    """A random LLaVA on Qwen2: biases, few key heads and a rotary base of its own, as in the published models."""
    torch.manual_seed(11)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=3, tie_word_embeddings=tied,
    )  # fmt: skip
    layers: dict[str, list[nn.Module]] = {
        "linear": [nn.Linear(32, 48)],
        "mlp1x_gelu": [nn.Linear(32, 48)],
        "mlp2x_gelu": [nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48)],
    }
    parts = layers[projector]
    whole = Reference(
        CLIPVisionModel(builders.tower_config(hidden_act="quick_gelu")).eval(),
        parts[0] if projector == "linear" else nn.Sequential(*parts),
        Qwen2ForCausalLM(config).eval(),
    )
    for part in (whole.tower, whole.projector, whole.language_model):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.15)
    return whole


def write(folder: Path, whole: Reference, *, vit: bool = True, **changes: object) -> Path:
    """The folder as HuatuoGPT-Vision is published: two shards that hold the tower too, and the tower in vit/ once more.

    Args:
        folder: Where to.
        whole: What to write.
        vit: Whether the tower that config.json names is there.
        **changes: Fields of config.json.
    """
    state = whole.state()
    names = sorted(state)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])
    folder.mkdir(parents=True)
    for number, shard in enumerate(shards, 1):
        save_file({n: state[n] for n in shard}, folder / SHARD.format(number), metadata={"format": "pt"})
    index = {name: SHARD.format(number) for number, shard in enumerate(shards, 1) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({**settings(whole.language_model.config), **changes}))
    if vit:
        whole.tower.save_pretrained(folder / TOWER)
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / TOWER)
    return folder


def with_tokenizer(folder: Path, end: str = "<|endoftext|>") -> Path:
    """A checkpoint with a tokenizer as Qwen2's: no token begins a text, and fewer tokens than rows."""
    tokenizer = builders.byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": "<|endoftext|>"})
    tokenizer.bos_token = None
    write(folder, reference(len(tokenizer) + 10))
    tokenizer.save_pretrained(folder)
    return folder


def settings(text: Qwen2Config) -> Mapping[str, Any]:
    """config.json with the published fields: flat, and of releases that knew no ``rope_parameters``."""
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id",
        "tie_word_embeddings", "max_window_layers",
    )  # fmt: skip
    return {
        **{name: getattr(text, name) for name in kept},
        "architectures": ["LlavaQwen2ForCausalLM"], "model_type": "llava_qwen2", "rope_theta": 1e6,
        "sliding_window": 131072, "use_sliding_window": False, "attention_dropout": 0.0,
        "mm_vision_tower": TOWER, "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
        "torch_dtype": "float32", "transformers_version": "4.40.0",
    }  # fmt: skip


@torch.no_grad()
def build(folder: Path) -> Golden:
    """Write a checkpoint, and what the reference makes of two pictures."""
    whole = reference()
    write(folder / "checkpoint", whole)
    expected, index = {"pixel_values": torch.randn(2, 3, 28, 28)}, {"seq0": [0], "seq1": [0, 1]}
    for sequence, chosen in index.items():
        ids = torch.tensor([5, 7, *[IMAGE, 9] * len(chosen), 11, 13])
        expected[f"{sequence}.input_ids"] = ids[None]
        expected[f"{sequence}.logits"] = whole.logits(ids, expected["pixel_values"][chosen])
    expected["vision_features"] = whole.features(expected["pixel_values"])
    expected["visual_tokens"] = whole.projector(expected["vision_features"])
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"image_index": index}))
    return Golden(folder)


CASES = (
    Case(
        name="llava_qwen2", golden="", build=build, features=llava.features, tokens=llava.tokens, inputs=llava.inputs,
        logits=llava.logits, tower=llava.tower, stock=True,
    ),
)  # fmt: skip
