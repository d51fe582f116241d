"""Qwen-VL of 2023: a vision tower, a one-layer cross-attention resampler, and a Qwen2 language model.

The first Qwen language model equals transformers' Qwen2 for sequences within its training context; beyond
that the original stretches its rotary base and scales its queries, which Qwen2 does not do. Longer sequences
are refused here (`SequenceTooLong`).

Architecture after modeling_qwen.py and visual.py of Qwen/Qwen-VL-Chat. The tower is either the original one or,
after a swap, a plain ``CLIPVisionModel`` read at its second-to-last layer.
"""

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers import Qwen2ForCausalLM as LanguageModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin

from mgll_encoder import resample_positions
from mgll_encoder.common.errors import UserError

LAYER_NORM_EPS = 1e-6
"""Epsilon of every LayerNorm in the original's visual part."""


class SequenceTooLong(UserError, ValueError):
    """A sequence is longer than the context in which this model equals the original."""


class QwenVisionConfig(PreTrainedConfig):
    """Configuration of the original tower: a ViT without class token.

    Attributes:
        num_positions: Rows of its position table, a square grid that is resampled to the image's grid.
    """

    model_type = "mgll_qwen_vision"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    num_positions: int = 256
    layer_norm_eps: float = LAYER_NORM_EPS
    initializer_range: float = 0.02


class QwenVLConfig(PreTrainedConfig):
    """Configuration of the whole.

    Attributes:
        vision_config: ``mgll_qwen_vision`` or ``clip_vision_model``.
        text_config: ``qwen2``; its ``max_position_embeddings`` is the maximum sequence length.
        vision_feature_layer: Index into the tower's hidden states; a class token is dropped.
        image_seq_length: Queries of the resampler, that is, visual tokens per image.
        resampler_heads: Its attention heads.
        kv_projection: Whether a linear layer projects features to the language model's width before
            attention.
        image_token_id: Id of the placeholder, one per visual token.
    """

    model_type = "mgll_qwen_vl"
    sub_configs_defaults = {  # noqa: RUF012 - as in transformers
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type=QwenVisionConfig.model_type),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    vision_config: Any = None
    text_config: Any = None
    vision_feature_layer: int = -1
    image_seq_length: int = 256
    resampler_heads: int = 32
    kv_projection: bool = True
    image_token_id: int = 151859
    tie_word_embeddings: bool = False


class Attention(nn.Module):
    """Multi-head attention with biases, for self- and cross-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from ``query`` [N, Q, C] to ``key`` and ``value`` [N, K, C]; returns [N, Q, C]."""
        parts = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        split = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(*split)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(-2))
        return output


class QwenVisionLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block with exact GELU."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config.hidden_size, config.num_attention_heads)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map features [N, L, C] to features [N, L, C]."""
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed)
        output: Tensor = hidden + self.fc2(F.gelu(self.fc1(self.ln_2(hidden))))
        return output


class QwenVisionTower(PreTrainedModel):
    """The original tower. Its normalization after the last block belongs to the resampler."""

    config: QwenVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["QwenVisionLayer"]  # noqa: RUF012 - as in transformers

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__(config)
        side = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, side, stride=side, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(config.num_positions, config.hidden_size))
        self.ln_pre = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(QwenVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVisionTower):
            initialization.normal_(module.position_embedding, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Map pixels [N, 3, S, S] to features [N, patches, C]."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = resample_positions(self.position_embedding, patches.shape[-1], leading=0)
        states = [self.ln_pre(patches.flatten(2).transpose(1, 2) + positions)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states) if output_hidden_states else None
        )


class Resampler(nn.Module):
    """Learned queries that attend once to the tower's features."""

    pos_embed: Tensor

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        width, tokens = config.text_config.hidden_size, config.image_seq_length
        self.query = nn.Parameter(torch.empty(tokens, width))
        self.register_buffer(
            "pos_embed", torch.empty(tokens, width)
        )  # sinusoidal in the original, not trained
        features = config.vision_config.hidden_size
        self.kv_proj = nn.Linear(features, width, bias=False) if config.kv_projection else nn.Identity()
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, config.resampler_heads)
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, patches, width] of a square grid to visual tokens [N, image_seq_length, C]."""
        value = self.ln_kv(self.kv_proj(features))
        key = value + resample_positions(self.pos_embed, isqrt(features.shape[1]), leading=0)
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        tokens: Tensor = self.ln_post(self.attn(query, key, value)) @ self.proj
        return tokens


class QwenVLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Qwen-VL with its own or with a CLIP vision tower."""

    config: QwenVLConfig
    input_modalities = ["image", "text"]  # noqa: RUF012 - as in transformers
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["QwenVisionLayer", "CLIPEncoderLayer", "Qwen2DecoderLayer", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.attn_pool = Resampler(config)
        self.language_model = LanguageModel._from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            for table in (module.query, module.pos_embed, module.proj):
                initialization.normal_(table, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's output layer."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode images with tower and resampler.

        Args:
            pixel_values: Pixels [N, 3, S, S].

        Returns:
            ``last_hidden_state``: the resampler's input features [N, patches, width]; ``pooler_output``: the
            visual tokens [N, image_seq_length, C].
        """
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        class_tokens = 0 if isinstance(self.config.vision_config, QwenVisionConfig) else 1
        features = states[self.config.vision_feature_layer][:, class_tokens:]
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.attn_pool(features))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run ``Qwen2ForCausalLM`` with the placeholders replaced by the visual tokens of ``pixel_values``.

        Args:
            input_ids: Token ids [B, T]; ``image_seq_length`` placeholders per image.
            pixel_values: Pixels of all images of the batch [N, 3, S, S], in the order of their placeholders.
            attention_mask: 1 for tokens, 0 for padding [B, T].
            position_ids: Positions [B, T].
            past_key_values: Keys and values of the preceding tokens.
            inputs_embeds: Embeddings [B, T, C], instead of ids, of a text without images.
            labels: Ids to predict [B, T], -100 where there is no loss.
            logits_to_keep: Number of last positions, or the positions, whose logits are computed; 0 for all.
            **kwargs: Passed to the language model.

        Raises:
            SequenceTooLong: the sequence is longer than the model's context.
            ValueError: placeholders and images do not match.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        assert inputs_embeds is not None
        self._check_length(inputs_embeds, past_key_values)
        if pixel_values is not None:
            found = self.get_image_features(pixel_values).pooler_output
            assert found is not None
            visual = found.to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(self._placeholders(input_ids, visual), visual)
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return output

    def _check_length(self, embeddings: Tensor, cache: Any) -> None:
        limit = self.config.text_config.max_position_embeddings
        length = embeddings.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if length > limit:
            raise SequenceTooLong(
                f"this sequence has {length} tokens, images included, but Qwen-VL's context is {limit} "
                "tokens: beyond it the original changes its rotary base and its attention, which is not "
                "supported; shorten the text, or use fewer images"
            )

    def _placeholders(self, input_ids: Tensor | None, visual: Tensor) -> Tensor:
        """Return the mask [B, T, 1] of the positions for visual tokens [N, image_seq_length, C]."""
        if input_ids is None:
            raise ValueError(
                "pixel_values need input_ids, whose placeholders give the positions of the images"
            )
        mask = input_ids == self.config.image_token_id
        found, expected = int(mask.sum()), visual.shape[0] * visual.shape[1]
        if found != expected:
            raise ValueError(
                f"{found} placeholders for {visual.shape[0]} images: expected {visual.shape[1]} per image, {expected} "
                "in all"
            )
        return mask.unsqueeze(-1).to(visual.device)


class QwenVLProcessor(ProcessorMixin):
    """Tokenizer and image processor; every image becomes the same number of placeholders.

    Args:
        image_processor: Makes ``pixel_values``.
        tokenizer: Has ``image_token`` as one token.
        image_seq_length: Placeholders per image.
        image_token: The placeholder, written once per image by the chat template.
        chat_template: Jinja template.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        image_token: str = "<imgpad>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:  # noqa: ARG002
        """Return the placeholders of one image."""
        return self.image_token * self.image_seq_length


AutoConfig.register(QwenVisionConfig.model_type, QwenVisionConfig, exist_ok=True)
AutoModel.register(QwenVisionConfig, QwenVisionTower, exist_ok=True)
