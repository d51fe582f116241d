"""Join a vision tower and a language model to a LLaVA."""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mgll_encoder import Tower, vision_config
from mllm_adapters.examples.language_models import Speech

FEATURE_LAYER = -2
"""The tower's second-to-last layer, as in LLaVA."""


def assemble(eyes: Tower, speech: Speech, seed: int) -> LlavaForConditionalGeneration:
    """Join a tower and a language model by a new projector, whose tokens have about the norm of word embeddings.

    With the usual initialization their norm is an order of magnitude larger, and dominates the residual
    stream.
    """
    text = speech.model.config
    config = LlavaConfig(
        vision_config=vision_config(eyes.spec),
        text_config=text,
        image_token_index=speech.image_token_id,
        image_seq_length=eyes.spec.patches,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(eyes.model.state_dict())
    model.model.language_model.load_state_dict(speech.model.model.state_dict())
    model.lm_head.load_state_dict(speech.model.lm_head.state_dict())
    loudness = float(speech.model.model.embed_tokens.weight.detach().square().mean().sqrt())
    projector = model.model.multi_modal_projector
    for layer, scale in ((projector.linear_1, 1.0), (projector.linear_2, loudness)):
        torch.nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
    return model
