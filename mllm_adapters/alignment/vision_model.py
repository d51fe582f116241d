"""The vision part of a model: tower and connector with their values, everything else without memory.

The library loads the complete model, with an empty loading report. Tensors outside the vision part, mainly
the language model, are a single zero expanded to each tensor's shape: they take no memory, and the
checkpoint's values are never read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Family, Plan, VisionContract
from mllm_adapters.core.operations import FIT, Step
from mllm_adapters.core.planning import copied
from mllm_adapters.core.values import compute
from mllm_adapters.loading.load import check_depths, load_state


@dataclass(frozen=True)
class VisionModel:
    """A model with a working vision part.

    Attributes:
        model: The model, in float32; its language model is all zeros.
        contract: Its vision contract.
        config: Its config.json.
        device: Device of tower and connector.
    """

    model: nn.Module
    contract: VisionContract
    config: Mapping[str, Any]
    device: torch.device

    def module(self, name: str) -> nn.Module:
        """Return the module whose tensors have this name in a checkpoint, up to a prefix."""
        return self.model.get_submodule(self.module_name(name))

    def module_name(self, name: str) -> str:
        """Return the full name of that module."""
        found: list[str] = [n for n, _ in self.model.named_modules() if n and _same_end(n, name)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} modules of {type(self.model).__name__} are called {name}")
        return found[0]


def source_vision_model(
    plan: Plan, family: Family, checkpoint: Checkpoint, device: torch.device
) -> VisionModel:
    """Load the vision part of a swap's source model.

    Raises:
        UserError: its tower cannot be found or read.
    """
    if family.layout(checkpoint.config) == "transformers":
        steps: Sequence[Step] = [copied(header) for header in checkpoint.tensors.values()]
        config, wanted = checkpoint.config, _needed(family, steps)
        check_depths(config, len(steps), f"{checkpoint.folder}/config.json")
        values: Iterable[tuple[Step, Tensor]] = ((step, checkpoint.read(step.name)) for step in wanted)
    else:
        source = family.plan(checkpoint)
        steps, config = source.steps, source.config
        values = compute(source, checkpoint, _needed(family, steps))
    return VisionModel(_load(steps, values, config, checkpoint.folder, device), plan.before, config, device)


def planned_vision_model(
    plan: Plan, family: Family, checkpoint: Checkpoint, device: torch.device
) -> VisionModel:
    """Load the vision part of a swap's result without alignment; layers to be fitted are zero."""
    wanted = [step for step in _needed(family, plan.steps) if step.kind is not FIT]
    values = compute(plan, checkpoint, wanted)
    return VisionModel(
        _load(plan.steps, values, plan.config, plan.source, device), plan.after, plan.config, device
    )


def _needed(family: Family, steps: Iterable[Step]) -> list[Step]:
    pattern = re.compile(family.spec.vision_parameters or f"{family.spec.tower}|{family.spec.projector}")
    return [step for step in steps if pattern.search(step.name)]


def _load(
    steps: Iterable[Step],
    values: Iterable[tuple[Step, Tensor]],
    config: Mapping[str, Any],
    folder: Path,
    device: torch.device,
) -> Any:
    given = {step.name: value.to(_memory(value.dtype)) for step, value in values}
    state = {step.name: given.get(step.name, _nothing(step)) for step in steps}
    model = load_state(state, config, folder, dtype=torch.float32).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().nbytes() >= tensor.nbytes:  # not an expanded zero
            tensor.data = tensor.data.to(device)
    return model


def _nothing(step: Step) -> Tensor:
    return torch.zeros((), dtype=_memory(getattr(torch, step.dtype))).expand(step.shape)


def _memory(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for loading: with another one the library would make a copy, which takes memory."""
    return torch.float32 if dtype.is_floating_point else dtype


def _same_end(one: str, other: str) -> bool:
    longer, shorter = sorted((one.split("."), other.split(".")), key=len, reverse=True)
    return longer[-len(shorter) :] == shorter
