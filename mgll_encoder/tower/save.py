"""Writes a tower as a folder that transformers 4 and 5 can read."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mgll_encoder.common.errors import MismatchError
from mgll_encoder.common.files import new_folder, sha256
from mgll_encoder.common.local_paths import without_local
from mgll_encoder.common.texts import read_json
from mgll_encoder.common.trained_on import Training, trainings_of, write_trainings
from mgll_encoder.text.text_tower import FOLDER as TEXT_FOLDER
from mgll_encoder.text.text_tower import TextTower
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.architectures.clip import PROJECTION
from mgll_encoder.tower.card import MADE_FROM, alone, model_card
from mgll_encoder.tower.examine import PROJECTION_FILE
from mgll_encoder.tower.folder_metadata import OURS, TOWER_FILE, TOWER_VERSION
from mgll_encoder.tower.header import TowerHeader
from mgll_encoder.tower.model import Tower, vision_config
from mgll_encoder.tower.preprocess import image_processor


def save_tower(
    tower: Tower,
    out: Path,
    force: bool = False,
    provenance: dict[str, Any] | None = None,
    text: TextTower | None = None,
    trainings: Sequence[Training] = (),
) -> Path:
    """Write a tower's folder, completely or not at all.

    The weights have names that all releases of transformers can read: those of a CLIP have the prefix
    ``vision_model.``, which ``CLIPVisionModel`` expects in transformers 4 and removes on loading in transformers 5.
    The projection is not part of that model and is written to a separate file.

    Args:
        tower: The tower; its model must have the geometry of its ``TowerSpec``.
        out: The folder to write.
        force: Replace ``out`` if it exists.
        provenance: More facts to record (training data, command line ...), in addition to source, hashes and version.
        text: The text tower that was trained with it, for the subfolder ``text/``.
        trainings: What it was trained on since it was read; the trainings of its source are copied from there.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` exists and ``force`` is not set, or the model does not match its ``TowerSpec``.
    """
    spec, header = tower.spec, tower.header
    config = vision_config(spec)
    architecture = ARCHITECTURES[spec.architecture]
    for name in architecture.fields.names.values():
        found, expected = getattr(tower.model.config, name, None), getattr(config, name)
        if found != expected:
            raise MismatchError(f"the model's {name} is {found}: expected {expected} as in its TowerSpec")
    config.architectures = [architecture.model_class]
    config.dtype = tower.model.dtype
    record = provenance_of(header, provenance)
    weights = {
        architecture.inner + architecture.written_name(name): tensor.detach().cpu().contiguous()
        for name, tensor in tower.model.state_dict().items()
    }
    with new_folder(out, force) as folder:
        config.save_pretrained(folder)
        image_processor(spec).save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if tower.projection is not None:
            projection = {PROJECTION: tower.projection.detach().cpu().contiguous()}
            save_file(projection, folder / PROJECTION_FILE, metadata={"format": "pt"})
        content = {"version": TOWER_VERSION, "spec": spec.model_dump(), "provenance": record}
        (folder / TOWER_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        card = model_card(spec, record, alone(spec, text is not None))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if text is not None:
            text.save(folder / TEXT_FOLDER)
        write_trainings(folder, [*trainings_before(header), *trainings])
    return out


def provenance_of(header: TowerHeader, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what is recorded about a tower that is written: where it was read, and ``more``; no local paths."""
    inherited = read_json(header.source / TOWER_FILE).get("provenance") if header.layout == OURS else None
    return {
        "source": header.source.name,
        "layout": header.layout,
        **({"weights": header.weights} if header.weights else {}),
        "activation_source": header.activation_source,
        "preprocessing_source": header.preprocessing_source,
        "sha256": {file.name: sha256(file) for file in header.files},
        "created_by": f"mgll-mllm {version('mgll-mllm')}",
        **({MADE_FROM: inherited} if inherited else {}),
        **without_local(more or {}),
    }


def trainings_before(header: TowerHeader) -> tuple[Training, ...]:
    """Return the recorded trainings of a tower's source; none for a tower made in memory."""
    return trainings_of(header.source) if header.files else ()
