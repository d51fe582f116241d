"""config.json: the fields that a family reads, and the configurations that a plan writes."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.library_errors import library_reason
from mgll_encoder.text.pretrained import library_errors, quiet
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.spec import TowerSpec
from mllm_adapters.checkpoints.quantized import refuse_quantized
from mllm_adapters.core.architectures import register_models
from mllm_adapters.core.contract import VisionContract

Fields = TypeVar("Fields", bound=BaseModel)


def read_fields(kind: type[Fields], config: Mapping[str, Any], where: str) -> Fields:
    """Read the fields of a config.json that a family uses; others are ignored.

    Args:
        kind: Model of the fields.
        config: Contents of config.json.
        where: Name of the configuration in error messages.

    Raises:
        UserError: a field is missing, of another type, or has an unsupported value; or the weights that it
            describes are quantized.
    """
    refuse_quantized(config, where)
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        found = f"{field} is {config[field]!r}" if field in config else f"{field} is missing"
        raise UnsupportedCheckpointError(
            f"{where}: {found}: {first['msg']}; this variant is not supported"
        ) from None


def build_config(settings: Mapping[str, Any], where: str) -> Any:
    """Build the transformers configuration object of a config.json.

    Raises:
        UserError: transformers rejects it.
    """
    from transformers import AutoConfig

    fields = deepcopy(dict(settings))  # transformers modifies its input
    register_models([str(fields.get("model_type"))])
    try:
        with quiet():
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except library_errors() as error:
        raise UnsupportedCheckpointError(
            f"{where}: transformers cannot use this configuration: {library_reason(error)}"
        ) from None


def tower_geometry(vision: Any) -> dict[str, Any]:
    """Return the fields of `TowerSpec` in a transformers configuration of a vision tower."""
    return {
        "width": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_width": vision.intermediate_size,
        "patch_size": vision.patch_size,
        "activation": vision.hidden_act,
    }


def tower_config(spec: TowerSpec, after: VisionContract) -> dict[str, Any]:
    """Return the ``vision_config`` of a checkpoint whose tower is a plain transformers model."""
    fitted = spec.model_copy(update={"image_size": after.image_size})
    return ARCHITECTURES[spec.architecture].vision_settings(fitted)


def text_config(model_type: str, config: Mapping[str, Any], vocabulary: int, where: str) -> dict[str, Any]:
    """Make the ``text_config`` from the language model's fields in a flat, original configuration.

    Raises:
        UserError: transformers rejects them.
    """
    from transformers import CONFIG_MAPPING

    fields = set(CONFIG_MAPPING[model_type]().to_dict()) | {"rope_theta", "rope_scaling"}
    own = {k: v for k, v in config.items() if k in fields and k not in ("model_type", "architectures")}
    own = {"tie_word_embeddings": False, **own, "vocab_size": vocabulary, "model_type": model_type}
    settings = build_config(own, where).to_dict()
    rope_base = settings["rope_parameters"]["rope_theta"]
    return {**settings, "rope_theta": rope_base}  # releases before 5.0 read this field, and default to 10000
