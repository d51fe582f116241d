"""Reads PEFT adapter folders and merges them into their base."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgll_encoder.common.errors import MismatchError, NotFoundError, UnsupportedCheckpointError
from mgll_encoder.common.library_errors import library_reason
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.pretrained import library_errors
from mgll_encoder.weights.foreign import ADAPTER_CONFIG
from mgll_encoder.weights.weight_file import open_weights
from mllm_adapters.core.provenance import named
from mllm_adapters.core.stages import is_adapter

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Prefix of every name in a PEFT file."""

ADAPTER = ".default."
"""PEFT's name of a model's only adapter in parameter names."""


_ADAPTER_FIELDS = (
    "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "modules_to_save", "bias", "lora_bias", "fan_in_fan_out", "use_rslora", "use_dora", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern",
)  # fmt: skip
"""Fields of adapter_config.json that describe the adapter."""

_NO_EFFECT = {
    "peft_type", "peft_version", "revision", "inference_mode", "auto_mapping", "init_lora_weights", "megatron_core",
    "runtime_config", "qalora_group_size",
}  # fmt: skip
"""Fields without effect on a trained adapter if all other fields have their defaults."""


def base_name(base: Path, out: Path) -> str:
    """Return how an adapter in ``out`` names its base: by hub id or as a sibling folder, else by its path."""
    hub_id = named(base, {}).hub_id
    beside = base.absolute().parent == out.absolute().parent
    return hub_id or (base.absolute().name if beside else str(base.absolute()))


def attach(model: Any, folder: Path) -> Any:
    """Merge an adapter folder into its base model, and return an ordinary model.

    Raises:
        UserError: the adapter does not fit the model, or is not LoRA.
    """
    from peft import PeftModel, set_peft_model_state_dict

    config = _lora_config(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise NotFoundError(
            f"{folder} has no {ADAPTER_WEIGHTS}: complete the folder, or train the adapter again"
        )
    weights = open_weights(folder / ADAPTER_WEIGHTS)
    try:
        wrapped: Any = PeftModel(model, config)
        set_peft_model_state_dict(wrapped, weights.read(weights.headers))
    except library_errors() as error:
        raise MismatchError(f"{folder} does not fit its base model: {library_reason(error)}") from error
    stored = {key.removeprefix(PREFIX) for key in weights.headers}
    present = {_stored_name(name) for name in wrapped.get_base_model().state_dict()}
    expected = {name for name in present if is_adapter(name)}
    if astray := sorted((stored - present) | (expected - stored)):
        raise MismatchError(
            f"{folder} does not fit its base model: {len(astray)} tensors differ, first {astray[0]}"
        )
    return wrapped.merge_and_unload()


def _lora_config(file: Path) -> "LoraConfig":
    """Read the PEFT settings of an adapter, without those that make PEFT import or compute something else.

    Raises:
        UserError: it is not LoRA, or has settings that do more than add low-rank matrices.
    """
    from peft import LoraConfig

    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise UnsupportedCheckpointError(
            f"{file}: peft_type is {settings.get('peft_type')!r}: only LORA is merged"
        )
    known = {name: settings[name] for name in _ADAPTER_FIELDS if name in settings}
    for name in settings.keys() - known.keys() - _NO_EFFECT:
        if settings[name] not in (None, False, [], {}):
            raise UnsupportedCheckpointError(
                f"{file}: field '{name}' is {settings[name]!r:.80}, which changes the adapter's method: "
                "merge it with the program that made it, and pass the merged model"
            )
    try:
        return LoraConfig(**known, inference_mode=True)
    except library_errors() as error:
        raise UnsupportedCheckpointError(
            f"{file}: PEFT cannot use these settings: {library_reason(error)}"
        ) from None


def _stored_name(parameter: str) -> str:
    """Return the name in a PEFT file of a parameter of a model with adapters."""
    return re.sub(r"\.(?:modules_to_save\.default|base_layer)(?=\.)", "", parameter).replace(ADAPTER, ".")
