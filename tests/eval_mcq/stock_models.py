"""Tiny random models of architectures that no family of this project reads, as their authors publish them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.builders import CHAT_TEMPLATE, byte_tokenizer

LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def tokenizer(*specials: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer, with the special tokens of an architecture."""
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<image>", *specials]})
    return made


def write(folder: Path, config: dict, processor: object) -> Path:
    """Write a model with weights large enough that its answers differ, and its processor."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForImageTextToText.from_config(settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: an image in views of 28 px, as many as its shape asks for."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    words = tokenizer()
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    images = LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
    config = {
        "model_type": "llava_onevision", "text_config": {**LLAMA, "vocab_size": len(words)}, "vision_config": SIGLIP,
        "image_token_index": 3, "video_token_index": 2, "image_grid_pinpoints": pinpoints, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    processor = LlavaOnevisionProcessor(
        image_processor=images, tokenizer=words, video_processor=LlavaOnevisionVideoProcessor(), num_image_tokens=4,
        vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return write(folder, config, processor)


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT (1.6): the same cut, with CLIP."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    words = tokenizer()
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    vision = {**SIGLIP, "model_type": "clip_vision_model"}
    config = {
        "model_type": "llava_next", "text_config": {**LLAMA, "vocab_size": len(words)}, "vision_config": vision,
        "image_token_index": 3, "image_grid_pinpoints": pinpoints, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    processor = LlavaNextProcessor(
        image_processor=images, tokenizer=words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    return write(folder, config, processor)


def smolvlm(folder: Path) -> Path:
    """SmolVLM (Idefics3's architecture): tiles in rows and columns, and the whole image."""
    return _idefics3(folder, "smolvlm")


def idefics3(folder: Path) -> Path:
    """Idefics3."""
    return _idefics3(folder, "idefics3")


def _idefics3(folder: Path, kind: str) -> Path:
    from transformers import (
        Idefics3ImageProcessor,
        Idefics3Processor,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    rows = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    words = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    settings = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    make_images, make = {
        "smolvlm": (SmolVLMImageProcessor, SmolVLMProcessor), "idefics3": (Idefics3ImageProcessor, Idefics3Processor),
    }[kind]  # fmt: skip
    vision = {**SIGLIP, "model_type": f"{kind}_vision", "image_size": 56}
    config = {
        "model_type": kind, "text_config": {**LLAMA, "vocab_size": len(words)}, "vision_config": vision,
        "image_token_id": 3, "scale_factor": 2, "pad_token_id": 0,
    }  # fmt: skip
    extra = {"video_processor": SmolVLMVideoProcessor()} if kind == "smolvlm" else {}
    processor = make(
        image_processor=make_images(**settings),
        tokenizer=words,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
        **extra,
    )
    return write(folder, config, processor)


def gemma3(folder: Path) -> Path:
    """Gemma 3, MedGemma: image tokens that attend to each other in both directions, sliding windows."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    words = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        image_token="<image>", boi_token="<start_of_image>", eoi_token="<end_of_image>", padding_side="left",
    )  # fmt: skip
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<start_of_image>", "<end_of_image>"]})
    text = {
        **LLAMA, "model_type": "gemma3_text", "vocab_size": len(words), "head_dim": 12, "sliding_window": 64,
        "query_pre_attn_scalar": 12, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    }  # fmt: skip
    config = {
        "model_type": "gemma3", "text_config": text, "vision_config": SIGLIP, "mm_tokens_per_image": 4,
        "boi_token_index": words.convert_tokens_to_ids("<start_of_image>"),
        "eoi_token_index": words.convert_tokens_to_ids("<end_of_image>"), "image_token_index": 3,
    }  # fmt: skip
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    template = CHAT_TEMPLATE.replace("<image>\n", "<start_of_image>").replace(
        "{% for m", "{{ bos_token }}{% for m", 1
    )
    processor = Gemma3Processor(
        image_processor=images, tokenizer=words, image_seq_length=4, chat_template=template
    )
    return write(folder, config, processor)


def mllama(folder: Path) -> Path:
    """Llama 3.2 Vision: the image enters through cross-attention, in up to four tiles."""
    from transformers import MllamaImageProcessor, MllamaProcessor

    words = tokenizer("<|image|>")
    image = words.convert_tokens_to_ids("<|image|>")
    text = {
        **LLAMA, "model_type": "mllama_text_model", "vocab_size": len(words) - 1, "num_hidden_layers": 3,
        "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "model_type": "mllama_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_global_layers": 1, "attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    config = {
        "model_type": "mllama",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image,
    }
    images = MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = MllamaProcessor(
        image_processor=images, tokenizer=words, chat_template=CHAT_TEMPLATE.replace("<image>\n", "<|image|>")
    )
    return write(folder, config, processor)


STOCK: Mapping[str, Callable[[Path], Path]] = {
    "llava-onevision": llava_onevision,
    "llava-next": llava_next,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "mllama": mllama,
}
"""Architecture -> what writes a tiny one."""
