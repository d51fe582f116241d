"""What a family of multimodal LLMs must tell about itself, and what a swap plan says. Pure data.

A family reads a checkpoint's headers and answers with a `Plan`: the target tensors one by one (each with the
operation that makes it and the source tensors it is made of), the configuration and the vision contract before
and after. Whoever executes the plan (`mllm_adapters.swap.apply` on disk, `mllm_adapters.loading.load` in memory) needs
to know nothing about families.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, Field, InstanceOf, model_validator
from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.tower.spec import PixelRule
from mgll_encoder.weights.torch_file import WeightSet
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.data import Data
from mllm_adapters.core.fates import ConnectorFate, ProcessorFate, Recorded
from mllm_adapters.core.operations import OPERATIONS, Operation, OperationName

Target = Literal["own", "llava"]
"""What a swap writes: the family's own architecture, or a LLaVA that equals its understanding path."""

FAMILY_KEY = "mgll_family"
"""Key in the config.json of what this project writes: a LLaVA-shaped result of any family knows its origin."""


def _known_dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"'{name}' is no dtype of torch")
    return name


class Step(Data):
    """One target tensor.

    Attributes:
        name: Key in the target checkpoint.
        dtype: Torch dtype name, such as ``float16``.
        shape: Target shape.
        operation: Name of the operation that makes it, see `mllm_adapters.core.operations`.
        sources: Keys in the source checkpoint (``PART/KEY`` in an attached part) or, for ``tower``, in the tower;
            empty where nothing is read.
        replaces: Key of the source tensor whose place it takes without its values, if there is one.
        arguments: What the operation needs besides, see `Operation`.
    """

    name: str
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    shape: tuple[Annotated[int, Field(ge=0, lt=2**48)], ...]
    operation: OperationName
    sources: tuple[str, ...] = ()
    replaces: str | None = None
    arguments: dict[str, float] = Field(default_factory=dict)

    @property
    def kind(self) -> Operation:
        """The operation itself."""
        return OPERATIONS[self.operation]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        self.kind.check(self)
        return self


class Dropped(Data):
    """A source tensor that the target does not have, and why."""

    name: str
    reason: str


class VisionContract(PixelRule):
    """What happens between an image file and the tokens that the language model sees.

    Attributes:
        width: Width of the features that the connector gets.
        patch_size: Patch side in pixels.
        tokens: Visual tokens per image.
        feature_layer: Index into the tower's hidden states.
        class_token: Whether the class token is among the features.
        activation: Activation in the tower's MLPs.
        leading: Tokens before the patch tokens that the tower gives: 1 for a class token.
        tiles: Most tiles that an image may be cut into; ``tokens`` are those of one tile.
    """

    width: int
    patch_size: int
    tokens: int
    feature_layer: int
    class_token: bool
    activation: str
    leading: int = Field(default=1, exclude_if=lambda value: value == 1)
    tiles: int = 1

    @property
    def grid(self) -> int:
        """Patches along one side of the tower's input."""
        return self.image_size // self.patch_size

    @property
    def select_strategy(self) -> Literal["default", "full"]:
        """``vision_feature_select_strategy`` of a LLaVA: ``default`` takes a class token off."""
        return "default" if self.leading and not self.class_token else "full"


class Plan(Data):
    """Everything that will be true of the target checkpoint, before a byte of it is written.

    Attributes:
        family: Registry name of the family.
        layout: Layout of the source checkpoint, as the family calls it.
        source: Source checkpoint folder.
        tower: File or folder of the tower that the target gets: the new one, or the source's own where it
            lies outside the checkpoint; None where the tower's tensors come from the checkpoint itself.
        opened: That tower, where it is opened already; it is no part of the record of a plan.
        tower_weights: Which of two sets of weights in ``tower`` is meant; None where it holds one.
        swapped: Whether ``tower`` is a new one.
        parts: Further files and folders that the plan reads, by the name that ``--part`` gives them.
        steps: The target tensors, in source order.
        dropped: Source tensors left out.
        config: The target's config.json.
        generation: Fields of generation_config.json that are not those of the source.
        before: Vision contract of the source.
        after: Vision contract of the target.
        image_token_id: Id of the image placeholder in the target.
        processor: How the processor comes about; None where the source has no tokenizer, so that none is written.
        connectors: Modules that read vision features, and what becomes of them.
        notes: What the user should know.
        alignment: How the connectors were fitted, where they were (`mllm_adapters.alignment.align.Alignment.record`).
    """

    family: str
    layout: str
    source: Path
    tower: Path | None = None
    opened: InstanceOf[TowerHeader] | None = Field(default=None, exclude=True, repr=False)
    tower_weights: WeightSet | None = None
    swapped: bool = False
    parts: dict[str, Path] = Field(default_factory=dict)
    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    config: dict[str, Any]
    generation: dict[str, Any] = Field(default_factory=dict)
    before: VisionContract
    after: VisionContract
    image_token_id: int
    processor: ProcessorFate | Recorded | None = None
    connectors: dict[str, ConnectorFate] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    alignment: dict[str, Any] | None = None


@dataclass(frozen=True)
class ConnectorLayer:
    """A linear layer that reads vision features, and where alignment finds these.

    Attributes:
        linear: Name of the layer in the plan's tensors, without ``.weight``.
        at: Module whose input are the features; None for the layer itself.
        host: The layer's name in the source model, where it is another one. A host that has no such layer has an
            ``Identity`` in its place: then the features themselves are what is fitted to.
        adds: Linear layer whose output is added to the features before they are read; what it gives is brought to
            the new features' space.
    """

    linear: str
    at: str | None = None
    host: str | None = None
    adds: str | None = None


@dataclass(frozen=True)
class FamilySpec:
    """What is the same for every checkpoint of a family.

    Attributes:
        name: Registry key, as typed after ``--mllm``.
        title: The name people write.
        hub_id: The published checkpoint that the bare family name stands for.
        reads: The checkpoints that are read, in words.
        tower: Regular expression over parameter names of the loaded model: the vision tower.
        projector: Likewise: what reads the tower's features (trained by the projector stage).
        language_model: Likewise: the language model.
        sees: Likewise over tensor names: what `Family.encode_images` needs; empty for tower and projector.
        other: Likewise: what no stage trains (an image generator, a second tower).
        extra_weights: Files of the checkpoint folder that may hold tensors its shards lack.
        loose_weights: Regular expressions over tensor names, for checkpoints that are weight files without a
            config.json: a file with a tensor that matches the first one tells the family; the files that match any
            of them are read.
        parts: Parts that may lie outside the checkpoint, name -> what it is; each can be given as ``--part NAME=PATH``.
        encoders: Architectures of vision encoders that a swap can put in, by name.
        targets: Layouts that a swap can write: ``own`` and, where the understanding path is a LLaVA, ``llava``.
        not_llava: Why it is none, where it is none; empty where ``own`` is a LLaVA already.
    """

    name: str
    title: str
    hub_id: str
    reads: tuple[str, ...]
    tower: str
    projector: str
    language_model: str
    vision_parameters: str = ""
    other: str = r"(?!)"
    extra_weights: tuple[str, ...] = ()
    bare_weights: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    encoders: tuple[str, ...] = ("clip",)
    targets: tuple[Target, ...] = ("own",)
    not_llava: str = ""


class Family(ABC):
    """The contract: detect a checkpoint by its configuration, plan, and write its processor."""

    spec: FamilySpec

    @abstractmethod
    def layout(self, config: Mapping[str, Any]) -> str | None:
        """The layout that this configuration describes, or None if it is not of this family.

        ``transformers`` is the layout that loads as it is, with stock classes or with ours; of the others, conversion
        is up to `plan`. An empty configuration stands for loose weight files (`FamilySpec.bare_weights`).
        """

    @abstractmethod
    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan the conversion to a checkpoint that loads as it is, with ``tower`` in place if given.

        Raises:
            UserError: the checkpoint is of a variant that is not supported, or lacks something.
        """

    @abstractmethod
    def processor(self, plan: Plan) -> Any | None:
        """The processor of the planned checkpoint, or None where the source has no tokenizer."""

    def processor_writer(self, plan: Plan) -> Callable[[Path], None]:
        """Make the processor; what comes back writes everything of it into the folder of the planned checkpoint.

        Raises:
            UserError: it cannot be made.
        """
        processor, images = self.processor(plan), self.image_processor(plan)

        def write(folder: Path) -> None:
            if processor is not None:
                processor.save_pretrained(folder)
            # The file that releases before 5.0 read; without a tokenizer, all that says how to prepare images.
            images.save_pretrained(folder)

        return write

    def image_processor(self, plan: Plan) -> Any:
        """The image processor of the planned checkpoint, which is written even where there is no tokenizer."""
        from mgll_encoder.tower.preprocess import image_processor

        return image_processor(plan.after)

    def connector_layers(self, plan: Plan) -> tuple[ConnectorLayer, ...]:
        """The linear layers that alignment fits; normalisations before them stay as planned."""
        linear = {step.name for step in plan.steps if len(step.shape) == 2}
        return tuple(ConnectorLayer(name) for name in plan.connectors if f"{name}.weight" in linear)

    def for_alignment(self, plan: Plan, checkpoint: Checkpoint) -> Plan:  # noqa: ARG002 (what overrides it reads it)
        """The plan of a swap whose connectors will be fitted: of another one, where they need a layer of their own."""
        return plan

    def pixel_rule(self, contract: VisionContract, config: Mapping[str, Any]) -> PixelRule:  # noqa: ARG002 (likewise)
        """How pictures are prepared for `look`, given a model's vision contract and config.json."""
        return contract

    def encode_images(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (likewise)
        """Let a model see pictures [n, 3, S, S] made as `picture` says, up to its connectors at least."""
        model.get_image_features(pixel_values=pixels)

    def token_order(self, model: Any, contract: VisionContract) -> Tensor | None:  # noqa: ARG002 (likewise)
        """Indices that put the features of one picture, as its connectors get them, row by row; None if they are."""
        return None
