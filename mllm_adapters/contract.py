"""What a family of multimodal LLMs must tell about itself, and what a swap plan says. Pure data.

A family reads a checkpoint's headers and answers with a `Plan`: the target tensors one by one (each with the
operation that makes it and the source tensors it is made of), the configuration and the vision contract before
and after. Whoever executes the plan (`mllm_adapters.apply` on disk, `mllm_adapters.loading` in memory) needs to
know nothing about families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from mgll_encoder import TowerHeader
from mgll_encoder.spec import Activation, PixelRule
from mllm_adapters.checkpoint import Checkpoint

Operation = Literal["keep", "rename", "tower", "extend_rows", "reinit", "zeros"]
"""How a target tensor comes about.

- ``keep``: the source tensor under its own name; a file of nothing but these is hard-linked.
- ``rename``: the source tensor's values under another name.
- ``tower``: a tensor of the tower named by the plan, fitted to the target's grid and normalisation.
- ``extend_rows``: the source tensor with rows added at the end, each the mean of the existing rows.
- ``reinit``: drawn anew, because the width of what it reads has changed.
- ``zeros``: set to zero beside a ``reinit``.
"""


FAMILY_KEY = "mgll_family"
"""Key in the config.json of what this project writes: a LLaVA-shaped result of any family knows its origin."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Data):
    """One target tensor.

    Attributes:
        name: Key in the target checkpoint.
        dtype: Torch dtype name, such as ``float16``.
        shape: Target shape.
        operation: See `Operation`.
        source: Key in the source checkpoint or, for ``tower``, in the tower; None where nothing is read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: Operation
    source: str | None = None


class Dropped(_Data):
    """A source tensor that the target does not have, and why."""

    name: str
    reason: str


class VisionContract(PixelRule):
    """What happens between an image file and the tokens that the language model sees.

    Attributes:
        width: Width of the features that the reader gets.
        patch_size: Patch side in pixels.
        tokens: Visual tokens per image.
        feature_layer: Index into the tower's hidden states.
        class_token: Whether the class token is among the features.
        activation: Activation in the tower's MLPs.
    """

    width: int
    patch_size: int
    tokens: int
    feature_layer: int
    class_token: bool
    activation: Activation


class Plan(_Data):
    """Everything that will be true of the target checkpoint, before a byte of it is written.

    Attributes:
        family: Registry name of the family.
        layout: Layout of the source checkpoint, as the family calls it.
        source: Source checkpoint folder.
        tower: File or folder of the tower that the target gets: the new one, or the source's own where it
            lies outside the checkpoint; None where the tower's tensors come from the checkpoint itself.
        swapped: Whether ``tower`` is a new one.
        steps: The target tensors, in source order.
        dropped: Source tensors left out.
        config: The target's config.json.
        before: Vision contract of the source.
        after: Vision contract of the target.
        image_token_id: Id of the image placeholder in the target.
        processor: How the processor comes about, or why none is written.
        readers: Modules that read vision features, and what becomes of them.
        notes: What the user should know.
    """

    family: str
    layout: str
    source: Path
    tower: Path | None = None
    swapped: bool = False
    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    config: dict[str, Any]
    before: VisionContract
    after: VisionContract
    image_token_id: int
    processor: str | None = None
    readers: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilySpec:
    """What is the same for every checkpoint of a family.

    Attributes:
        name: Registry key, as typed after ``--mllm``.
        title: The name people write.
        hub_id: The published checkpoint that the bare family name stands for.
        tower: Regular expression over parameter names of the loaded model: the vision tower.
        projector: Likewise: what reads the tower's features (trained by the projector stage).
        language_model: Likewise: the language model.
        extra_weights: Files of the checkpoint folder that may hold tensors its shards lack.
    """

    name: str
    title: str
    hub_id: str
    tower: str
    projector: str
    language_model: str
    extra_weights: tuple[str, ...] = ()


class Family(Protocol):
    """The contract: detect a checkpoint by its configuration, plan, and write its processor."""

    spec: FamilySpec

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """The layout that this configuration describes, or None if it is not of this family."""

    def plan(
        self, checkpoint: Checkpoint, tower: TowerHeader | None = None, image_size: int | None = None
    ) -> Plan:
        """Plan the conversion to an ordinary transformers checkpoint, with ``tower`` in place if given."""

    def processor(self, plan: Plan) -> Any | None:
        """The processor of the planned checkpoint, or None where the source has no tokenizer."""
