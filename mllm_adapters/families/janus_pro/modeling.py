"""Janus with a CLIP vision tower for understanding; image generation is unchanged.

transformers' own Janus always builds its SigLIP tower, and takes the generator's grid from the understanding
tower; here each has its own. Parts and forward pass are those of transformers
(models/janus/modeling_janus.py); features are read as in LLaVA.
"""

from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BatchFeature,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.janus import (
    JanusPreTrainedModel,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)
from transformers.models.janus.modeling_janus import (
    JanusVisionAlignerMLP,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)


class MgllJanusConfig(JanusConfig):
    """Configuration of `MgllJanusForConditionalGeneration`.

    Attributes:
        vision_config: The new tower, a ``clip_vision_model``; it also gets ``num_image_tokens``, which
            transformers uses as the number of tokens of the *generator*.
        vq_config: The generator; its ``num_patches`` is the side of its own grid and is unchanged.
        vision_feature_layer: Hidden state of the tower that the aligner reads.
        vision_feature_select_strategy: ``default`` without the class token, ``full`` with it.
        aligner_depth: Linear layers of the aligner.
        aligner_hidden_act: Activation between them.
        boi_token_id: Id of the begin-of-image token, for image generation; None if unknown.
    """

    model_type = "mgll_janus"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        **JanusConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
    }

    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    aligner_depth: int = 2
    aligner_hidden_act: str = "gelu"
    boi_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given: Any = self.vq_config if self.vq_config is not None else {}
        side = given.num_patches if isinstance(given, JanusVQVAEConfig) else given.get("num_patches")
        super().__post_init__(**kwargs)  # sets the generator's grid to the tower's
        vision: Any = self.vision_config
        generator: Any = self.vq_config
        generator.num_patches = JanusVQVAEConfig().num_patches if side is None else side
        vision.num_image_tokens = generator.num_patches**2


class MgllJanusModel(JanusModel):
    """`JanusModel` with the understanding tower of its configuration."""

    config: MgllJanusConfig

    def __init__(self, config: MgllJanusConfig) -> None:
        # JanusModel.__init__ would build a SigLIP tower of these dimensions.
        JanusPreTrainedModel.__init__(self, config)
        vision: Any = config.vision_config
        generator: Any = config.vq_config
        text: Any = config.text_config
        self.vision_model = AutoModel.from_config(vision, trust_remote_code=False)
        self.aligner = JanusVisionAlignerMLP(
            JanusVisionConfig(
                hidden_size=vision.hidden_size,
                projection_dim=text.hidden_size,
                depth=config.aligner_depth,
                hidden_act=config.aligner_hidden_act,
            )
        )
        self.vqmodel = JanusVQVAE._from_config(generator)
        self.generation_embeddings = nn.Embedding(generator.num_embeddings, generator.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(generator)
        self.generation_head = JanusVQVAEHead(generator)
        self.language_model = AutoModel.from_config(text, trust_remote_code=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Compute the visual tokens of images.

        Args:
            pixel_values: Prepared images [N, 3, S, S].
            kwargs: For the tower.

        Returns:
            The tower's output, with the visual tokens [N, tokens, hidden] as ``pooler_output``.
        """
        kwargs |= {"return_dict": True, "output_hidden_states": True}
        seen: BaseModelOutputWithPooling = self.vision_model(pixel_values, **kwargs)
        assert seen.hidden_states is not None
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        features = seen.hidden_states[self.config.vision_feature_layer][:, first:]
        seen.pooler_output = self.aligner(features)
        return seen


class MgllJanusForConditionalGeneration(JanusForConditionalGeneration):
    """Janus with a CLIP tower for image understanding; image generation is unchanged."""

    config: MgllJanusConfig
    _no_split_modules = ["CLIPEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012 (as in transformers)

    def __init__(self, config: MgllJanusConfig) -> None:
        JanusPreTrainedModel.__init__(self, config)
        self.model = MgllJanusModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in the parent class; ``generation_mode="image"`` generates an image and returns its tokens."""
        settings: Any = self.generation_config
        if not hasattr(settings, "generation_kwargs") and self.config.boi_token_id is not None:
            settings.generation_kwargs = {"boi_token_id": self.config.boi_token_id}  # read by the parent
        return super().generate(*args, **kwargs)


class MgllJanusProcessor(JanusProcessor):
    """`JanusProcessor` with any image processor for the tower, which need not support generated images."""

    def postprocess(self, images: Any, **kwargs: Any) -> BatchFeature:  # noqa: ARG002 (return_tensors)
        """Convert the output of ``decode_image_tokens`` to images.

        Args:
            images: Generated images [S, S, 3], values in [-1, 1] for any tower (deepseek-ai/Janus,
                generation_inference.py).
            kwargs: The parent's options for the output type; here it is always images.
        """
        scaled = [((image.float() + 1) * 127.5).clamp(0, 255).byte().cpu().numpy() for image in images]
        return BatchFeature({"pixel_values": [Image.fromarray(values) for values in scaled]})
