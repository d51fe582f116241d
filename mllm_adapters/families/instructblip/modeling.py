"""InstructBLIP with a CLIP tower, and the processor of every InstructBLIP here.

transformers' `InstructBlipConfig` turns any ``vision_config`` into one of its own EVA tower, which has no
norm before its blocks and so cannot hold a CLIP. The rest of the architecture (Q-Former, projection,
language model) is theirs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BatchFeature,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.instructblip.modeling_instructblip import BaseModelOutputWithVisionQformerOutputs


class MgllInstructBlipConfig(InstructBlipConfig):
    """Configuration of `MgllInstructBlipForConditionalGeneration`.

    Attributes:
        vision_feature_layer: Index of the tower's hidden state that the Q-Former reads.
        vision_layer_norm_eps: Epsilon of the normalization between tower and Q-Former.
    """

    model_type = "mgll_instructblip"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        **InstructBlipConfig.sub_configs_defaults,
        "vision_config": CLIPVisionConfig,
    }

    vision_feature_layer: int = -2
    vision_layer_norm_eps: float = 1e-5


class ClipWithNorm(nn.Module):
    """A CLIP tower and the normalization of its tokens, class token included, that the Q-Former attends to.

    LAVIS uses CLIP ViT-L in this way (salesforce/LAVIS, lavis/models/clip_vit.py: all blocks but the last,
    no final norm of CLIP's own; lavis/models/blip2_models/blip2.py: ``ln_vision``).
    """

    def __init__(self, config: MgllInstructBlipConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        self.layer = config.vision_feature_layer
        self.tower = CLIPVisionModel._from_config(vision)
        self.ln_vision = nn.LayerNorm(vision.hidden_size, eps=config.vision_layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = False,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Map pixels [n, 3, S, S] to ``last_hidden_state`` [n, 1 + patches, C]."""
        output = self.tower(
            pixel_values, output_hidden_states=True, interpolate_pos_encoding=bool(interpolate_pos_encoding)
        )
        return BaseModelOutputWithPooling(last_hidden_state=self.ln_vision(output.hidden_states[self.layer]))


class MgllInstructBlipForConditionalGeneration(InstructBlipForConditionalGeneration):
    """InstructBLIP with a plain `CLIPVisionModel` in ``vision_model.tower``."""

    config: MgllInstructBlipConfig

    def __init__(self, config: MgllInstructBlipConfig) -> None:
        # Not the parent's own: it builds the EVA tower.
        super(InstructBlipForConditionalGeneration, self).__init__(config)
        qformer: Any = config.qformer_config
        text: Any = config.text_config
        self.vision_model = ClipWithNorm(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, qformer.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(qformer)
        self.language_projection = nn.Linear(qformer.hidden_size, text.hidden_size)
        kind = AutoModelForCausalLM if config.use_decoder_only_language_model else AutoModelForSeq2SeqLM
        self.language_model = kind.from_config(text, trust_remote_code=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Run the parent's forward pass, also for text without images.

        Args:
            pixel_values: [n, 3, S, S], or None if no text has an image.
            qformer_input_ids: [n, Q], the instruction for each image.
            qformer_attention_mask: [n, Q].
            input_ids: [B, T], with ``num_query_tokens`` placeholders for each image.
            attention_mask: [B, T].
            labels: [B, T]; for a language model with an encoder, the target of its decoder.
            logits_to_keep: Positions whose logits are computed (0: all); for a decoder-only language model.
            **kwargs: See `InstructBlipForConditionalGeneration.forward`.
        """
        if pixel_values is None and kwargs.get("mm_encoder_outputs") is None:
            width = self.language_projection.out_features
            nothing = self.language_projection.weight.new_zeros(0, self.config.num_query_tokens, width)
            images = BaseModelOutputWithVisionQformerOutputs(pooler_output=nothing)
            kwargs["mm_encoder_outputs"] = {"image": images}
        if self.config.use_decoder_only_language_model:
            kwargs["logits_to_keep"] = logits_to_keep
        return super().forward(
            pixel_values=pixel_values,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            **kwargs,
        )


class MgllInstructBlipProcessor(ProcessorMixin):
    """Expands the image placeholder, and tokenizes the instruction a second time, for the Q-Former.

    Visual tokens come first, before the token that begins the text, as in LAVIS.

    Args:
        image_processor: Makes ``pixel_values``.
        tokenizer: The language model's.
        qformer_tokenizer: The Q-Former's (BERT's); its ``model_max_length`` cuts the instruction.
        num_query_tokens: Visual tokens per image.
        image_token: The placeholder.
        chat_template: Jinja template of a conversation.
    """

    takes_instructions = True
    """Adds the argument ``instructions``: the part of each text for the Q-Former."""

    text_kwargs: Any = {"return_token_type_ids": False}  # noqa: RUF012 (as the library has it)
    qformer_tokenizer: Any

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        qformer_tokenizer: Any = None,
        num_query_tokens: int = 32,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        self.num_query_tokens = num_query_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, qformer_tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        instructions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert texts and their images to model inputs.

        Args:
            images: The images of all texts, in order.
            text: Texts, each starting with one placeholder per image; if there are as many images as texts
                and no placeholders, each text gets one.
            instructions: Input of the Q-Former, per text; by default the text itself. Required for a text
                that contains the answer, because the Q-Former would otherwise read the answer.
            **kwargs: For image processor and tokenizer, as in any processor.

        Returns:
            ``input_ids``, ``attention_mask`` [B, T]; with images ``pixel_values`` [n, 3, S, S] and
            ``qformer_input_ids``, ``qformer_attention_mask`` [n, Q].

        Raises:
            ValueError: the placeholders do not match the images, or do not come first.
        """
        texts = self._with_placeholders(images, [text] if isinstance(text, str) else list(text or []))
        if not texts:
            raise ValueError("InstructBLIP reads an instruction: give it a text")
        self.validate_inputs(images=images, text=texts)
        settings = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        words = dict(settings["text_kwargs"])
        wants_offsets = words.pop(
            "return_text_replacement_offsets", settings["return_text_replacement_offsets"]
        )
        words.pop("return_mm_token_type_ids", None)
        return_tensors = words.get("return_tensors")
        features: dict[str, Any] = {}
        offsets: list[Any] = []
        if images is not None:
            pixels, _ = self._process_images(images, **settings["images_kwargs"])
            features |= pixels | self._for_qformer(texts, instructions, return_tensors)
            opening = self._opening() if words.get("add_special_tokens", True) else ""
            words["add_special_tokens"] = words.get("add_special_tokens", True) and not opening
            texts, offsets = self.get_text_with_replacements(texts, self._replacements(texts, opening))
        features |= self.tokenizer(texts, **words)
        if wants_offsets:
            features["text_replacement_offsets"] = offsets
        return BatchFeature(
            features, tensor_type=return_tensors, skip_tensor_conversion=["text_replacement_offsets"]
        )

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:  # noqa: ARG002
        """Return as many placeholders as an image has visual tokens."""
        return self.image_token * self.num_query_tokens

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of the model inputs."""
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, "qformer_input_ids", "qformer_attention_mask"]

    def _with_placeholders(self, images: Any, texts: list[str]) -> list[str]:
        if images is not None and not any(self.image_token in text for text in texts):
            texts = [self.image_token + text for text in texts]
        for text in texts:
            if not text.startswith(self.image_token * text.count(self.image_token)):
                raise ValueError(f"InstructBLIP needs images first: put {self.image_token} before the text")
        return texts

    def _for_qformer(
        self, texts: list[str], instructions: Sequence[str] | None, return_tensors: str | None
    ) -> dict[str, Any]:
        """Tokenize the instruction of each image with the Q-Former's tokenizer."""
        read = texts if instructions is None else instructions
        per_image = [
            instruction.replace(self.image_token, "").strip()
            for text, instruction in zip(texts, read, strict=True)
            for _ in range(text.count(self.image_token))
        ]
        encoded = self.qformer_tokenizer(
            per_image,
            padding=True,
            truncation=True,
            return_token_type_ids=False,
            return_tensors=return_tensors,
        )
        return {f"qformer_{name}": encoded[name] for name in ("input_ids", "attention_mask")}

    def _opening(self) -> str:
        """Return the token that the tokenizer adds before a text, if any; here it follows the images."""
        first, *_ = self.tokenizer("a").input_ids
        return self.tokenizer.bos_token if first in self.tokenizer.all_special_ids else ""

    def _replacements(self, texts: list[str], opening: str) -> list[str]:
        counts = [text.count(self.image_token) for text in texts]
        each = self.replace_image_token({}, 0)
        return [
            each + (opening if number == count - 1 else "") for count in counts for number in range(count)
        ]
