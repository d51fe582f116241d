"""PEFT adapter folders, read: the base they belong to, and the model that both make together."""

import re
from pathlib import Path
from typing import Any

from mgll_encoder.checkpoint import read_json
from mgll_encoder.common.errors import UserError
from mllm_adapters.training.stages import is_adapter

CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Before every name in a PEFT file."""

ADAPTER = ".default."
"""Name that PEFT gives to the only adapter of a model, as it stands in parameter names."""


def base_of_adapter(folder: Path) -> Path | None:
    """The checkpoint that an adapter folder belongs to; None where the folder is no adapter's.

    A folder that has a config.json is a checkpoint, whatever lies in it besides.

    Raises:
        UserError: the base is not named, or is not there.
    """
    file = folder / CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    named = read_json(file).get("base_model_name_or_path")
    if not named:
        raise UserError(
            f"{file} does not name its base model: set base_model_name_or_path to the checkpoint folder"
        )
    if not Path(named).is_dir():
        raise UserError(
            f"{file}: its base model {named} is not there: set base_model_name_or_path to where the checkpoint is now"
        )
    return Path(named)


def attach(model: Any, folder: Path) -> Any:
    """Put an adapter folder into its base model and merge it, so that what comes back is an ordinary model.

    Raises:
        UserError: the adapter does not fit the model, or is not LoRA.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open

    kind = PeftConfig.from_pretrained(str(folder)).peft_type
    if kind != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is {kind}: only LORA is merged")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no {ADAPTER_WEIGHTS}: complete the folder, or train the adapter again"
        )
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder} does not fit its base model: {error!r:.300}") from error
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as weights:
        stored = {key.removeprefix(PREFIX) for key in weights.keys()}  # noqa: SIM118 - no mapping
    present = {_stored_name(name) for name in wrapped.get_base_model().state_dict()}
    expected = {name for name in present if is_adapter(name)}
    if astray := sorted((stored - present) | (expected - stored)):
        raise UserError(
            f"{folder} does not fit its base model: {len(astray)} tensors differ, first {astray[0]}"
        )
    return wrapped.merge_and_unload()


def _stored_name(parameter: str) -> str:
    """The name in a PEFT file of a parameter of a model with adapters in it."""
    return re.sub(r"\.(?:modules_to_save\.default|base_layer)(?=\.)", "", parameter).replace(ADAPTER, ".")
