"""Janus-Pro checkpoints in the original layout: every tensor name as published, in any size."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE_TOKENS = ("<begin_of_image>", "<end_of_image>", "<image_placeholder>")


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a Janus; the defaults are tiny, with a generator of two levels."""

    hidden: int = 32
    layers: int = 2
    inter: int = 48
    heads: int = 2
    vocab: int = 264
    width: int = 64
    blocks: int = 3
    mlp: int = 100
    patch: int = 8
    grid: int = 4
    base: int = 32
    mults: tuple[int, ...] = (1, 2)
    res: int = 1
    latent: int = 16
    codes: int = 24

    @property
    def image(self) -> int:
        return self.patch * self.grid


PRO_7B = Sizes(
    hidden=4096, layers=30, inter=11008, heads=32, vocab=102400, width=1024, blocks=24, mlp=4096, patch=16, grid=24,
    base=128, mults=(1, 1, 2, 2, 4), res=2, latent=256, codes=16384,
)  # fmt: skip
PRO_1B = Sizes(**{**vars(PRO_7B), "hidden": 2048, "layers": 24, "inter": 5632, "heads": 16})


def config(sizes: Sizes) -> dict[str, Any]:
    """config.json of the original layout; what is not said of the language model is LLaMA's default."""
    mlp = {"depth": 2, "n_embed": sizes.hidden, "projector_type": "mlp_gelu"}
    language = {
        "hidden_size": sizes.hidden, "intermediate_size": sizes.inter, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.heads, "vocab_size": sizes.vocab,
        "max_position_embeddings": 16384, "model_type": "llama", "torch_dtype": "bfloat16",
    }  # fmt: skip
    siglip = {
        "image_size": sizes.image, "model_name": "siglip_large_patch16_384", "select_feature": "same",
        "select_layer": -1,
    }  # fmt: skip
    head = {"image_token_embed": sizes.hidden, "image_token_size": sizes.codes, "n_embed": sizes.hidden}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": siglip},
        "aligner_config": {"cls": "MlpProjector", "params": {**mlp, "input_dim": sizes.width}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {**mlp, "input_dim": 8}},
        "gen_head_config": {"cls": "vision_head", "params": head},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": sizes.codes, "n_embed": 8}},
        "language_config": language,
        "torch_dtype": "bfloat16",
    }


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of an original checkpoint."""
    language, hidden = "language_model.model.", sizes.hidden
    found = {
        **dict(_siglip("vision_model.vision_tower.", sizes)),
        **dict(_linear("aligner.layers.0", hidden, sizes.width)),
        **dict(_linear("aligner.layers.2", hidden, hidden)),
        **dict(_vq("gen_vision_model.", sizes)),
        **dict(_linear("gen_aligner.layers.0", hidden, 8)),
        **dict(_linear("gen_aligner.layers.2", hidden, hidden)),
        **dict(_linear("gen_head.output_mlp_projector", hidden, hidden)),
        **dict(_linear("gen_head.vision_head", sizes.codes, hidden)),
        "gen_embed.weight": (sizes.codes, 8),
        f"{language}embed_tokens.weight": (sizes.vocab, hidden),
    }
    for i in range(sizes.layers):
        layer = f"{language}layers.{i}."
        found |= {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        found |= {f"{layer}mlp.{x}_proj.weight": (sizes.inter, hidden) for x in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (hidden, sizes.inter)
        found |= {f"{layer}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    return found | {
        f"{language}norm.weight": (hidden,),
        "language_model.lm_head.weight": (sizes.vocab, hidden),
    }


def write(folder: Path, sizes: Sizes, *, shards: int = 1, seed: int = 0) -> Path:
    """A checkpoint with random weights in safetensors, with the image processor's file and without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator) / max(s[-1], 16) ** 0.5 for n, s in shapes(sizes).items()}
    folder.mkdir(parents=True)
    names = list(state)
    files = {f"model-{k + 1:05d}-of-{shards:05d}.safetensors": names[k::shards] for k in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, own in files.items() for name in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, own in files.items():
        save_file({name: state[name] for name in own}, folder / file)
    (folder / "config.json").write_text(json.dumps(config(sizes)))
    write_pixels(folder, sizes.image)
    return folder


def write_pixels(folder: Path, image_size: int) -> None:
    """preprocessor_config.json as published."""
    half = [0.5, 0.5, 0.5]
    settings = {
        "background_color": [127, 127, 127], "do_normalize": True, "image_mean": half, "image_std": half,
        "image_processor_type": "VLMImageProcessor", "image_size": image_size, "min_size": 14,
        "processor_class": "VLChatProcessor", "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_tokenizer(folder: Path, *, left_out: str = "", merges: Sequence[tuple[str, str]] = ()) -> None:
    """A byte-level tokenizer in the files of the published one: it names a class that reads it wrongly, and its
    tokenizer.json does not add the first token, though tokenizer_config.json says so. A merge adds a token."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(words)}, merges=[*merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = [BOS, EOS, PAD, *IMAGE_TOKENS, "<|User|>", "<|Assistant|>"]
    tokenizer.add_special_tokens([token for token in specials if token != left_out])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "model_max_length": 16384, "tokenizer_class": "LlamaTokenizerFast", "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    named: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    named["additional_special_tokens"] = [token for token in specials[3:] if token != left_out]
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    chat = {"image_tag": "<image_placeholder>", "num_image_tokens": 576, "processor_class": "VLChatProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(chat))


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _conv(name: str, out: int, into: int, side: int) -> Shapes:
    yield f"{name}.weight", (out, into, side, side)
    yield f"{name}.bias", (out,)


def _siglip(tower: str, sizes: Sizes) -> Shapes:
    """timm's VisionTransformer without class token, with its pooling head."""
    width = sizes.width
    yield f"{tower}pos_embed", (1, sizes.grid**2, width)
    yield from _conv(f"{tower}patch_embed.proj", width, 3, sizes.patch)
    for i in range(sizes.blocks):
        block = f"{tower}blocks.{i}."
        yield from _norm(f"{block}norm1", width)
        yield from _linear(f"{block}attn.qkv", 3 * width, width)
        yield from _linear(f"{block}attn.proj", width, width)
        yield from _norm(f"{block}norm2", width)
        yield from _linear(f"{block}mlp.fc1", sizes.mlp, width)
        yield from _linear(f"{block}mlp.fc2", width, sizes.mlp)
    yield from _norm(f"{tower}norm", width)
    pool = f"{tower}attn_pool."
    yield f"{pool}latent", (1, 1, width)
    yield from _linear(f"{pool}q", width, width)
    yield from _linear(f"{pool}kv", 2 * width, width)
    yield from _linear(f"{pool}proj", width, width)
    yield from _norm(f"{pool}norm", width)
    yield from _linear(f"{pool}mlp.fc1", sizes.mlp, width)
    yield from _linear(f"{pool}mlp.fc2", width, sizes.mlp)


def _vq(model: str, sizes: Sizes) -> Shapes:
    """VQ-16 of janus/models/vq_model.py."""
    widths = [sizes.base * m for m in sizes.mults]
    last, coarse = len(widths) - 1, widths[-1]
    yield from _conv(f"{model}encoder.conv_in", sizes.base, 3, 3)
    into = sizes.base
    for level, width in enumerate(widths):
        block = f"{model}encoder.conv_blocks.{level}."
        yield from _level(block, into, width, sizes.res, attends=level == last)
        if level != last:
            yield from _conv(f"{block}downsample.conv", width, width, 3)
        into = width
    yield from _middle(f"{model}encoder.", coarse)
    yield from _conv(f"{model}encoder.conv_out", sizes.latent, coarse, 3)
    yield from _conv(f"{model}decoder.conv_in", coarse, sizes.latent, 3)
    yield from _middle(f"{model}decoder.", coarse, at_end=widths[0])
    into = coarse
    for number, width in enumerate(reversed(widths)):
        block = f"{model}decoder.conv_blocks.{number}."
        yield from _level(block, into, width, sizes.res + 1, attends=number == 0)
        if number != last:
            yield from _conv(f"{block}upsample.conv", width, width, 3)
        into = width
    yield from _conv(f"{model}decoder.conv_out", 3, widths[0], 3)
    yield f"{model}quantize.codebook_used", (65536,)
    yield f"{model}quantize.embedding.weight", (sizes.codes, 8)
    yield from _conv(f"{model}quant_conv", 8, sizes.latent, 1)
    yield from _conv(f"{model}post_quant_conv", sizes.latent, 8, 1)


def _level(block: str, into: int, width: int, number: int, *, attends: bool) -> Shapes:
    for i in range(number):
        yield from _residual(f"{block}res.{i}.", into if i == 0 else width, width)
        if attends:
            yield from _attention(f"{block}attn.{i}.", width)


def _middle(half: str, width: int, at_end: int | None = None) -> Shapes:
    yield from _residual(f"{half}mid.0.", width, width)
    yield from _attention(f"{half}mid.1.", width)
    yield from _residual(f"{half}mid.2.", width, width)
    yield from _norm(f"{half}norm_out", at_end or width)


def _residual(block: str, into: int, width: int) -> Shapes:
    yield from _norm(f"{block}norm1", into)
    yield from _conv(f"{block}conv1", width, into, 3)
    yield from _norm(f"{block}norm2", width)
    yield from _conv(f"{block}conv2", width, width, 3)
    if into != width:
        yield from _conv(f"{block}nin_shortcut", width, into, 1)


def _attention(block: str, width: int) -> Shapes:
    yield from _norm(f"{block}norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{block}{part}", width, width, 1)


def changed(folder: Path, **fields: Any) -> Path:
    """Fields of a folder's config.json replaced; None takes one away."""
    path = folder / "config.json"
    settings: Mapping[str, Any] = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder
