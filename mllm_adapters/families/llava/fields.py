"""LLaVA: the used fields of its configuration files.

Fields and defaults after LLaVA c121f04 (llava/model/builder.py, llava/model/multimodal_projector/builder.py),
LLaVA-Med v1.0.0 (llava/model/llava.py), HuatuoGPT-Vision 546b25f (cli.py, llava/model/llava_arch.py) and PEFT's
LoraConfig.
"""

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any, Literal

from pydantic import BaseModel, Field

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters.core.configs import read_fields
from mllm_adapters.core.known_towers import short_name
from mllm_adapters.core.not_read import LLAVA_WORKS

TEXT_MODELS: Mapping[str, str] = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwen2ForCausalLM": "qwen2",  # HuatuoGPT-Vision
    "LlavaQwenForCausalLM": "qwen2",  # LLaVA-NeXT's code; only plain LLaVAs are supported
}
"""``architectures[0]`` of the original layout -> transformers model_type of its language model."""

READS_ITS_SHARDS = {"qwen2"}
"""Language models whose LLaVA loads the tower in its shards, trained or not (HuatuoGPT-Vision's cli.py)."""

NO_CLIP = re.compile(
    r"biomed_?clip|siglip|mobileclip|fastvit|eva[-_]?(?:\d|clip)|dino|convnext|imagebind|languagebind",
    re.IGNORECASE,
)
"""Names of towers that are not a CLIP ViT: they have other tensors or another pooling."""


class CommonFields(BaseModel):
    """The used fields of a config.json in either layout."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None


class OriginalFields(CommonFields):
    """The used fields of an original config.json, with the original code's defaults and the supported values."""

    architectures: list[str]
    mm_vision_tower: str = Field(min_length=1)
    mm_hidden_size: int | None = Field(default=None, gt=0)
    mm_projector_type: Literal["mlp2x_gelu", "mlp1x_gelu", "linear"] = "linear"
    mm_resampler_type: None = None
    mm_patch_merge_type: Literal["flat"] | None = None
    s2: Literal[False] | None = None
    mm_vision_select_layer: int | None = None
    mm_vision_select_feature: Literal["patch", "cls_patch"] = "patch"
    image_aspect_ratio: Literal["pad", "square"] | None = None
    mm_use_im_start_end: bool = False
    unfreeze_mm_vision_tower: bool | None = False
    mm_tunable_parts: str | None = None
    tie_word_embeddings: bool = False

    @property
    def feature_layer(self) -> int:
        """Return the index into the tower's hidden states; the default of the first release is the last layer."""
        if self.mm_vision_select_layer is not None:
            return self.mm_vision_select_layer
        return -2 if "mm_projector_type" in self.model_fields_set else -1

    @property
    def tower_was_trained(self) -> bool:
        """Whether the tower's own weights were trained, according to LLaVA's or LLaVA-NeXT's field."""
        return bool(self.unfreeze_mm_vision_tower) or "mm_vision_tower" in (self.mm_tunable_parts or "")


class NativeFields(CommonFields):
    """The used fields of a config.json in the transformers layout, with the defaults of ``LlavaConfig``."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_token_index: int | None = None
    image_token_id: int | None = None

    @property
    def placeholder(self) -> int:
        """Return the id of the image placeholder, under its old or new name."""
        return next((i for i in (self.image_token_index, self.image_token_id) if i is not None), 32000)


class AdapterFields(BaseModel):
    """The used fields of an adapter_config.json; methods other than ``W + scale * B @ A`` are refused."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: int = Field(gt=0)
    lora_alpha: float
    use_rslora: bool = False
    use_dora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    bias: Literal["none"] = "none"
    lora_bias: Literal[False] = False
    rank_pattern: dict[str, int] = Field(default_factory=dict, max_length=0)
    alpha_pattern: dict[str, float] = Field(default_factory=dict, max_length=0)
    init_lora_weights: bool | Literal["gaussian"] = True

    @property
    def scale(self) -> float:
        """Return the factor of the product of the two matrices."""
        return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)


def original_fields(config: Mapping[str, Any], where: str) -> OriginalFields:
    """Read the fields of an original config.json.

    Raises:
        UserError: a field is missing, of another type, or has an unsupported value.
    """
    tower = str(config.get("mm_vision_tower"))
    if found := NO_CLIP.search(short_name(tower)):
        raise UnsupportedCheckpointError(
            f"{where}: mm_vision_tower is {tower!r}: checkpoints with a {found[0]} tower are not supported, "
            f"only those with OpenAI's CLIP: {LLAVA_WORKS}"
        )
    return read_fields(OriginalFields, config, where)


def text_model(config: Mapping[str, Any]) -> str | None:
    """Return the transformers model_type of the language model in an original configuration; None for others."""
    names = config.get("architectures")
    return TEXT_MODELS.get(str(names[0])) if isinstance(names, list) and names else None


def first_release(config: Mapping[str, Any]) -> bool:
    """Whether an original configuration is of the first release: a single linear projector, prompts with ###."""
    return "mm_projector_type" not in config


def owner(config: Mapping[str, Any]) -> str | None:
    """Return the name of the family that an original configuration belongs to, or None.

    LLaVA-Med v1.0 has LLaVA's architecture and keys; they differ only in the saved name.
    """
    if text_model(config) is None or "mm_vision_tower" not in config:
        return None
    named = re.search(r"llava[-_ ]?med", str(config.get("_name_or_path")), re.IGNORECASE)
    medical = text_model(config) == "mistral" or (first_release(config) and named)
    return "llava-med" if medical else "llava"
