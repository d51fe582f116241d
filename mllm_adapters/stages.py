"""What a training stage trains: every parameter of the model is set, counted and named."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mgll_encoder.common.errors import UserError, unknown_name
from mllm_adapters.contract import FamilySpec
from mllm_adapters.registry import family_of_model

Component = Literal["tower", "projector", "language_model", "other"]

COMPONENTS: tuple[Component, ...] = ("tower", "projector", "language_model", "other")
"""The parts of a model, in the order in which an image passes through them; fields of `FamilySpec`."""


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    Attributes:
        trains: The components that learn; all others are frozen.
        learns_from_text: Whether rows without an image give these components a gradient.
    """

    trains: tuple[Component, ...]
    learns_from_text: bool


STAGES: Mapping[str, Stage] = {
    "projector": Stage(trains=("projector",), learns_from_text=False),
}


@dataclass(frozen=True)
class ComponentReport:
    """Parameter counts of one component."""

    component: Component
    trainable: int
    frozen: int


@dataclass(frozen=True)
class StageReport:
    """What `apply_stage` has set.

    Attributes:
        stage: Name of the stage.
        components: Counts, component by component.
        names: Names of the parameters that train.
    """

    stage: str
    components: tuple[ComponentReport, ...]
    names: tuple[str, ...]

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(component.trainable for component in self.components)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trainable + sum(component.frozen for component in self.components)

    @property
    def share(self) -> float:
        """Share of parameters that train, in [0, 1]."""
        return self.trainable / self.total


def apply_stage(model: nn.Module, stage: str = "projector") -> StageReport:
    """Set ``requires_grad`` of every parameter as the stage says.

    Args:
        model: A loaded model of a known family.
        stage: A key of `STAGES`.

    Raises:
        UserError: no such stage, a parameter belongs to no component or to two, or nothing would train;
            nothing has been set then.
    """
    if stage not in STAGES:
        raise unknown_name("stage", stage, STAGES)
    parts = components(model)
    trained = {name for name, part in parts.items() if part in STAGES[stage].trains}
    if not trained:
        raise UserError(f"stage '{stage}' trains nothing: this {type(model).__name__} has no such parameters")
    counts = {part: {True: 0, False: 0} for part in COMPONENTS}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        counts[parts[name]][name in trained] += parameter.numel()
    return StageReport(
        stage=stage,
        components=tuple(
            ComponentReport(part, counts[part][True], counts[part][False]) for part in COMPONENTS
        ),
        names=tuple(name for name in parts if name in trained),
    )


def components(model: nn.Module) -> dict[str, Component]:
    """The component that each parameter belongs to.

    Raises:
        UserError: a parameter belongs to none, or to more than one.
    """
    spec: FamilySpec = family_of_model(model).spec
    found: dict[str, Component] = {}
    for name, _ in model.named_parameters():
        matches = [part for part in COMPONENTS if re.search(getattr(spec, part), name)]
        if len(matches) != 1:
            belongs = " and ".join(matches) or "nothing known"
            raise UserError(
                f"parameter {name} belongs to {belongs}: family '{spec.name}' must name it exactly once"
            )
        found[name] = matches[0]
    return found


def outermost_modules(model: nn.Module, component: Component) -> list[nn.Module]:
    """The modules that make up a component, without the modules inside them."""
    pattern = re.compile(getattr(family_of_model(model).spec, component))
    inside = [name for name, _ in model.named_modules() if name and pattern.search(f"{name}.")]
    return [model.get_submodule(name) for name in inside if name.rpartition(".")[0] not in inside]
