"""The folders in which other libraries read a CLIP with both towers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.paired.clip_text import OPEN_CLIP_TEXT
from mgll_encoder.paired.whole_clip import WholeClip
from mgll_encoder.tower.architectures.clip import OPEN_CLIP_RULES, PROJECTION
from mgll_encoder.tower.card import Contents
from mgll_encoder.tower.model import vision_config
from mgll_encoder.tower.preprocess import image_processor
from mgll_encoder.weights.keytable import renamed_back

_OPEN_CLIP_RESIZE = {"squash": "squash", "crop": "shortest"}
_EPS = 1e-5


def write_transformers(clip: WholeClip, folder: Path) -> None:
    """Write a ``CLIPModel`` with tokenizer and image processor, as all releases of transformers since 4.49 read it."""
    tensors = {
        **{f"vision_model.{name}": tensor for name, tensor in clip.image.items()},
        **{f"text_model.{name}": tensor for name, tensor in clip.text.items()},
        PROJECTION: clip.image_projection,
        "text_projection.weight": clip.text_projection,
        "logit_scale": clip.logit_scale,
    }
    config = CLIPConfig(
        text_config=clip.text_config.to_dict(),
        vision_config=vision_config(clip.spec).to_dict(),
        projection_dim=len(clip.text_projection),
        logit_scale_init_value=float(clip.logit_scale),
    )
    config.architectures, config.dtype = ["CLIPModel"], clip.image_projection.dtype
    with torch.device("meta"):
        CLIPModel(config).load_state_dict(tensors, assign=True)  # every tensor is there, with its shape
    config.save_pretrained(folder)
    image_processor(clip.spec).save_pretrained(folder)
    _save(tensors, clip, folder / "model.safetensors")


def write_open_clip(clip: WholeClip, folder: Path) -> None:
    """Write a folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` and ``get_tokenizer``.

    Raises:
        IncompatibleTowerError: open_clip's model has no such activation, LayerNorm or preprocessing.
    """
    text, spec = clip.text_config, clip.spec
    same = spec.activation == text.hidden_act
    settings: Mapping[str, tuple[bool, Any]] = {
        "activation": (
            spec.activation in ("gelu", "quick_gelu") and same,
            f"{spec.activation}, {text.hidden_act}",
        ),
        "layer_norm_eps": (spec.layer_norm_eps == text.layer_norm_eps == _EPS, spec.layer_norm_eps),
        "resize": (spec.resize in _OPEN_CLIP_RESIZE, spec.resize),
    }
    for name, (possible, found) in settings.items():
        if not possible:
            raise IncompatibleTowerError(
                f"open_clip cannot express '{name}' of this CLIP, {found}: write it for transformers with `to=clip`"
            )
    image = renamed_back(OPEN_CLIP_RULES, {**clip.image, PROJECTION: clip.image_projection})
    tensors = {
        **{f"visual.{name}": tensor for name, tensor in image.items()},
        **renamed_back(OPEN_CLIP_TEXT, clip.text),
        "text_projection": clip.text_projection.T,
        "logit_scale": clip.logit_scale,
    }
    content = {"model_cfg": _model_cfg(clip), "preprocess_cfg": _preprocess_cfg(clip)}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _save(tensors, clip, folder / "open_clip_model.safetensors")


def _model_cfg(clip: WholeClip) -> dict[str, Any]:
    text, spec = clip.text_config, clip.spec
    return {
        "embed_dim": len(clip.text_projection),
        "quick_gelu": spec.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": spec.image_size,
            "patch_size": spec.patch_size,
            "layers": spec.depth,
            "width": spec.width,
            "head_width": spec.width // spec.heads,
            "mlp_ratio": spec.mlp_width / spec.width,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": ".",  # the tokenizer of the folder
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }


def _preprocess_cfg(clip: WholeClip) -> dict[str, Any]:
    return {
        "mean": list(clip.spec.mean),
        "std": list(clip.spec.std),
        "interpolation": "bicubic",
        "resize_mode": _OPEN_CLIP_RESIZE[clip.spec.resize],
    }


def _save(tensors: Mapping[str, Tensor], clip: WholeClip, file: Path) -> None:
    save_file({name: one.detach().contiguous() for name, one in tensors.items()}, file, {"format": "pt"})
    clip.tokenizer.save_pretrained(file.parent)


@dataclass(frozen=True)
class Form:
    """A folder in which a library reads a CLIP.

    Attributes:
        write: Writes the CLIP into an empty folder.
        contents: What it contains, for the model card.
    """

    write: Callable[[WholeClip, Path], None]
    contents: Contents


def _both(library: str, use: str) -> Contents:
    return Contents(library, "zero-shot-image-classification", "image and text tower", "A CLIP:", use)


FORMS: Mapping[str, Form] = {
    "clip": Form(
        write_transformers,
        _both(
            "transformers",
            """\
    from transformers import pipeline
    classify = pipeline("zero-shot-image-classification", model=folder)
    classify(image, candidate_labels=["normal", "glaucoma"], hypothesis_template="{}")
""",
        ),
    ),
    "open-clip": Form(
        write_open_clip,
        _both(
            "open_clip",
            """\
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, texts = model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer(["glaucoma"]))
""",
        ),
    ),
}
"""Values of ``to`` besides ``vision``."""
