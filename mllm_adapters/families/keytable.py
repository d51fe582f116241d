"""Key tables of families: map the tensors of an original layout to steps of a plan, in the notation of `KeyTable`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.weights.keytable import Destination, Drop, KeyTable, Reshape, Split
from mllm_adapters.checkpoints.checkpoint import TensorHeader
from mllm_adapters.core.contract import Dropped
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import copied, dtype_name


@dataclass(frozen=True)
class OriginalLayout(KeyTable):
    """The tensors of an original layout; a checkpoint with a tensor outside the table is refused.

    Attributes:
        of: Description of the layout for messages.
        reason: Why tensors whose rule is ``None`` are dropped.
        hint: What to do about a tensor without a rule.
    """

    of: str = ""
    reason: str = "not part of the transformers layout"
    hint: str = ""

    def place(self, name: str, where: Path | str) -> Destination:
        """Return the destination of a tensor.

        Raises:
            UserError: no rule matches it.
        """
        place = self.find(name)
        if place is None:
            lora = "these are LoRA weights, merge them into their model first" if "lora_" in name else ""
            hint = self.hint or lora
            raise BadDataError(
                f"{where}: tensor {name} is not part of {self.of}" + (f": {hint}" if hint else "")
            )
        return place

    def steps(self, headers: Iterable[TensorHeader], where: Path | str) -> tuple[list[Step], list[Dropped]]:
        """Return the target tensors of these source tensors, in their order, and the dropped ones.

        Raises:
            UserError: no rule matches a tensor, or it cannot be split according to its rule.
        """
        steps: list[Step] = []
        dropped: list[Dropped] = []
        for header in headers:
            place = self.place(header.name, where)
            if place.targets:
                steps += placed(header, place)
            else:
                dropped.append(Dropped(name=header.name, reason=self.why(place)))
        return steps, dropped

    def why(self, place: Destination) -> str:
        """Return the reason why a tensor is dropped."""
        return place.rule.reason if isinstance(place.rule, Drop) else self.reason


def placed(header: TensorHeader, place: Destination) -> list[Step]:
    """Return the steps from a source tensor to its destination.

    Raises:
        UserError: it cannot be split according to its rule.
    """
    match place.rule:
        case Split(groups=groups, sizes=sizes):
            return slices(header, dict(zip(place.targets, sizes, strict=True)), groups)
        case Reshape(dimensions=dimensions):
            step = copied(header, place.targets[0])
            return [step.model_copy(update={"operation": "reshape", "shape": header.shape[-dimensions:]})]
    return [copied(header, place.targets[0])]


def slices(header: TensorHeader, units: dict[str, int], groups: int) -> list[Step]:
    """Return steps that split a fused tensor: target name -> number of units in each group, in order.

    Raises:
        UserError: its rows cannot be divided accordingly.
    """
    total, rows = sum(units.values()), header.shape[0]
    if rows % (groups * total):
        raise MismatchError(
            f"{header.file.parent}: {header.name} has {rows} rows, expected a multiple of {groups * total}: "
            "config.json and weights do not belong together"
        )
    steps, start = [], 0
    for name, number in units.items():
        steps.append(
            Step(
                name=name,
                dtype=dtype_name(header.dtype),
                shape=(rows // total * number, *header.shape[1:]),
                operation="slice",
                sources=(header.name,),
                arguments={"groups": groups, "units": total, "start": start, "stop": start + number},
            )
        )
        start += number
    return steps
