"""The model card of a tower's folder."""

import json
from typing import Any

from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.spec import TowerSpec

_CARD = """---
library_name: transformers
pipeline_tag: {task}
---

# MGLL vision tower

A {architecture.title}: width {spec.width}, {spec.depth} blocks, activation `{spec.activation}`, {spec.image_size} px in
patches of {spec.patch_size}, {spec.patches} patch tokens. Pixels: {spec.resize} to {spec.image_size} px (bicubic),
mean {spec.mean}, std {spec.std}.

    from transformers import AutoImageProcessor, {architecture.model_class}
    tower = {architecture.model_class}.from_pretrained(folder{options})
    features = tower(**AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt"))

    swap-encoder --mllm llava-med --encoder folder
{text}
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

_TEXT = """
The text tower that was trained with it is in `text/`:

    from mgll_encoder.text.text_tower import load_text_tower
    texts = load_text_tower(folder).features(["severe glaucoma"])  # to be compared with projected image features
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


def model_card(spec: TowerSpec, provenance: dict[str, Any], with_text: bool) -> str:
    """Write a model card in Markdown.

    Args:
        spec: The tower's specification.
        provenance: What is recorded about the tower; its ``pretraining``, if there is one, gets a table.
        with_text: Whether the folder contains a text tower.
    """
    return _CARD.format(
        task="zero-shot-image-classification" if with_text else "image-feature-extraction",
        spec=spec,
        architecture=ARCHITECTURES[spec.architecture],
        options="".join(
            f", {name}={value}" for name, value in ARCHITECTURES[spec.architecture].options.items()
        ),
        text=_TEXT if with_text else "",
        training=_training(provenance["pretraining"]) if "pretraining" in provenance else "",
        provenance=json.dumps(provenance, indent=2),
    )


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
