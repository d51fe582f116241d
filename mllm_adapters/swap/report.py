"""Formats plans and alignments for the terminal."""

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mgll_encoder.common.terminal_table import TerminalTable
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.architectures import MODEL_TYPES
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.operations import OPERATIONS
from mllm_adapters.core.streaming import nbytes
from mllm_adapters.core.wording import connector_words, processor_words
from mllm_adapters.swap.apply import bytes_linked
from mllm_adapters.swap.card import contract_rows

if TYPE_CHECKING:
    from mllm_adapters.alignment.align import Alignment


def alignment_table(alignment: "Alignment") -> RenderableType:
    """Return a table of how well each connector layer was fitted, for the terminal."""
    table = TerminalTable(
        f"Connectors fitted on {alignment.used} images ({alignment.held_out} of them held out), "
        f"{alignment.tokens} tokens, in {alignment.seconds:.0f} s"
    )
    table.add_words("connector")
    table.add_figures("R² held out", "R² unaligned", "relative error", "ridge")
    table.add_words("towards").add_figures("seconds")
    for fit in alignment.fits:
        unaligned = "re-initialized" if fit.r2_unaligned is None else f"{fit.r2_unaligned:.3f}"
        error, ridge = f"{fit.relative_error:.3f}", f"{fit.strength:.1e}"
        table.add_row(
            fit.connector, f"{fit.r2:.3f}", unaligned, error, ridge, fit.towards, f"{fit.seconds:.1f}"
        )
    return table


def total_bytes(plan: Plan, names: Collection[str] | None = None) -> int:
    """Return the bytes of all target tensors, or of those with these names."""
    return sum(nbytes(step) for step in plan.steps if names is None or step.name in names)


def loads_with(plan: Plan) -> str:
    """Return what ``AutoModelForImageTextToText.from_pretrained`` needs to load the target."""
    return "import mllm_adapters.auto" if plan.config["model_type"] in MODEL_TYPES else "stock transformers"


def plan_table(
    plan: Plan, checkpoint: Checkpoint, *, copy: bool = False, held: Collection[str] | None = None
) -> RenderableType:
    """Return tables of what a plan will change, for the terminal.

    Args:
        plan: The plan.
        checkpoint: Its source.
        copy: Whether unchanged files will be copied instead of linked.
        held: For a delta, the names of its tensors.
    """
    vision = TerminalTable("Input of the language model").add_words("", "before", "after")
    for name, before, after in contract_rows(plan.before, plan.after):
        vision.add_row(name, before, after if after == before else Text(after, "bold"))

    tensors = TerminalTable("Tensors").add_words("").add_figures("number", "bytes")
    for operation in OPERATIONS.values():
        steps = [step for step in plan.steps if step.kind is operation]
        if steps:
            tensors.add_row(operation.label, str(len(steps)), decimal(sum(map(nbytes, steps))))
    for reason, number in Counter(d.reason for d in plan.dropped).items():
        tensors.add_row(f"dropped: {reason}", str(number), "")
    left = bytes_linked(plan, checkpoint) if held is None else total_bytes(plan) - total_bytes(plan, held)
    tensors.add_section()
    tensors.add_row("to write", "", decimal(total_bytes(plan) - left))
    elsewhere = "made from the base" if held is not None else "to copy unchanged" if copy else "to hard-link"
    tensors.add_row(elsewhere, "", decimal(left))

    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("checkpoint", f"{plan.source} ({plan.family}, {plan.layout} layout)")
    facts.add_row("tower", str(plan.tower or "the checkpoint's own"))
    for connector, fate in plan.connectors.items():
        facts.add_row("connector", f"{connector}: {connector_words(fate)}")
    facts.add_row("processor", processor_words(plan.processor))
    loads = f"{loads_with(plan)}: AutoModelForImageTextToText.from_pretrained"
    facts.add_row("loads with", loads if held is None else "mllm_adapters.load_mllm, with its base")
    return Group(facts, "", vision, tensors)
