"""Loading any checkpoint of any family, original layout or not, with an empty loading report or not at all."""

from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UserError
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import Family, Plan
from mllm_adapters.operations import compute
from mllm_adapters.parts import resolve
from mllm_adapters.processing import load_processor
from mllm_adapters.registry import open_checkpoint


def load_mllm(path: str | Path, *, dtype: Any = "auto") -> tuple[Any, Any | None]:
    """Load a multimodal LLM and its processor.

    Checkpoints in their original layout are converted in memory; nothing is written.

    Args:
        path: Checkpoint folder, hub id, or family name.
        dtype: Torch dtype of the weights, or ``auto`` for the checkpoint's own.

    Returns:
        The model in evaluation mode, and its processor (None where the checkpoint has no tokenizer).

    Raises:
        UserError: the checkpoint cannot be read, or a tensor would be missing, left over or of another shape.
    """
    folder = resolve(str(path))
    checkpoint, family, layout = open_checkpoint(folder)
    if layout == "transformers":
        return _load_native(folder, dtype)
    return _load_planned(family.plan(checkpoint), family, checkpoint, dtype)


def _load_native(folder: Path, dtype: Any) -> tuple[Any, Any | None]:
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, report = loaded
    check_report(report, folder)
    return model.eval(), load_processor(folder)


def _load_planned(plan: Plan, family: Family, checkpoint: Checkpoint, dtype: Any) -> tuple[Any, Any | None]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    settings = dict(plan.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    state = {step.name: value for step, value in compute(plan, checkpoint, plan.steps)}
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    check_report(report, plan.source)
    return model.eval(), family.processor(plan)


def check_report(report: Any, folder: Path) -> None:
    """Refuse a loading report that is not empty.

    Raises:
        UserError: a tensor is missing, left over, or of another shape than the model wants.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in report[kind]):
            what = kind.removesuffix("_keys")
            raise UserError(
                f"{folder}: {len(keys)} {what} tensors, first {keys[0]}: config.json and weights do not belong "
                "together, and loading would leave random weights"
            )
