"""The model card: what a written checkpoint is made of."""

from mllm_adapters.contract import Plan, VisionContract
from mllm_adapters.registry import family

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {title}

- Source: `{source}` ({family}, {layout} layout)
- Vision tower: {tower}
{readers}

| | before | after |
|---|---|---|
{rows}

{notes}

What was done, in full: `mgll_swap.json`. The licences of the source and of the tower hold for this checkpoint. For
research; no medical device.
"""


def model_card(plan: Plan) -> str:
    """README.md of the planned checkpoint."""
    title = family(plan.family).spec.title
    return _CARD.format(
        title=f"{title} with another vision tower" if plan.swapped else f"{title} in the transformers layout",
        source=plan.source.absolute().name,
        family=plan.family,
        layout=plan.layout,
        tower=f"`{plan.tower.absolute().name}`" if plan.tower else "the source's own",
        readers="\n".join(
            f"- Reader of its features: `{name}`, {fate}" for name, fate in plan.readers.items()
        ),
        rows="\n".join(f"| {name} | {b} | {a} |" for name, b, a in contract_rows(plan.before, plan.after)),
        notes="\n".join(f"- {note}" for note in plan.notes),
    )


def contract_rows(before: VisionContract, after: VisionContract) -> list[tuple[str, str, str]]:
    """Name, before and after of everything in a vision contract, in words."""

    def words(c: VisionContract) -> list[tuple[str, str]]:
        one_each = c.tokens == c.grid**2 + c.class_token
        patches = f"{c.grid}x{c.grid}{' + class token' if c.class_token else ''}"
        unit = "image" if c.tiles == 1 else f"tile, of at most {c.tiles}"
        return [
            ("tokens", f"{c.tokens} per {unit} ({patches if one_each else f'from {patches} patches'})"),
            ("image", f"{c.image_size} px, patch {c.patch_size}"),
            ("resize", c.resize),
            ("mean", " ".join(f"{x:.4f}" for x in c.mean)),
            ("std", " ".join(f"{x:.4f}" for x in c.std)),
            ("feature width", str(c.width)),
            ("hidden layer", str(c.feature_layer)),
            ("activation", c.activation),
        ]

    return [(name, b, a) for (name, b), (_, a) in zip(words(before), words(after), strict=True)]
