"""The model card of a written checkpoint, in the hub's format."""

import re
from pathlib import Path
from typing import Any

import yaml

from mllm_adapters.core.contract import Plan, VisionContract
from mllm_adapters.core.provenance import InputRecord, SwapRecord, without_paths
from mllm_adapters.core.registry import family
from mllm_adapters.core.wording import connector_words

CARD = "README.md"

_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\n---[ \t]*(\r?\n|$)", re.DOTALL)
"""The fields of a card, as parsed by huggingface_hub."""

_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")

_CARD = """---
{data}
---

# {title}

- Source: `{source}` ({family}, {layout} layout)
- Vision tower: {tower}
{connectors}

| | before | after |
|---|---|---|
{rows}

{notes}

## Intended use

Research on medical images and text. Not a medical device: not for diagnosis, treatment or any decision about a patient.
{trained}

## Licence

{licenses}

## Provenance

What was done, tensor by tensor, with hashes of everything that was read and written: `mgll_swap.json`.
`swap-encoder verify FOLDER` checks this folder against it.
"""

_UNTRAINED = (
    "A swap trains nothing: until the projector is retrained for the new tower (`retrain-projector`, which "
    "adds its record to this folder), answers about images are worse than the source's."
)


def model_card(plan: Plan, record: SwapRecord) -> str:
    """Make the README.md of the planned checkpoint.

    Args:
        plan: The executed plan.
        record: Its provenance.
    """
    title = family(plan.family).spec.title
    inputs = record.inputs
    licenses = {inputs.source.name: license_of(plan.source)}
    if inputs.tower and plan.tower:
        licenses[inputs.tower.name] = license_of(plan.tower)
    return _CARD.format(
        data=_metadata(inputs.source, licenses[inputs.source.name], plan),
        title=f"{title} with another vision tower" if plan.swapped else f"{title} in the transformers layout",
        source=inputs.source.name,
        family=plan.family,
        layout=plan.layout,
        tower=f"`{inputs.tower.name}`" if inputs.tower else "the source's own",
        connectors="\n".join(
            f"- Connector: `{name}`, {connector_words(fate)}" for name, fate in plan.connectors.items()
        ),
        rows="\n".join(f"| {name} | {b} | {a} |" for name, b, a in contract_rows(plan.before, plan.after)),
        notes="\n".join(f"- {note}" for note in without_paths(plan.notes, plan)),
        trained=_UNTRAINED if plan.swapped else "",
        licenses="\n".join(_license_line(name, found) for name, found in licenses.items()),
    )


def license_of(path: Path) -> dict[str, str]:
    """Read the license of a model folder: the fields ``license...`` of its card, and a file of terms."""
    found: dict[str, str] = {}
    card = path / CARD
    if card.is_file():
        matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
        try:
            fields = yaml.safe_load(matter[1]) if matter else None
        except yaml.YAMLError:  # a card without readable fields
            fields = None
        wanted = ("license", "license_name", "license_link")
        values = fields if isinstance(fields, dict) else {}
        found = {name: values[name] for name in wanted if isinstance(values.get(name), str)}
    terms = next((name for name in _LICENSES if (path / name).is_file()), None)
    return found | ({"terms": terms} if terms else {})


def _metadata(source: InputRecord, license: dict[str, str], plan: Plan) -> str:
    """Return the hub's fields, see huggingface.co/docs/hub/model-cards."""
    fields: dict[str, Any] = {"base_model": source.hub_id} if source.hub_id else {}
    fields |= {"library_name": "transformers"}
    fields |= {name: value for name, value in license.items() if name != "terms"}
    fields |= {
        "pipeline_tag": "image-text-to-text",
        "tags": ["medical", "mgll", "vision-tower-swap" if plan.swapped else "converted", plan.family],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def _license_line(name: str, license: dict[str, str]) -> str:
    said = license.get("license_name") or license.get("license")
    what = f"`{said}`" if said else "its folder does not name one; ask where you had it from"
    link = f" ({license['license_link']})" if "license_link" in license else ""
    terms = f"; terms in its file `{license['terms']}`" if "terms" in license else ""
    return f"- `{name}`: {what}{link}{terms}. It holds for this checkpoint too."


def contract_rows(before: VisionContract, after: VisionContract) -> list[tuple[str, str, str]]:
    """Return name, before and after of every property of a vision contract, as text."""

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
