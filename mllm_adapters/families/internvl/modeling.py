"""InternVL with a tower of any class, and with the pixel shuffle of its first releases.

The stock class always coerces its tower's configuration to InternViT, and supports only one pixel shuffle.
After transformers 5.23.0 (models/internvl) and OpenGVLab/InternVL 2410d1d
(internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py).
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.internvl.modeling_internvl import InternVLPreTrainedModel
from transformers.processing_utils import ProcessorMixin


@strict
class MgllInternVLConfig(InternVLConfig):
    """Configuration of an InternVL whose ``vision_config`` may be of any model type.

    Attributes:
        ps_version: Order of the visual tokens: ``v2`` row by row, as in the stock class; ``v1`` column by column, as
            in InternVL-Chat-V1-1 and V1-2.
    """

    model_type = "mgll_internvl"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        **InternVLConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
    }

    ps_version: Literal["v1", "v2"] = "v2"
    vision_feature_layer: int | list[int] = -2


class MgllInternVLModel(InternVLModel):
    """The stock model without its head, with a configurable order of visual tokens."""

    config: MgllInternVLConfig

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
        """Merge neighboring patches: [n, H, W, C] -> [n, H·s, W·s, C/s²], transposed under ``ps_version`` v1."""
        shuffled: Tensor = super().pixel_shuffle(vision_features, scale_factor)
        return shuffled.transpose(1, 2).contiguous() if self.config.ps_version == "v1" else shuffled


class MgllInternVLForConditionalGeneration(InternVLForConditionalGeneration):
    """The stock model with a tower of any class that transformers knows."""

    config: MgllInternVLConfig

    def __init__(self, config: MgllInternVLConfig) -> None:
        # Not the parent's own: it would build the whole stock model only to discard it.
        InternVLPreTrainedModel.__init__(self, config)
        self.model = MgllInternVLModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class MgllInternVLProcessor(ProcessorMixin):
    """Processor for InternVL with any image processor, and tiles only if that makes them.

    The stock processor always cuts images into tiles, and supports no image processor that crops or pads.

    Args:
        image_processor: Returns ``pixel_values`` [tiles, 3, S, S] and optionally ``num_patches``, the tiles
            per image.
        tokenizer: Has the three tokens below.
        image_seq_length: Visual tokens per tile.
        image_token: Placeholder for an image in a text, and for one visual token in a prompt.
        start_image_token: Token before the visual tokens of an image.
        end_image_token: Token after them.
        chat_template: Jinja template of the conversation format.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        image_token: str = "<IMG_CONTEXT>",
        start_image_token: str = "<img>",
        end_image_token: str = "</img>",
        chat_template: str | None = None,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.start_image_token = start_image_token
        self.end_image_token = end_image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def unused_input_names(self) -> list[str]:
        """Return the outputs of the image processor that the model does not use."""
        return ["num_patches"]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """Return the text that replaces an image."""
        tiles = image_inputs["num_patches"][image_idx] if "num_patches" in image_inputs else 1
        return (
            self.start_image_token
            + self.image_token * self.image_seq_length * int(tiles)
            + self.end_image_token
        )
