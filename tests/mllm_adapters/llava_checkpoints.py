"""LLaVA checkpoints in every layout, made of the golden ones or of nothing, for tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mgll_encoder import Tower, TowerSpec, save_tower
from mllm_adapters import plan_swap
from mllm_adapters.api import plan_conversion
from mllm_adapters.checkpoints.locate import find_part
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.families.llava.fields import TEXT_MODELS
from tests import builders

HOSTS = ["llava", "llava_med"]
SENTENCE = "USER ASSISTANT Which disease does this image show Glaucoma Myopia retina the a"
LANGUAGE_MODEL = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")


def swap(source: Path, tower: Path, out: Path, image_size: int | None = None) -> Plan:
    """Put a tower into a checkpoint."""
    plan = plan_swap(source, tower, image_size=image_size)
    plan.write(out)
    return plan.plan


def convert(source: Path, out: Path, parts: Mapping[str, Path] | None = None) -> Plan:
    """Convert a checkpoint to the transformers layout."""
    plan = plan_conversion(source, parts=parts)
    plan.write(out)
    return plan.plan


def a_tower(folder: Path, width: int = 32, image_size: int = 28, seed: int = 5, **rule: object) -> Path:
    """A tower folder as `mgll-encoder` writes it: ImageNet normalization and squash unless said otherwise."""
    torch.manual_seed(seed)
    config = builders.tower_config(hidden_size=width, image_size=image_size)
    spec = TowerSpec(
        width=width, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=image_size, activation="gelu",
        **rule,
    )  # fmt: skip
    return save_tower(Tower.from_model(CLIPVisionModel(config), spec), folder)


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[n, 3, H, W] on a 0-1 scale -> normalized."""
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def golden_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a golden checkpoint, in float32."""
    checkpoint, _, _ = open_checkpoint(source)
    return {name: checkpoint.read(name).float().contiguous() for name in checkpoint.tensors}


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, name: str = "config.json", **changes: object) -> Path:
    """Change fields of a JSON file."""
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))
    return folder


def original_llava(
    golden: Path, host: str, folder: Path, *, safetensors: bool = False, drop_projector: bool = False
) -> Path:
    """A golden checkpoint completed with a tokenizer, as the published folders are."""
    source = golden / host / "checkpoint"
    checkpoint, _, _ = open_checkpoint(source)
    state = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    if drop_projector:
        state = {k: v for k, v in state.items() if "mm_projector" not in k}
    tokenizer = builders.byte_tokenizer()
    size = len(tokenizer)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(state):
        state[name] = state[name][torch.arange(size) % state[name].shape[0]]
    write_config(folder, dict(checkpoint.config, vocab_size=size, mm_vision_tower="towers/clip"))
    (folder / "towers").mkdir()
    (folder / "towers" / "clip").symlink_to(golden_tower(source).absolute())
    if safetensors:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save({**state, **rotary_tables(checkpoint.config)}, folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    return folder


def rotary_tables(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What transformers 4.31 saved beside the weights, in float32 whatever their dtype; nothing reads them."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    names = (f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config["num_hidden_layers"]))
    return {name: torch.ones(half) for name in names}


def language_model(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """The language model of an original checkpoint, as published by itself."""
    kind = TEXT_MODELS[config["architectures"][0]]
    architecture = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    }[kind]
    own = {k: v for k, v in config.items() if not k.startswith("mm_")}
    write_config(folder, {**own, "architectures": [architecture], "model_type": kind})
    torch.save({k: v for k, v in state.items() if k.startswith(LANGUAGE_MODEL)}, folder / "pytorch_model.bin")
    return folder


def golden_tower(source: Path) -> Path:
    """The folder of the tower that a golden checkpoint names."""
    tower = find_part(json.loads((source / "config.json").read_text())["mm_vision_tower"], source)
    assert tower is not None, "the golden folder holds its tower"
    return tower


def link_tower(folder: Path, name: str, source: Path) -> None:
    """Make the tower that a golden checkpoint names found from folders in ``folder`` too."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(golden_tower(source).absolute())


def trained_beside(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is saved apart from the language model: the projector, and a tower only if it was trained."""
    own = {k: v for k, v in state.items() if not k.startswith(LANGUAGE_MODEL)}
    trained = config.get("unfreeze_mm_vision_tower")
    return own if trained else {k: v for k, v in own.items() if "vision_tower" not in k}


def projector_only(golden: Path, host: str, folder: Path, base: str = "vicuna") -> Path:
    """A golden checkpoint taken apart: folder/projector, folder/vicuna and folder/openai."""
    source = golden / host / "checkpoint"
    state = golden_tensors(source)
    config = {**json.loads((source / "config.json").read_text()), "_name_or_path": base}
    language_model(folder / "vicuna", config, state)
    write_config(folder / "projector", config)
    mine = trained_beside(state, config)
    torch.save(mine, folder / "projector" / "mm_projector.bin")
    link_tower(folder, config["mm_vision_tower"], source)
    return folder / "projector"


def lora_folder(golden: Path, host: str, folder: Path, *, base: str = "vicuna", **changes: object) -> Path:
    """Likewise with LoRA: merged, folder/lora and folder/vicuna make up the golden checkpoint."""
    rank, alpha = 3, 6
    source = golden / host / "checkpoint"
    state = golden_tensors(source)
    config = json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for name in sorted(state):
        if name.endswith(("q_proj.weight", "down_proj.weight")) and name.startswith("model.layers"):
            out, inside = state[name].shape
            down = torch.randn(rank, inside, generator=generator) / 10
            up = torch.randn(out, rank, generator=generator) / 10
            state[name] = state[name] - alpha / rank * (up @ down)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    language_model(folder / "vicuna", config, state)
    write_config(folder / "lora", config)
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": base,
        "target_modules": ["q_proj", "down_proj"], "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    torch.save(adapter, folder / "lora" / "adapter_model.bin")
    mine = {f"base_model.model.{k}": v for k, v in trained_beside(state, config).items()}
    torch.save(mine, folder / "lora" / "non_lora_trainables.bin")
    link_tower(folder, config["mm_vision_tower"], source)
    return folder / "lora"


def first_llava(
    folder: Path, name: str = "llava-med-7b-delta", *, start_end: bool = True, delta: bool = False
) -> Path:
    """A checkpoint of the first releases: one Linear, <im_patch> and its like in the tokenizer, 28 px tower beside."""
    torch.manual_seed(3)
    clip = folder / "openai" / "clip-vit-large-patch14"
    CLIPVisionModel(builders.tower_config(hidden_act="quick_gelu")).save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(clip)
    tokenizer = builders.byte_tokenizer()
    tokenizer.add_tokens(["[PAD]", "<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    state = LlamaForCausalLM(text).state_dict()
    projector = torch.nn.Linear(32, 48)
    state |= {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
    if delta:
        state["model.norm.weight"] = state["model.norm.weight"] * 1e-3
    write_config(
        folder,
        {
            **text.to_dict(), "_name_or_path": name, "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 32,
            "mm_vision_select_layer": -2, "mm_use_im_start_end": start_end, "use_mm_proj": True,
        },
    )  # fmt: skip
    torch.save(state, folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_tokenizer(folder: Path, tokenizer_class: str = "LlamaTokenizer") -> None:
    """A small model trained with LLaMA's settings, and a tokenizer_config.json as vicuna has it."""
    words = SENTENCE.split(" ")
    text = folder / "corpus.txt"
    text.write_text("\n".join(" ".join(words[i % 7 : i % 7 + 6]) for i in range(300)))
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=310, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    text.unlink()
    settings = {
        "tokenizer_class": tokenizer_class, "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_sentencepiece(
    golden: Path, host: str, folder: Path, tokenizer_class: str = "LlamaTokenizer"
) -> Path:
    """An original checkpoint whose tokenizer is a SentencePiece model and nothing else."""
    source = original_llava(golden, host, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    sentencepiece_tokenizer(source, tokenizer_class)
    return source
