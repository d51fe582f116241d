"""A plan for the eye."""

from collections import Counter

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from mllm_adapters.apply import bytes_linked
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import Plan, VisionContract
from mllm_adapters.streaming import nbytes

OPERATION_WORDS = {
    "keep": "kept as they are",
    "rename": "kept under a new name",
    "tower": "from the tower",
    "extend_rows": "extended by rows (each the mean of the old rows)",
    "reinit": "re-initialised",
    "zeros": "set to zero",
}


def total_bytes(plan: Plan) -> int:
    """Bytes of all target tensors."""
    return sum(map(nbytes, plan.steps))


def plan_table(plan: Plan, checkpoint: Checkpoint) -> RenderableType:
    """What a plan will change, as tables for the terminal."""
    vision = Table(title="What the language model will see", title_justify="left")
    for column in ("", "before", "after"):
        vision.add_column(column)
    for name, before, after in _contract_rows(plan.before, plan.after):
        vision.add_row(name, before, after if after == before else f"[bold]{after}[/bold]")

    tensors = Table(title="Tensors", title_justify="left")
    for column in ("", "number", "bytes"):
        tensors.add_column(column, justify="left" if not column else "right")
    for operation, words in OPERATION_WORDS.items():
        steps = [step for step in plan.steps if step.operation == operation]
        if steps:
            tensors.add_row(words, str(len(steps)), decimal(sum(map(nbytes, steps))))
    for reason, number in Counter(d.reason for d in plan.dropped).items():
        tensors.add_row(f"dropped: {reason}", str(number), "")
    linked = bytes_linked(plan, checkpoint)
    tensors.add_section()
    tensors.add_row("to write", "", decimal(total_bytes(plan) - linked))
    tensors.add_row("to hard-link", "", decimal(linked))

    facts = Table.grid(padding=(0, 2))
    facts.add_row("checkpoint", f"{plan.source} ({plan.family}, {plan.layout} layout)")
    facts.add_row("tower", f"{plan.tower}" if plan.tower else "the checkpoint's own")
    for reader, fate in plan.readers.items():
        facts.add_row("reader", f"{reader}: {fate}")
    facts.add_row("processor", plan.processor or "none is written: the source has no tokenizer")
    facts.add_row("loads with", "stock transformers: AutoModelForImageTextToText.from_pretrained")
    return Group(facts, "", vision, tensors)


def _contract_rows(before: VisionContract, after: VisionContract) -> list[tuple[str, str, str]]:
    def words(c: VisionContract) -> list[tuple[str, str]]:
        grid = c.image_size // c.patch_size
        return [
            ("tokens per image", f"{c.tokens} ({grid}x{grid}{' + class token' if c.class_token else ''})"),
            ("image", f"{c.image_size} px, patch {c.patch_size}"),
            ("resize", c.resize),
            ("mean", " ".join(f"{x:.4f}" for x in c.mean)),
            ("std", " ".join(f"{x:.4f}" for x in c.std)),
            ("feature width", str(c.width)),
            ("hidden layer", str(c.feature_layer)),
            ("activation", c.activation or "unknown"),
        ]

    return [(name, b, a) for (name, b), (_, a) in zip(words(before), words(after), strict=True)]
