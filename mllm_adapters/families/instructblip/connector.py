"""The connector layers of InstructBLIP: a norm, and keys and values of the Q-Former's cross-attention."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import InvalidArgumentError
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import VisionContract
from mllm_adapters.core.fates import ConnectorFate, Taken
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, refit_connector
from mllm_adapters.families.host import Connected, Swap
from mllm_adapters.families.instructblip import original as lavis

QFORMER_PART = "qformer"

NORM = "vision_model.ln_vision"
"""The normalization between tower and Q-Former, in our class."""

STOCK_NORM = re.compile(r"vision_model\.post_layernorm\.(weight|bias)")
TOWER = re.compile(r"vision_model\.(?!post_layernorm\.|ln_vision\.)")
CONNECTORS = re.compile(r"(qformer\.encoder\.layer\.\d+\.crossattention\.attention\.(?:key|value))\.weight")


def refitted(swap: Swap) -> Connected:
    """Adapt everything except the tower to the new tower's features.

    ``config`` contains the epsilon of the norm before the connector.

    Raises:
        UserError: connector and tower do not belong together, or a given Q-Former does not fit.
    """
    host, after, checkpoint = swap.host, swap.after, swap.checkpoint
    steps = [_own_name(step) for step in swap.steps]
    path = checkpoint.find(QFORMER_PART)
    if path is not None:
        return _trained_connectors(steps, checkpoint, path, after)
    biases = {f"{match[1]}.bias" for step in steps if (match := CONNECTORS.fullmatch(step.name))}
    kept_biases = {step.name: step for step in steps if step.name in biases}
    connectors: dict[str, ConnectorFate] = {}
    for name in _connector_names(steps):
        steps, fate = refit_connector(steps, name, host.before, after, checkpoint.folder)
        connectors |= fate
    epsilon = lavis.NORM_EPSILON if host.layout == "lavis" else _norm_epsilon(host.config)
    made = [kept_biases.get(step.name, step) for step in steps]
    return Connected(made, connectors, {"vision_layer_norm_eps": epsilon})


def _norm_epsilon(config: Mapping[str, Any]) -> float:
    """Return the epsilon of the norm before the connector, in the transformers layout."""
    own, stock = config.get("vision_layer_norm_eps"), config["vision_config"].get("layer_norm_eps", 1e-6)
    return float(stock if own is None else own)


def _own_name(step: Step) -> Step:
    match = STOCK_NORM.fullmatch(step.name)
    if match is None:
        return step
    return step.model_copy(update={"name": f"{NORM}.{match[1]}", "operation": "rename"})


def _connector_names(steps: Iterable[Step]) -> list[str]:
    return [NORM, *(match[1] for step in steps if (match := CONNECTORS.fullmatch(step.name)))]


def _trained_connectors(
    steps: list[Step], checkpoint: Checkpoint, path: Path, after: VisionContract
) -> Connected:
    """Take the connector layers of a Q-Former trained on features of the new tower's width.

    Raises:
        UserError: it lacks one, or was trained on another width.
    """
    trained = checkpoint.attach(QFORMER_PART, path)
    names = _connector_names(steps)
    taken = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    changed = []
    for step in steps:
        if step.name not in taken:
            changed.append(step)
            continue
        header = trained.get(lavis.original_name(step.name))
        if header is None:
            raise InvalidArgumentError(
                f"`parts['{QFORMER_PART}']={path}` has no {lavis.original_name(step.name)}: take a Q-Former of LAVIS"
            )
        side = after.width if step.name.endswith(".weight") or step.name.startswith(NORM) else step.shape[-1]
        shape = (*step.shape[:-1], side)
        if header.shape != shape:
            raise InvalidArgumentError(
                f"`parts['{QFORMER_PART}']={path}`: {lavis.original_name(step.name)} has shape {list(header.shape)}, "
                f"expected {list(shape)}: take a Q-Former trained on a tower of width {after.width} (for CLIP ViT-L "
                "LAVIS' blip2_pretrained_vitL.pth), or leave it out"
            )
        changed.append(copied(header, step.name).model_copy(update={"dtype": step.dtype}))
    connectors = dict.fromkeys(names, Taken(source=path.name, width=after.width))
    return Connected(changed, connectors, {"vision_layer_norm_eps": lavis.NORM_EPSILON})
