"""Joins a vision tower and a language model to a LLaVA."""

from collections.abc import Mapping

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mgll_encoder import Tower, vision_config
from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.spec import Pooling, TowerSpec
from mllm_adapters.core.contract import VisionContract
from mllm_adapters.core.planning import contract_of
from mllm_adapters.examples.language_models import Speech

FEATURE_LAYERS: Mapping[Pooling, int] = {"class": -2, "mean": -1, "mean_norm": -1, "attention": -1}
"""Pooling of a tower -> hidden layer whose patch tokens are read.

The second-to-last as in LLaVA, where only the class token of the last layer was trained; the last one if the mean of
its patch tokens was, or a head that attends to them.
"""


def tower_contract(spec: TowerSpec) -> VisionContract:
    """Return the vision contract of a small LLaVA with this tower.

    Raises:
        UserError: no LLaVA can have such a tower.
    """
    architecture = ARCHITECTURES[spec.architecture]
    if architecture.not_in_hosts:
        raise IncompatibleTowerError(
            f"a {architecture.title} cannot be in a LLaVA: {architecture.not_in_hosts}"
        )
    return contract_of(spec, FEATURE_LAYERS[spec.pooling], class_token=False)


def assemble(tower: Tower, speech: Speech, seed: int) -> LlavaForConditionalGeneration:
    """Join a tower and a language model by a new projector, whose tokens have about the norm of word embeddings.

    With the usual initialization their norm is an order of magnitude larger, and dominates the residual
    stream.
    """
    text, contract = speech.model.config, tower_contract(tower.spec)
    config = LlavaConfig(
        vision_config=vision_config(tower.spec),
        text_config=text,
        image_token_index=speech.image_token_id,
        image_seq_length=tower.spec.patches,
        vision_feature_layer=contract.feature_layer,
        vision_feature_select_strategy=contract.select_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    unread = tower.header.architecture.unread(tower.spec)
    zeros = {name: torch.zeros(shape) for name, shape in unread.items()}
    model.model.vision_tower.load_state_dict({**zeros, **tower.model.state_dict()})
    model.model.language_model.load_state_dict(speech.model.model.state_dict())
    model.lm_head.load_state_dict(speech.model.lm_head.state_dict())
    word_rms = float(speech.model.model.embed_tokens.weight.detach().square().mean().sqrt())
    projector = model.model.multi_modal_projector
    for layer, scale in ((projector.linear_1, 1.0), (projector.linear_2, word_rms)):
        torch.nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
    return model
