"""A LLaVA in the transformers layout as the source of an export: what it is made of, under one set of names."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.architectures import ARCHITECTURES, described_by, first_patch
from mgll_encoder.tower.spec import TowerSpec, checked
from mgll_encoder.weights.keytable import KeyTable
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.processing import host_pixels, load_processor
from mllm_adapters.core.registry import open_checkpoint

LANGUAGE = ("language_model.", "lm_head.")
"""Prefixes of the language model's tensors."""

_PARTS = (*LANGUAGE, "vision_tower.", "multi_modal_projector.")
_OLDER = (
    (re.compile(r"^model\.(?=language_model|vision_tower|multi_modal_projector)"), ""),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
"""Prefixes of releases of transformers, and what they become here."""


@dataclass(frozen=True)
class LlavaSource:
    """A LLaVA.

    Attributes:
        checkpoint: Its folder.
        config: Its transformers configuration.
        tower: Geometry and preprocessing of its vision tower.
        layers: Blocks of the tower that run before its features are read.
        processor: Its processor.
        headers: Its tensors by name, without prefixes that depend on the release that wrote them.
        notes: What was assumed about it.
    """

    checkpoint: Checkpoint
    config: Any
    tower: TowerSpec
    layers: int
    processor: Any
    headers: Mapping[str, TensorHeader]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return self.checkpoint.folder.absolute().name

    @property
    def where(self) -> str:
        """Return its configuration file, for messages."""
        return f"{self.checkpoint.folder}/config.json"

    @property
    def language_headers(self) -> dict[str, TensorHeader]:
        """Return the tensors of the language model."""
        return {name: header for name, header in self.headers.items() if name.startswith(LANGUAGE)}

    def read(self, name: str) -> Tensor:
        """Read the values of a tensor."""
        return self.checkpoint.read(self.headers[name].name)

    def part(self, prefixes: tuple[str, ...], table: KeyTable) -> Iterator[tuple[str, str]]:
        """Yield the tensors of a part with the names that a table gives them.

        Args:
            prefixes: Prefixes of their names.
            table: Their names here -> names there.

        Raises:
            UnsupportedCheckpointError: a tensor is in no rule.
        """
        for name in self.headers:
            if not name.startswith(prefixes):
                continue
            found = table.find(name)
            if found is None:
                raise UnsupportedCheckpointError(
                    f"{self.checkpoint.folder}: llama.cpp has no place for tensor {self.headers[name].name}"
                )
            yield from ((name, target) for target in found.targets)


def open_llava(folder: Path) -> LlavaSource:
    """Read what an export needs to know of a LLaVA; weights are not read.

    Raises:
        UserError: the folder cannot be read, or is another model than a LLaVA in the transformers layout.
    """
    checkpoint, family, layout = open_checkpoint(folder)
    if layout != "transformers":
        raise UnsupportedCheckpointError(
            f"{folder} is in its original layout: convert it first, with `convert()`"
        )
    kind = checkpoint.config.get("model_type")
    if kind != "llava":
        other = "; swap again with `layout=llava`" if "llava" in family.spec.targets else ""
        raise UnsupportedCheckpointError(
            f"{folder}/config.json: model_type is {kind!r}: this export writes LLaVA-shaped models only{other}"
        )
    config = build_config(checkpoint.config, f"{folder}/config.json")
    tower, notes = _tower(checkpoint)
    processor = load_processor(folder, checkpoint.config)
    if processor is None:
        raise UnsupportedCheckpointError(f"{folder} has no tokenizer: a GGUF file contains it")
    return LlavaSource(
        checkpoint, config, tower, _layers(config, tower, folder), processor, _named(checkpoint), notes
    )


def _tower(checkpoint: Checkpoint) -> tuple[TowerSpec, tuple[str, ...]]:
    vision, where = checkpoint.config["vision_config"], checkpoint.folder / "config.json"
    architecture = described_by(vision.get("model_type", "clip_vision_model"))
    if architecture is None:
        known = ", ".join(row.title for row in ARCHITECTURES.values())
        raise UnsupportedCheckpointError(
            f"{where}: vision_config: model_type is {vision['model_type']!r}, expected the tower of {known}"
        )
    try:
        fields = architecture.spec_fields(vision)
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{where}: vision_config: {error}") from None
    pixels, notes = host_pixels(checkpoint.folder, fields["image_size"])
    return checked(TowerSpec, {**fields, **pixels.model_dump()}, where), notes


def _layers(config: Any, tower: TowerSpec, folder: Path) -> int:
    """Return the number of blocks before the features; the first of the hidden states is the input."""
    layer, where = config.vision_feature_layer, f"{folder}/config.json: vision_feature_layer is"
    if not isinstance(layer, int):
        raise UnsupportedCheckpointError(f"{where} {layer!r}: llama.cpp reads one layer")
    found = layer if layer >= 0 else tower.depth + 1 + layer
    if not 0 < found <= tower.depth:
        raise UnsupportedCheckpointError(
            f"{where} {layer}: the features must be read after one of the tower's {tower.depth} blocks"
        )
    if first_patch(tower) and config.vision_feature_select_strategy != "default":
        raise UnsupportedCheckpointError(
            f"{folder}/config.json: vision_feature_select_strategy is {config.vision_feature_select_strategy!r}: "
            "llama.cpp gives the class token to no language model"
        )
    return found


def _named(checkpoint: Checkpoint) -> dict[str, TensorHeader]:
    named = {}
    for name, header in checkpoint.tensors.items():
        for pattern, instead in _OLDER:
            name = pattern.sub(instead, name)
        if not name.startswith(_PARTS):
            raise UnsupportedCheckpointError(
                f"{checkpoint.folder}: tensor {header.name} is in no part of a LLaVA"
            )
        named[name] = header
    return named
