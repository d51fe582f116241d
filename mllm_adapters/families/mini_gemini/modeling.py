"""Mini-Gemini (MGM): two towers, patch-info mining between them, and a LLaMA; not in transformers.

Behavior after dvlab-research/MGM 769820c (mgm/model/mgm_arch.py: ``encode_images``, ``unified_resampler``;
mgm/model/multimodal_encoder/openclip_encoder.py; mgm/eval/model_vqa.py for image preprocessing).
"""

from math import isqrt
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, Cache, ConvNextConfig, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from mllm_adapters.families.mini_gemini.processor import MiniGeminiProcessor, low_resolution, split_tiles

__all__ = ["MiniGeminiConfig", "MiniGeminiForConditionalGeneration", "MiniGeminiModel", "MiniGeminiProcessor"]


@strict
class MiniGeminiConfig(PreTrainedConfig):
    """Configuration of `MiniGeminiForConditionalGeneration`.

    Attributes:
        vision_config: The low-resolution tower, a ``clip_vision_model``.
        vision_config_aux: The high-resolution tower, a ``convnext``.
        text_config: The language model.
        image_token_id: Id of the image placeholder.
        image_seq_length: Placeholders per image, views taken together.
        vision_feature_layer: Index into the low-resolution tower's hidden states.
        image_size_aux: Side of the high-resolution image in pixels.
        image_grid: The image is cut into image_grid x image_grid tiles (HD: 2), each with its own tokens.
        image_global: Whether the whole image is a view in addition to its tiles.
        mining_width: Width in which queries and high-resolution cells are compared; differs from the tower's
            if the tower was replaced by one of another width.
        low_resolution_antialias: Whether low-resolution pixels are made with bicubic antialiasing, as in the
            new tower's training, or by the plain bilinear resize of the original code.
    """

    model_type = "mgll_mini_gemini"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "vision_config_aux": SubConfigSpec(config_class=ConvNextConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    vision_config_aux: Any = None
    text_config: Any = None
    image_token_id: int = 32000
    image_seq_length: int = 576
    vision_feature_layer: int = -2
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    mining_width: int = 1024
    low_resolution_antialias: bool = False
    tie_word_embeddings: bool = False


class HighResolutionTower(nn.Module):
    """A ConvNeXt without its head; returns all of its stages at the size of the first."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        sizes, depths = list(config.hidden_sizes or ()), list(config.depths or ())
        self.embeddings = ConvNextEmbeddings(config)
        self.stages = nn.ModuleList(
            ConvNextStage(config, sizes[max(i - 1, 0)], size, stride=2 if i else 1, depth=depth)
            for i, (size, depth) in enumerate(zip(sizes, depths, strict=True))
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [n, 3, A, A] to features [n, sum of the stages' widths, A / 4, A / 4]."""
        features, given = [], self.embeddings(pixels)
        for stage in self.stages:
            given = stage(given)
            features.append(given)
        size = features[0].shape[-2:]
        upsampled = [
            functional.interpolate(f.float(), size=size, mode="bilinear", align_corners=False).to(f.dtype)
            for f in features[1:]
        ]
        return torch.cat([features[0], *upsampled], dim=1)


def _normalized_linear(given: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(given), nn.Linear(given, width))


class MiniGeminiPreTrainedModel(PreTrainedModel):
    """Base of both model classes."""

    config_class = MiniGeminiConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012 (as transformers declares it; likewise below)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "ConvNextLayer", "LlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MiniGeminiModel(MiniGeminiPreTrainedModel):
    """Towers, mining, projector and language model, without the language modeling head."""

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__(config)
        aux, text = config.vision_config_aux, config.text_config
        width, cells = config.vision_config.hidden_size, sum(aux.hidden_sizes)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.vision_tower_aux = HighResolutionTower(aux)
        self.vlm_uni_query_projector = _normalized_linear(width, config.mining_width)
        self.vlm_uni_aux_projector = _normalized_linear(cells, config.mining_width)
        self.vlm_uni_val_projector = _normalized_linear(cells, width)
        self.mm_projector = nn.Sequential(
            nn.Linear(width, text.hidden_size), nn.GELU(), nn.Linear(text.hidden_size, text.hidden_size)
        )
        self.language_model = AutoModel.from_config(text, trust_remote_code=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor | None = None, pixel_values_aux: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Compute the visual tokens of images.

        Args:
            pixel_values: Low-resolution pixels [n, 3, S, S], in HD mode [n, views, 3, S, S] with the whole
                image last. If only one of the two is given, it is the high-resolution image, and the
                low-resolution views are made from it.
            pixel_values_aux: High-resolution pixels [n, 3, A, A] of the same images.

        Returns:
            ``pooler_output``: tokens [n, image_seq_length, hidden size], in HD mode the whole image before
            its tiles; ``last_hidden_state``: output of the low-resolution tower [n * views, patches, width].
        """
        config = self.config
        low, high = self._resolutions(pixel_values, pixel_values_aux)
        queries = self._low_features(low)
        cells = self.vision_tower_aux(high)
        views = split_tiles(cells, config.image_grid)
        if config.image_global:
            # By factor, as in the original: a given size may be rounded differently.
            whole = functional.interpolate(
                cells.float(), scale_factor=1 / config.image_grid, mode="bilinear", align_corners=False
            )
            views = torch.cat([views, whole[:, None].to(cells.dtype)], dim=1)
        tokens = self.mm_projector(queries + self.mine(queries, views.flatten(0, 1)))
        tokens = tokens.unflatten(0, (len(high), -1))
        if config.image_global:
            tokens = tokens.roll(1, dims=1)
        return BaseModelOutputWithPooling(last_hidden_state=queries, pooler_output=tokens.flatten(1, 2))

    def queries(self, pixel_values: Tensor | None = None, pixel_values_aux: Tensor | None = None) -> Tensor:
        """Compute only the low-resolution features [n * views, patches, width]; images as in `get_image_features`."""
        return self._low_features(self._resolutions(pixel_values, pixel_values_aux)[0])

    def _low_features(self, low: Tensor) -> Tensor:
        output = self.vision_tower(low.flatten(0, -4), output_hidden_states=True)
        hidden: Tensor = output.hidden_states[self.config.vision_feature_layer]
        return hidden[:, 1:]

    def mine(self, queries: Tensor, cells: Tensor) -> Tensor:
        """Apply patch-info mining: each low-resolution token attends to the high-resolution cells of its own patch.

        Args:
            queries: Low-resolution features [views, patches, width].
            cells: High-resolution features [views, channels, H, H]; H is a multiple of the patches along one side.

        Returns:
            The values to add to the queries, in their shape.
        """
        patches = split_tiles(cells, isqrt(queries.shape[1])).flatten(3).transpose(2, 3)
        attended = functional.scaled_dot_product_attention(
            self.vlm_uni_query_projector(queries)[:, :, None],
            self.vlm_uni_aux_projector(patches),
            self.vlm_uni_val_projector(patches),
        )
        return attended.squeeze(2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Compute the hidden states of a text with image placeholders; see `get_image_features`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is required")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        tokens = None
        if pixel_values is not None or pixel_values_aux is not None:
            if input_ids is None:
                raise ValueError("images need input_ids, whose placeholders give their positions")
            features: Any = self.get_image_features(pixel_values, pixel_values_aux)
            tokens = features.pooler_output.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != len(tokens):
                raise ValueError(
                    f"the text has {int(places.sum())} image placeholders, the images have {len(tokens)} "
                    "tokens"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], tokens)
        output = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        return LlavaModelOutputWithPast(**output, image_hidden_states=tokens)

    def _resolutions(self, pixels: Tensor | None, pixels_aux: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return low- and high-resolution pixels in the tower's dtype."""
        config = self.config
        high = pixels if pixels_aux is None else pixels_aux
        side, size = config.vision_config.image_size, config.image_size_aux
        if high is None or high.shape[-2:] != (size, size):
            found = "none" if high is None else "x".join(map(str, high.shape[-2:]))
            raise ValueError(f"high-resolution pixels must be {size}x{size}, found {found}")
        low = pixels
        if low is None or pixels_aux is None:
            low = low_resolution(
                high,
                side,
                grid=config.image_grid,
                whole=config.image_global,
                antialias=config.low_resolution_antialias,
            )
        return low.to(self.dtype), high.to(self.dtype)


class MiniGeminiForConditionalGeneration(MiniGeminiPreTrainedModel, GenerationMixin):
    """Mini-Gemini with its language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__(config)
        self.model = MiniGeminiModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor | None = None, pixel_values_aux: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """See `MiniGeminiModel.get_image_features`."""
        features: BaseModelOutputWithPooling = self.model.get_image_features(pixel_values, pixel_values_aux)
        return features

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Compute logits, and the loss if there are ``labels``; images as in `MiniGeminiModel.get_image_features`.

        Args:
            input_ids: Ids [n, length], with ``image_seq_length`` placeholders per image.
            pixel_values: Low-resolution pixels; alone, the high-resolution image.
            pixel_values_aux: High-resolution pixels.
            attention_mask: [n, length].
            position_ids: [n, length].
            past_key_values: Keys and values of the preceding tokens.
            inputs_embeds: Embeddings instead of ids, for text without images.
            labels: Ids [n, length], -100 where there is no loss.
            logits_to_keep: Number of last positions, or positions, whose logits are computed; 0 for all.
            **kwargs: For the language model and the loss (``shift_labels``, ``num_items_in_batch``).
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_aux=pixel_values_aux,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=output.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of one step: images are encoded once, and stay in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            # transformers handles only pixel_values
            inputs["pixel_values_aux"] = None
        return inputs
