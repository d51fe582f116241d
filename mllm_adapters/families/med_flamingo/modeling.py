"""Flamingo on a LLaMA, the architecture of OpenFlamingo-9B and Med-Flamingo, which transformers does not have.

An image becomes ``perceiver_latents`` latents; gated cross-attention blocks between the language model's
layers read them, so the text has one placeholder per image and no visual tokens. Forward and generation after
mlfoundations/open_flamingo 655f693 (open_flamingo/src/flamingo.py, flamingo_lm.py). IDEFICS in transformers has other
blocks and cannot hold these weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    DynamicCache,
    GenerationMixin,
    LlamaModel,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mllm_adapters.families.med_flamingo.blocks import (
    FlamingoConfig,
    GatedCrossAttention,
    Perceiver,
    attended_image,
)


@dataclass
class FlamingoOutput(ModelOutput):
    """Output of `FlamingoForConditionalGeneration`.

    Attributes:
        loss: Mean negative log-likelihood of the labels, if there were any.
        logits: [B, T, vocabulary], or of the requested positions.
        past_key_values: The cache.
        hidden_states: Inputs of the layers and the result, if requested.
        attentions: Self-attention weights, if requested.
        visual_tokens: [B, images, latents, width]; pass it on when continuing a cache by hand.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    visual_tokens: Tensor | None = None


@dataclass
class FlamingoModelOutput(BaseModelOutputWithPast):
    """Output of `FlamingoModel`; see `FlamingoOutput`."""

    visual_tokens: Tensor | None = None


class FlamingoPreTrainedModel(PreTrainedModel):
    """Settings of the library for all classes."""

    config: FlamingoConfig
    config_class = FlamingoConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012 - the library's attributes
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "GatedCrossAttention"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Perceiver):
            init.normal_(module.latents)
        elif isinstance(module, GatedCrossAttention):
            init.zeros_(module.attn_gate)
            init.zeros_(module.ff_gate)


class FlamingoModel(FlamingoPreTrainedModel):
    """Tower, perceiver, and a LLaMA with gated cross-attention blocks between its layers."""

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        bridged = config.perceiver_width is not None
        self.bridge = (
            nn.Linear(config.vision_config.hidden_size, config.latent_width) if bridged else nn.Identity()
        )
        self.perceiver = Perceiver(config)
        self.language_model = LlamaModel(config.text_config)
        every, depth = config.cross_attention_interval, config.text_config.num_hidden_layers
        # Named by the layer that each precedes, as in the original files.
        self.cross_attention = nn.ModuleDict(
            {str(layer): GatedCrossAttention(config) for layer in range(every - 1, depth, every)}
        )
        self.post_init()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images [n, 3, S, S] to patch features [n, patches, width].

        They come from the last block, before the final LayerNorm and without class token: open_clip up to
        2.22 returned these, and the published weights were trained on them.
        """
        patches: Tensor = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        return patches

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode images [n, 3, S, S] to `image_features` (``last_hidden_state``) and latents (``pooler_output``)."""
        features = self.image_features(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.resample(features))

    def resample(self, features: Tensor) -> Tensor:
        """Resample patch features [n, patches, width] to latents [n, latents, latent width]."""
        latents: Tensor = self.perceiver(self.bridge(features))
        return latents

    def place_images(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Compute latents of images [n, 3, S, S] by row of ``input_ids``: [B, maximum images per row, latents, width].

        Images belong to placeholders in reading order: those of the first row, then those of the second.

        Raises:
            ValueError: there are more or fewer placeholders than images.
        """
        per_row = (input_ids == self.config.image_token_id).sum(dim=-1)
        if len(pixel_values) != per_row.sum():
            raise ValueError(
                f"{len(pixel_values)} images for {int(per_row.sum())} image tokens: the text needs one per "
                "image"
            )
        latents = self.resample(self.image_features(pixel_values))
        taken = torch.arange(int(per_row.max()), device=per_row.device) < per_row[:, None]
        rows = latents.new_zeros(*taken.shape, *latents.shape[1:])
        rows[taken.to(latents.device)] = latents
        return rows

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        attended_images: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> FlamingoModelOutput:
        """See `FlamingoForConditionalGeneration.forward`."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attended_images is None:
            if input_ids is None or past:
                raise ValueError(
                    "the image that each token attends to depends on the whole text: pass attended_images "
                    "(and visual_tokens) with inputs_embeds, or when continuing a cache"
                )
            attended_images = attended_image(input_ids, self.config.image_token_id, self.config.media_mask)
            pictures = visual_tokens is not None or pixel_values is not None
            if not pictures and (input_ids == self.config.image_token_id).any():
                raise ValueError("the text has image tokens, but there are no images: pass pixel_values")
        if pixel_values is not None:
            assert input_ids is not None, (
                "checked above, or the caller's own attended_images came with embeddings"
            )
            visual_tokens = self.place_images(pixel_values, input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past
        hidden = self._decode(
            inputs_embeds, attention_mask, position_ids, past_key_values, visual_tokens, attended_images,
            use_cache=use_cache, **kwargs,
        )  # fmt: skip
        return FlamingoModelOutput(
            last_hidden_state=hidden, past_key_values=past_key_values, visual_tokens=visual_tokens
        )

    def _decode(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any,
        visual_tokens: Tensor | None,
        attended_images: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """Run the language model's layers, with the gated blocks between them."""
        text = self.language_model
        mask = create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        media = visible = None
        if visual_tokens is not None:
            images, latents = visual_tokens.shape[1:3]
            numbers = torch.arange(1, images + 1, device=hidden.device).repeat_interleave(latents)
            media = visual_tokens.flatten(1, 2).to(hidden.device, hidden.dtype)
            visible = attended_images.to(hidden.device)[..., None] == numbers
        rotary = text.rotary_emb(hidden, position_ids=position_ids)
        for number, layer in enumerate(text.layers):
            if str(number) in self.cross_attention:
                hidden = self.cross_attention[str(number)](hidden, media, visible)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        normed: Tensor = text.norm(hidden)
        return normed


class FlamingoForConditionalGeneration(FlamingoPreTrainedModel, GenerationMixin):
    """`FlamingoModel` with its language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        self.model = FlamingoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """See `FlamingoModel.get_image_features`."""
        features: BaseModelOutputWithPooling = self.model.get_image_features(pixel_values)
        return features

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        attended_images: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FlamingoOutput:
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids: [B, T], one placeholder per image.
            pixel_values: Images of all rows [n, 3, S, S], in the order of their placeholders.
            attention_mask: [B, T], 0 on padding, which may be on either side.
            position_ids: [B, T].
            past_key_values: Cache of the preceding tokens.
            inputs_embeds: Instead of ``input_ids``; needs ``attended_images``.
            visual_tokens: Latents by row [B, maximum images per row, latents, width], instead of
                ``pixel_values``.
            attended_images: [B, T], see `attended_image`; required when continuing a cache.
            labels: [B, T], -100 where there is no loss.
            use_cache: Whether to return a cache.
            logits_to_keep: Number of last positions, or positions, whose logits are computed; 0 for all.
            **kwargs: Passed to the decoder layers and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_tokens=visual_tokens,
            attended_images=attended_images,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return FlamingoOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_tokens=outputs.visual_tokens,
        )

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the library's inputs, and which image each of their tokens attends to, which needs the whole text."""
        inputs: dict[str, Any]
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if inputs["input_ids"] is None:
            raise ValueError(
                "the positions of images are taken from input_ids: generate from these, not inputs_embeds"
            )
        attended = attended_image(input_ids, self.config.image_token_id, self.config.media_mask)
        return inputs | {"attended_images": attended[:, -inputs["input_ids"].shape[1] :]}

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text; images are encoded once, and placeholder and padding are never generated."""
        if (pixel_values := kwargs.pop("pixel_values", None)) is not None:
            # By row, so that rows can be repeated for beams and samples.
            input_ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            kwargs["visual_tokens"] = self.model.place_images(pixel_values, input_ids)
        settings = kwargs.get("generation_config") or self.generation_config
        asked = kwargs.pop("suppress_tokens", settings.suppress_tokens) or ()
        kwargs["suppress_tokens"] = sorted({*asked, *self._never_written()})
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _never_written(self) -> set[int]:
        text = self.config.text_config
        ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        return {self.config.image_token_id, text.pad_token_id} - {None, *ends}


class FlamingoProcessor(ProcessorMixin):
    """Processor of `FlamingoForConditionalGeneration`: one placeholder per image, which stays one token.

    Args:
        image_processor: Returns ``pixel_values`` [n, 3, S, S].
        tokenizer: Has ``image_token`` as one token.
        chat_template: Jinja template.
        image_token: The placeholder.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:  # noqa: ARG002
        """Return the placeholder unchanged."""
        return self.image_token
