"""Training stages: freezes, counts and names the parameters of a model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, unknown_name
from mllm_adapters.core.contract import FamilySpec
from mllm_adapters.core.registry import family_of_model

if TYPE_CHECKING:
    from peft import LoraConfig

Component = Literal["tower", "projector", "language_model", "other"]

COMPONENTS: tuple[Component, ...] = ("tower", "projector", "language_model", "other")
"""The components of a model, in the order of an image's processing; fields of `FamilySpec`."""


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    Attributes:
        trains: The components that are fully trained.
        lora: The components trained through low-rank adapters; all others are frozen.
        learns_from_text: Whether rows without an image train these components.
        learning_rate: Peak learning rate, if the recipe sets none.
        about: Description of the stage.
    """

    trains: tuple[Component, ...]
    lora: tuple[Component, ...] = ()
    learns_from_text: bool = True
    learning_rate: float = 2e-5
    about: str = ""


STAGES: Mapping[str, Stage] = {
    "projector": Stage(
        ("projector",), learns_from_text=False, learning_rate=1e-3, about="the connector only"
    ),
    "lora": Stage(
        ("projector",),
        ("language_model",),
        learning_rate=2e-4,
        about="projector, and LoRA on the language model",
    ),
    "lora-vision": Stage(
        ("projector",),
        ("language_model", "tower"),
        learning_rate=2e-4,
        about="as lora, and LoRA on the tower",
    ),
    "full": Stage(
        ("tower", "projector", "language_model"), about="tower, projector and language model, whole"
    ),
}
"""Name -> stage. Learning rates are those of haotian-liu/LLaVA, scripts/v1_5: pretrain, finetune_lora, finetune."""


@dataclass(frozen=True)
class LoraSettings:
    """Size and strength of the adapters.

    Attributes:
        rank: Rank; an adapter of a layer of ``in`` by ``out`` has ``rank * (in + out)`` parameters.
        alpha: Adapters are scaled by ``alpha / rank``.
        dropout: Dropout of the adapters' inputs.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05


@dataclass(frozen=True)
class ComponentReport:
    """Parameter counts of one component."""

    component: Component
    trainable: int
    frozen: int


@dataclass(frozen=True)
class StageReport:
    """The result of `apply_stage`.

    Attributes:
        stage: Name of the stage.
        components: Counts by component.
        names: Names of the trained parameters.
        adapted: Names of the linear layers that have an adapter.
    """

    stage: str
    components: tuple[ComponentReport, ...]
    names: tuple[str, ...]
    adapted: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """Return the number of trained parameters."""
        return sum(component.trainable for component in self.components)

    @property
    def total(self) -> int:
        """Return the number of all parameters."""
        return self.trainable + sum(component.frozen for component in self.components)

    @property
    def share(self) -> float:
        """Return the share of trained parameters, in [0, 1]."""
        return self.trainable / self.total


def apply_stage(model: nn.Module, stage: str = "projector", lora: LoraSettings | None = None) -> StageReport:
    """Set ``requires_grad`` of every parameter for a stage, and add its adapters.

    Args:
        model: A loaded model of a known family.
        stage: A key of `STAGES`.
        lora: Settings of the adapters; the defaults if None.

    Raises:
        UserError: no such stage, a parameter belongs to no component or to two, nothing would be trained, or
            a trained parameter is quantized; the model is then unchanged.
    """
    if stage not in STAGES:
        raise unknown_name("stage", stage, STAGES)
    row = STAGES[stage]
    whole = {name for name, part in components(model).items() if part in row.trains}
    adapted = [name for part in row.lora for name in lora_targets(model, part)]
    if not whole or (row.lora and not adapted):
        raise InvalidArgumentError(
            f"stage '{stage}' trains nothing: this {type(model).__name__} has no such parameters"
        )
    _check_not_quantized(model, stage, whole)
    if adapted:
        cast(Any, model).add_adapter(lora_config(adapted, lora or LoraSettings()))
    parts = components(model)
    trained = {name for name in parts if name in whole or is_adapter(name)}
    counts = {part: {True: 0, False: 0} for part in COMPONENTS}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        counts[parts[name]][name in trained] += weights_in(parameter)
    return StageReport(
        stage=stage,
        components=tuple(
            ComponentReport(part, counts[part][True], counts[part][False]) for part in COMPONENTS
        ),
        names=tuple(name for name in parts if name in trained),
        adapted=tuple(adapted),
    )


def lora_targets(model: nn.Module, component: Component) -> list[str]:
    """Return the linear layers of a component's attention and MLP blocks, by full name.

    These are the ones inside numbered layers, without embeddings, the output head and pooling heads.
    """
    pattern = re.compile(getattr(family_of_model(model).spec, component))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.search(f"{name}.") and re.search(r"\.\d+\.", name)
    ]


def lora_config(targets: Iterable[str], settings: LoraSettings, **more: Any) -> "LoraConfig":
    """Return the settings for PEFT, for exactly the given layers."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),  # annotated as int, but used as a factor
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        **more,
    )


def is_adapter(parameter: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_" in parameter


def weights_in(parameter: nn.Parameter) -> int:
    """Return the number of weights; a 4-bit parameter has two per byte."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()


def components(model: nn.Module) -> dict[str, Component]:
    """Return the component of each parameter.

    Raises:
        UserError: a parameter belongs to none, or to more than one.
    """
    spec: FamilySpec = family_of_model(model).spec
    found: dict[str, Component] = {}
    for name, _ in model.named_parameters():
        matches = [part for part in COMPONENTS if re.search(getattr(spec, part), name)]
        if len(matches) != 1:
            belongs = " and ".join(matches) or "nothing known"
            raise BadDataError(
                f"parameter {name} belongs to {belongs}: family '{spec.name}' must name it exactly once"
            )
        found[name] = matches[0]
    return found


def outermost_modules(model: nn.Module, component: Component) -> list[nn.Module]:
    """Return the outermost modules of a component."""
    pattern = re.compile(getattr(family_of_model(model).spec, component))
    inside = [name for name, _ in model.named_modules() if name and pattern.search(f"{name}.")]
    return [model.get_submodule(name) for name in inside if name.rpartition(".")[0] not in inside]


def describe(names: Iterable[str]) -> list[str]:
    """Abbreviate names with number ranges, so that 32 layers take one line: ``layers.{0-31}.q_proj``."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        groups.setdefault(re.sub(r"\d+", "{}", name), []).append(numbers)
    lines = []
    for pattern, rows in groups.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        texts = [str(c[0]) if len(c) == 1 else f"{{{c[0]}-{c[-1]}}}" for c in columns]
        lines.append(pattern.format(*texts))
    return lines


def _check_not_quantized(model: nn.Module, stage: str, names: Iterable[str]) -> None:
    for name in names:
        if not model.get_parameter(name).is_floating_point():
            raise InvalidArgumentError(
                f"stage '{stage}' trains {name}, which is frozen in 4-bit: use a lora stage with `qlora=True`, or load "
                "the model without it"
            )
