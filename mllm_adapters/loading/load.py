"""Loads checkpoints of all families and layouts, and refuses missing, unexpected or mismatched tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgll_encoder.common.errors import MismatchError, UnsupportedCheckpointError
from mgll_encoder.common.library_bars import no_library_bars
from mgll_encoder.common.texts import read_json
from mgll_encoder.text.pretrained import check_configs, check_loading_report, load_pretrained
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.locate import base_of_adapter
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.contract import Family, Plan
from mllm_adapters.core.hub_resolve import resolve
from mllm_adapters.core.processing import load_processor
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.values import compute
from mllm_adapters.loading.adapters import attach
from mllm_adapters.loading.delta import Delta, is_delta, open_delta
from mllm_adapters.loading.expected_state_dict import is_complete

GENERATION = "generation_config.json"

DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "depth", "perceiver_depth")
"""Fields of configurations with the number of layers; each layer has its own tensors."""


def load_mllm(
    path: str | Path,
    *,
    dtype: Any = "auto",
    parts: Mapping[str, Path] | None = None,
    quantization: Any = None,
    delta: str | Path | None = None,
) -> tuple[Any, Any | None]:
    """Load a multimodal LLM and its processor.

    Checkpoints in their original layout are converted in memory, and adapters and deltas are merged into
    their base; nothing is written.

    Args:
        path: Checkpoint folder (or its parent that also contains the parts), adapter folder, hub id, or
            family name; or a delta, whose base is searched for next to it, in the working directory and in
            the Hugging Face cache.
        dtype: Torch dtype of the weights, or ``auto`` for the checkpoint's own.
        parts: Paths of parts that are not found automatically, name -> path (``--part``); ``encoder`` is
            that of a delta without its tower.
        quantization: A transformers quantization config for checkpoints in its layout, see
            `quantization.nf4`.
        delta: A delta (folder or hub id) of which ``path`` is the base.

    Returns:
        The model in evaluation mode, and its processor (None where the checkpoint has no tokenizer).

    Raises:
        UserError: the checkpoint cannot be read, a tensor would be missing, unexpected or of another shape,
            or a delta's base or encoder is not found or is another one.
    """
    where = resolve(str(path))
    if base := base_of_adapter(where):
        model, processor = load_mllm(base, dtype=dtype, parts=parts)
        return attach(model, where).eval(), processor
    if delta is not None:
        return _load_delta(open_delta(resolve(str(delta)), where, parts), dtype)
    if is_delta(where):
        return _load_delta(open_delta(where, parts=parts), dtype)
    checkpoint, family, layout = open_checkpoint(where, parts)
    if layout == "transformers":
        return load_folder(checkpoint, dtype=dtype, quantization=quantization)
    if quantization is not None:
        raise UnsupportedCheckpointError(
            f"{checkpoint.folder} is in its original layout, which cannot be quantized: convert it first"
        )
    return load_plan(family.plan(checkpoint), family, checkpoint, dtype=dtype)


def check_mllm(path: str | Path) -> None:
    """Check that a folder is one that `load_mllm` reads, from its configuration; weights are not opened.

    Args:
        path: As for `load_mllm`.

    Raises:
        UserError: it is not a checkpoint, or of no supported family.
    """
    where = resolve(str(path))
    if base := base_of_adapter(where):
        check_mllm(base)
    elif not is_delta(where):
        open_checkpoint(where)


def load_folder(
    checkpoint: Checkpoint, *, dtype: Any = "auto", quantization: Any = None
) -> tuple[Any, Any | None]:
    """Load an opened checkpoint in the transformers layout; arguments, result and errors as in `load_mllm`."""
    folder, config = checkpoint.folder, checkpoint.config
    check_depths(config, len(checkpoint.tensors), f"{folder}/config.json")
    check_configs(folder, config)
    state = None if checkpoint.rightly_named else checkpoint.state()
    model = _load(state, config, folder, dtype=dtype, quantization_config=quantization, checked=True)
    return model.eval(), load_processor(folder, config, checked=True)


def load_plan(
    plan: Plan,
    family: Family,
    checkpoint: Checkpoint,
    *,
    dtype: Any = "auto",
    fitted: Mapping[str, Tensor] | None = None,
) -> tuple[Any, Any | None]:
    """Build a planned model in memory, and its processor.

    Args:
        plan: The plan.
        family: The family that made it.
        checkpoint: Its source.
        dtype: Torch dtype of the weights, or ``auto`` for the planned one.
        fitted: Values of the fitted tensors, by name.

    Raises:
        UserError: the source cannot be read, or a tensor would be missing, unexpected or of another shape.
    """
    state = {step.name: value for step, value in compute(plan, checkpoint, plan.steps, fitted)}
    model = _load(state, plan.config, checkpoint.folder, dtype=dtype)
    _set_generation(model, checkpoint.folder)
    model.generation_config.update(**plan.generation)
    return model.eval(), family.processor(plan)


def _set_generation(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION))


def _load_delta(delta: Delta, dtype: Any) -> tuple[Any, Any | None]:
    plan, folder = delta.plan, delta.folder
    check_depths(plan.config, len(plan.steps), f"{folder}/config.json")
    state = {step.name: value for step, value in delta.values(plan.steps)}
    model = _load(state, plan.config, folder, dtype=dtype)
    _set_generation(model, folder)
    return model.eval(), load_processor(folder)


def check_complete(plan: Plan) -> None:
    """Compare a plan's tensors, by name and shape, with the model of its configuration.

    It needs no memory. For a LLaVA the configuration suffices (`mllm_adapters.loading.expected_state_dict`);
    any other model, and any doubtful case, is built by transformers on the ``meta`` device: about a second
    for 7B.

    Raises:
        UserError: a tensor would be missing, unexpected, or of another shape than in the model.
    """
    check_depths(plan.config, len(plan.steps), f"{plan.source}/config.json")
    if not is_complete(plan.config, {step.name: step.shape for step in plan.steps}):
        empty_model(plan)


def empty_model(plan: Plan) -> Any:
    """Build the model of a plan on the ``meta`` device: names and shapes without values.

    Raises:
        UserError: as `check_complete`.
    """
    check_depths(plan.config, len(plan.steps), f"{plan.source}/config.json")
    state = {step.name: torch.empty(step.shape, device="meta") for step in plan.steps}
    return load_state(state, plan.config, plan.source, device_map="meta")


def load_state(state: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path, **options: Any) -> Any:
    """Load a model from tensors in memory, without a progress bar.

    Args:
        state: Its tensors, by their names on disk.
        settings: Its config.json.
        folder: Its name in error messages.
        **options: For ``from_pretrained``.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape than in the model.
    """
    with no_library_bars():
        return _load(dict(state), settings, folder, **options)


def check_depths(settings: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a number of layers that exceeds the weights: building such a model would exhaust memory.

    Args:
        settings: A config.json, or a part of it.
        tensors: Number of tensors in the checkpoint.
        where: Name of the configuration in error messages.

    Raises:
        UserError: more layers than tensors.
    """
    for field, value in settings.items():
        if isinstance(value, Mapping):
            check_depths(value, tensors, f"{where}: {field}")
        elif field in DEPTHS and isinstance(value, int) and value > tensors:
            raise MismatchError(
                f"{where}: {field} is {value}, but the weights have {tensors} tensors in all: they do not belong "
                "together; take the config.json that the weights came with"
            )


def _load(state: dict[str, Tensor] | None, settings: Mapping[str, Any], folder: Path, **options: Any) -> Any:
    """Load a model from tensors or, if there are none, from the folder, with an empty loading report."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = build_config(settings, f"{folder}/config.json")
    model, report = load_pretrained(
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)],
        None if state else folder,
        f"the model in {folder}",
        config=config,
        state_dict=state,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they appear in the report, which is refused
        **options,
    )
    check_loading_report(report, folder)
    return model
