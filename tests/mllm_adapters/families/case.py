"""What the contract test must know of a family and layout."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm_adapters.core.contract import Plan, Target


@dataclass(frozen=True)
class Golden:
    """A folder of reference vectors."""

    folder: Path

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Inputs and outputs of the original code."""
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def about(self) -> dict[str, Any]:
        """The JSON beside them."""
        return json.loads((self.folder / "expected.json").read_text())

    def pixels(self, sequence: str) -> Tensor:
        """The images of a sequence."""
        return self.expected["pixel_values"][self.about["image_index"][sequence]]


def one_prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """A prompt of arbitrary ids about one image, for a model that has one placeholder per visual token."""
    ids = torch.tensor([[1, 5] + [plan.image_token_id] * plan.after.tokens + [7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@dataclass(frozen=True)
class Case:
    """A row of the contract test.

    Attributes:
        name: Id of the row.
        golden: Folder below the golden folder; empty where ``build`` makes it.
        features: Model and golden vectors -> what the tower hands on, shaped as ``vision_features``.
        tokens: Likewise what the language model gets, shaped as ``visual_tokens`` (or None where there is no such).
        inputs: Model, golden vectors and name of a sequence -> keyword arguments of the model.
        logits: Logits, golden vectors and name of a sequence -> (found, expected), aligned.
        tower: Swapped model -> the CLIPVisionModel in it.
        prompt: Plan and pixels [1, 3, S, S] -> keyword arguments of the swapped model, about one image.
        target: Layout that the swap writes.
        stock: Whether the swapped model loads without this project.
        sequences: The golden sequences.
        parts: ``--part`` options, name -> path below the golden folder.
        tolerance: Largest absolute difference, with the reason beside the row where it is more than 1e-4.
        converted: Whether the golden folder is converted first, so that the row is about the transformers layout.
        reswap: Whether a swapped checkpoint can take another tower (it can, as long as its family reads it).
        build: Writes a tiny checkpoint with what its stock class makes of it, for layouts that transformers reads
            itself and that have no golden folder.
    """

    name: str
    golden: str
    features: Callable[[nn.Module, Golden], Tensor]
    tokens: Callable[[nn.Module, Golden], Tensor] | None
    inputs: Callable[[nn.Module, Golden, str], Mapping[str, Any]]
    logits: Callable[[Tensor, Golden, str], tuple[Tensor, Tensor]]
    tower: Callable[[nn.Module], nn.Module]
    prompt: Callable[[Plan, Tensor], Mapping[str, Any]] = one_prompt
    target: Target = "own"
    stock: bool = False
    sequences: tuple[str, ...] = ("seq0", "seq1")
    parts: Mapping[str, str] | None = None
    tolerance: float = 1e-4
    converted: bool = False
    reswap: bool = True
    build: Callable[[Path], Golden] | None = None
