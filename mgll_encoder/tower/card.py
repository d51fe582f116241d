"""The model card of a tower's folder, alone or with its text tower."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.examine import OFFICIAL
from mgll_encoder.tower.spec import TowerSpec

MADE_FROM = "made_from"
"""Field of a provenance: that of the folder of this project which the tower was read from."""

_CARD = """---
library_name: {contents.library}
pipeline_tag: {contents.task}
---

# {title}

{contents.parts} {architecture.title}: width {spec.width}, {spec.depth} blocks, activation `{spec.activation}`,
{spec.image_size} px in patches of {spec.patch_size}, {spec.patches} patch tokens. Pixels: {spec.resize} to
{spec.image_size} px (bicubic), mean {spec.mean}, std {spec.std}.

{contents.use}
    swap-encoder --mllm llava-med --encoder folder

## Intended use

Research on medical images: as the vision encoder of a multimodal LLM, for probing, and for retrieval.
Not a medical device: not for diagnosis or any decision about a patient. It has been evaluated only as described below,
and not on other devices, populations or findings than those of its training.
{training}
The license and terms of use are those of the weights and the images it was made from.

## Provenance

```json
{provenance}
```
"""

_ALONE = """\
    from transformers import AutoImageProcessor, {architecture.model_class}
    tower = {architecture.model_class}.from_pretrained(folder{options})
    features = tower(**AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt"))
"""

_TEXT = """
The text tower that was trained with it is in `text/`, for `mgll-encoder zero-shot` and `retrieval`:

    from mgll_encoder.text.text_tower import load_text_tower
    texts = load_text_tower(folder).features(["severe glaucoma"])  # to be compared with projected image features

For zero-shot classification without this project: `mgll-encoder convert folder --to clip`, or `--to open-clip`.
"""

_TRAINING = """
## Training

| | |
|---|---|
| loss | {loss}: {alphas} |
| data | {manifest}, SHA-256 `{manifest_sha256}`, {images} images |
| distinct texts | {texts} |
| started from | image tower: {init}; text tower: {text_tower} |
| schedule | {epochs} epochs, {steps} steps; {processes} process(es) with {batch_size} images each |
| peak learning rate | {learning_rate} |
| seed | {seed} |
| kept | epoch {kept_epoch} ({select}); training loss {final_loss}; temperature {temperature} |
| validation | {validation} |
"""


@dataclass(frozen=True)
class Contents:
    """What a folder contains and how it is used.

    Attributes:
        library: The library that loads it.
        task: What the library's stock pipeline does with it.
        noun: What it is, in the title.
        parts: What it contains; followed by the architecture of the image tower.
        use: How it is used, as Markdown.
    """

    library: str
    task: str
    noun: str
    parts: str
    use: str


def alone(spec: TowerSpec, with_text: bool) -> Contents:
    """Return the contents of a folder with an image tower, and perhaps a text tower in a subfolder."""
    architecture = ARCHITECTURES[spec.architecture]
    options = "".join(f", {name}={value}" for name, value in architecture.options.items())
    use = _ALONE.format(architecture=architecture, options=options) + (_TEXT if with_text else "")
    return Contents("transformers", "image-feature-extraction", "vision tower", "A", use)


def model_card(spec: TowerSpec, provenance: dict[str, Any], contents: Contents) -> str:
    """Write a model card in Markdown.

    Args:
        spec: The image tower's specification.
        provenance: What is recorded about the tower; its ``pretraining``, if there is one, gets a table.
        contents: What the folder contains.
    """
    return _CARD.format(
        title=f"{_trained_by(spec, provenance)} {contents.noun}",
        spec=spec,
        contents=contents,
        architecture=ARCHITECTURES[spec.architecture],
        training=_training(provenance["pretraining"]) if "pretraining" in provenance else "",
        provenance=json.dumps(provenance, indent=2),
    )


def _history(provenance: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the provenance of a tower, then of the tower's folder that it was made from, and so on."""
    made: dict[str, Any] | None = provenance
    while made is not None:
        yield made
        made = made.get(MADE_FROM)


def _trained_by(spec: TowerSpec, provenance: dict[str, Any]) -> str:
    """Return what made the tower, for its title: the loss of its last training, otherwise its architecture."""
    for made in _history(provenance):
        if "pretraining" in made:
            return str(made["pretraining"]["loss"]).upper()
        if made.get("layout") == OFFICIAL:
            return "MGLL"
    return ARCHITECTURES[spec.architecture].title


def _training(record: dict[str, Any]) -> str:
    shown = {
        **record,
        "alphas": _listed(record["alphas"]),
        "texts": _listed(record["texts"]),
        "init": record["init"] or f"random weights ({record['tower_size']})",
        "validation": f"{record['validation_images']} images: {_listed(record['validation'])}"
        if record["validation"]
        else "none",
    }
    return _TRAINING.format_map(shown)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
