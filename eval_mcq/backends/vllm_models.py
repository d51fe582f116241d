"""Which model folders are given to vLLM: those whose numbers were compared with transformers' and are the same."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import NotFoundError, UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.weight_file import open_weights
from mllm_adapters import base_of_adapter

OWN = "mgll_"
"""Begins the ``model_type`` of this project's own architectures."""

LLAVA: Mapping[str, tuple[str, Collection[str]]] = {
    "vision_config": ("clip_vision_model", ("clip_vision_model", "siglip_vision_model")),
    "text_config": ("llama", ("llama", "mistral", "qwen2", "qwen3")),
}
"""Part of a LLaVA -> its ``model_type`` where none is given, and those that were measured with vLLM 0.32."""

REFUSED: Mapping[str, str] = {
    "aya_vision": "vLLM 0.32 computes it otherwise than transformers: log-probabilities of letters are off by up to 33",
    "paligemma": "vLLM 0.32 has it with a SigLIP tower only, and does not load one with a CLIP",
}
"""``model_type`` of models that were tried and are not taken, and what was found."""

UNREAD = ("vision_tower.embeddings.", "model.vision_tower.embeddings.")
"""Begin the tower's names in a LLaVA saved by transformers 5; vLLM 0.32 expects ``vision_model.`` in between."""

INSTEAD = (
    "leave `engine` out to use this project's engine, or write a LLaVA, which vLLM reads, with `layout=llava` "
    "(InternVL, Janus-Pro) or `convert()` (original layouts)"
)


def check_model(folder: Path) -> None:
    """Refuse what vLLM does not load, computes otherwise, or was not compared with, before anything is started.

    Raises:
        UserError: it is no model folder, or not of a kind whose numbers are known to be the same.
    """
    if base_of_adapter(folder):
        raise UnsupportedCheckpointError(
            f"{folder} is an adapter, and vLLM reads whole models: merge it first, or leave `engine` out"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise NotFoundError(f"model {folder} is not a model folder: it has no config.json")
    config = read_json(path)
    kind = str(config.get("model_type"))
    if kind.startswith(OWN):
        raise UnsupportedCheckpointError(
            f"{folder} has this project's architecture '{kind}', which vLLM does not have; {INSTEAD}"
        )
    if kind in REFUSED:
        raise UnsupportedCheckpointError(
            f"{folder} is '{kind}': {REFUSED[kind]}; leave `engine` out to use this project's engine"
        )
    if unknown := _not_measured(config, kind):
        raise UnsupportedCheckpointError(
            f"{folder} has {unknown}, on which vLLM's numbers were not compared with transformers'; {INSTEAD}, or "
            "start `vllm serve` yourself and give `endpoint`, which makes a row of its own"
        )
    if any(name.startswith(UNREAD) for name in open_weights(folder).headers):
        raise UnsupportedCheckpointError(
            f"{folder} was saved by transformers 5, which names the tower's tensors otherwise than vLLM 0.32 expects: "
            "leave `engine` out, or save the tower alone (`vision_tower.save_pretrained()`) and put it in again with "
            "`plan_swap()`"
        )


def _not_measured(config: Mapping[str, Any], kind: str) -> str | None:
    """Return the first part of a model that was not measured, with what was."""
    if kind != "llava":
        return f"the architecture '{kind}' (expected llava)"
    for part, (usual, measured) in LLAVA.items():
        found = (config.get(part) or {}).get("model_type", usual)
        if found not in measured:
            return f"{part}.model_type '{found}' (expected one of {', '.join(measured)})"
    return None
