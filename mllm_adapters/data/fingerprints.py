"""Cache keys: hashes of a processor's text and pixel settings, and of modules."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn


def text_fingerprint(processor: Any) -> str:
    """Hash everything that decides the tokens of a conversation: tokenizers, chat template, settings."""
    backends = [
        value.backend_tokenizer.to_str() for _, value in sorted(vars(processor).items()) if _is_fast(value)
    ]
    special = json.dumps(processor.tokenizer.special_tokens_map, default=str, sort_keys=True)
    return _hash(*backends, special, processor.chat_template, _settings(processor))


def pixel_fingerprint(processor: Any) -> str:
    """Hash everything that decides the pixels of an image: settings, and the processor's output for a test card.

    The card detects changes outside the settings, such as a library release that resizes differently.
    """
    card = Image.linear_gradient("L").resize((61, 97))
    card = Image.merge("RGB", (card, card.rotate(90), card.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    made = processor(text=[processor.image_token], images=[card], return_tensors="pt")
    tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    return _hash(_settings(processor), *(f"{name} {_bytes_hash(tensors[name])}" for name in sorted(tensors)))


def modules_fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """Hash modules' classes, configurations, weights and buffers, and the library versions."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for name, module in sorted(modules.items()):
        digest.update(f"{name} {type(module).__qualname__} {module}".encode())
        config = getattr(module, "config", None)
        if config is not None:
            digest.update(json.dumps(config.to_dict(), default=str, sort_keys=True).encode())
        for key, value in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)} {_bytes_hash(value)}".encode())
    return digest.hexdigest()


def _settings(processor: Any) -> str:
    said = {"class": type(processor).__qualname__, **processor.to_dict()}
    return json.dumps(said, default=str, sort_keys=True)


def _is_fast(value: Any) -> bool:
    return getattr(value, "is_fast", False) is True


def _bytes_hash(value: torch.Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()  # supports the buffer protocol, which its type does not say
    return hashlib.sha256(data).hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
