"""Key tables of families: the tensors of an original layout as steps of a plan. The notation is `KeyTable`'s."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mgll_encoder.common.errors import UserError
from mgll_encoder.weights.keytable import Destination, Drop, KeyTable, Reshape, Split
from mllm_adapters.checkpoints.checkpoint import TensorHeader
from mllm_adapters.core.contract import Dropped, Step
from mllm_adapters.core.planning import copied, dtype_name


@dataclass(frozen=True)
class OriginalLayout(KeyTable):
    """The tensors of an original layout: every one is in the table, or the checkpoint is refused.

    Attributes:
        of: What has this layout, in words.
        reason: Why the tensors whose rule is ``None`` are left out.
        hint: What to do where a tensor is in no rule.
    """

    of: str = ""
    reason: str = "not part of the transformers layout"
    hint: str = ""

    def place(self, name: str, where: Path | str) -> Destination:
        """Where a tensor goes.

        Raises:
            UserError: it is in no rule.
        """
        place = self.find(name)
        if place is None:
            lora = "it holds LoRA weights, merge them into their model first" if "lora_" in name else ""
            hint = self.hint or lora
            raise UserError(
                f"{where}: tensor {name} is not part of {self.of}" + (f": {hint}" if hint else "")
            )
        return place

    def steps(self, headers: Iterable[TensorHeader], where: Path | str) -> tuple[list[Step], list[Dropped]]:
        """The target tensors of these source tensors, in their order, and what is left out.

        Raises:
            UserError: a tensor is in no rule, or cannot be cut as its rule says.
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
        """Why a dropped tensor is left out."""
        return place.rule.reason if isinstance(place.rule, Drop) else self.reason


def placed(header: TensorHeader, place: Destination) -> list[Step]:
    """The steps that put a source tensor in its place.

    Raises:
        UserError: it cannot be cut as its rule says.
    """
    match place.rule:
        case Split(groups=groups, sizes=sizes):
            return slices(header, dict(zip(place.targets, sizes, strict=True)), groups)
        case Reshape(dimensions=dimensions):
            step = copied(header, place.targets[0])
            return [step.model_copy(update={"operation": "reshape", "shape": header.shape[-dimensions:]})]
    return [copied(header, place.targets[0])]


def slices(header: TensorHeader, units: dict[str, int], groups: int) -> list[Step]:
    """Steps that cut a fused tensor: target name -> number of units in each group, one after another.

    Raises:
        UserError: its rows cannot be divided so.
    """
    total, rows = sum(units.values()), header.shape[0]
    if rows % (groups * total):
        raise UserError(
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
