"""The interface of a family of multimodal LLMs, and the plan of a swap, as pure data.

A family reads a checkpoint's headers and returns a `Plan`: every target tensor with its operation and its
source tensors, the configuration, and the vision contract before and after. The code that executes a plan
(`mllm_adapters.swap.apply` on disk, `mllm_adapters.loading.load` in memory) is independent of families.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, InstanceOf
from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.tower.spec import PixelRule
from mgll_encoder.weights.torch_file import WeightSet
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.data import Data
from mllm_adapters.core.fates import ConnectorFate, ProcessorFate
from mllm_adapters.core.operations import Step

Target = Literal["own", "llava"]
"""Target of a swap: the family's own architecture, or a LLaVA that equals its understanding path."""

FAMILY_KEY = "mgll_family"
"""Key in config.json that records the family of a result, which may be in the LLaVA layout."""


class Dropped(Data):
    """A source tensor that the target does not have, with the reason."""

    name: str
    reason: str


class VisionContract(PixelRule):
    """The processing from an image file to the language model's visual tokens.

    Attributes:
        width: Width of the features that the connector reads.
        patch_size: Patch side in pixels.
        tokens: Visual tokens per image.
        feature_layer: Index into the tower's hidden states.
        class_token: Whether the class token is among the features.
        activation: Activation in the tower's MLPs.
        leading: Tokens before the patch tokens that the tower gives: 1 for a class token.
        tiles: Maximum number of tiles per image; ``tokens`` are those of one tile.
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
        """Return the number of patches along one side of the tower's input."""
        return self.image_size // self.patch_size

    @property
    def select_strategy(self) -> Literal["default", "full"]:
        """Return the ``vision_feature_select_strategy`` of a LLaVA: ``default`` removes a class token."""
        return "default" if self.leading and not self.class_token else "full"


class Plan(Data):
    """Complete description of the target checkpoint, before anything is written.

    Attributes:
        family: Registry name of the family.
        layout: The family's name of the source checkpoint's layout.
        source: Source checkpoint folder.
        tower: File or folder of the target's tower: the new one, or the source's own if it is stored outside
            the checkpoint; None if the tower's tensors come from the checkpoint itself.
        opened: That tower, if it is already open; not part of a plan's record.
        tower_weights: Which of two sets of weights in ``tower`` to use; None if there is only one.
        swapped: Whether ``tower`` is a new one.
        parts: Other files and folders that the plan reads, by part name.
        steps: The target tensors, in source order.
        dropped: Dropped source tensors.
        config: The target's config.json.
        generation: Fields of generation_config.json that differ from the source.
        before: Vision contract of the source.
        after: Vision contract of the target.
        image_token_id: Id of the image placeholder in the target.
        processor: How the processor is made; None without a tokenizer in the source.
        connectors: Modules that read vision features, with their fates.
        notes: Notes for the user.
        alignment: How the connectors were fitted, if they were
            (`mllm_adapters.alignment.align.Alignment.record`).
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
    processor: ProcessorFate | None = None
    connectors: dict[str, ConnectorFate] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    alignment: dict[str, Any] | None = None


@dataclass(frozen=True)
class ConnectorLayer:
    """A linear layer that reads vision features, and where alignment captures them.

    Attributes:
        linear: Name of the layer in the plan's tensors, without ``.weight``.
        at: Module whose input are the features; None for the layer itself.
        host: The layer's name in the source model, if it differs. A host without this layer has an
            ``Identity`` instead: the target of the fit is then the features themselves.
        adds: Linear layer whose output is added to the features before they are read; its output is mapped
            to the new features' space.
    """

    linear: str
    at: str | None = None
    host: str | None = None
    adds: str | None = None


@dataclass(frozen=True)
class FamilySpec:
    """The properties that all checkpoints of a family share.

    Attributes:
        name: Registry key, as used in ``--mllm``.
        title: Common name.
        hub_id: The published checkpoint that the family name stands for.
        reads: Descriptions of the supported checkpoints.
        tower: Regular expression over parameter names of the loaded model: the vision tower.
        projector: Likewise: the connector (trained by the projector stage).
        language_model: Likewise: the language model.
        vision_parameters: Likewise over tensor names: what `Family.encode_images` needs; empty for tower and projector.
        other: Likewise: parts that no stage trains (an image generator, a second tower).
        extra_weights: Files of the checkpoint folder that may contain tensors missing in its shards.
        bare_weights: Regular expressions over tensor names, for checkpoints that are weight files without a
            config.json: a file with a tensor that matches the first one identifies the family; the files
            that match any of them are read.
        parts: Parts that may be stored outside the checkpoint, name -> description; each can be given by
            path.
        encoders: Architectures of vision encoders that a swap can put in, by name.
        targets: Layouts that a swap can write: ``own`` and, if the understanding path is a LLaVA, ``llava``.
        not_llava: Why ``llava`` is not possible; empty if ``own`` is already a LLaVA.
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
    """The interface: detect a checkpoint by its configuration, plan, and write its processor."""

    spec: FamilySpec

    @abstractmethod
    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return the layout of this configuration, or None if it is not of this family.

        ``transformers`` is the layout that loads directly, with stock classes or with ours; `plan` converts
        the others. An empty configuration means loose weight files (`FamilySpec.bare_weights`).
        """

    @abstractmethod
    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan the conversion to the transformers layout, with ``tower`` swapped in if given.

        Raises:
            UserError: the checkpoint is an unsupported variant, or incomplete.
        """

    @abstractmethod
    def processor(self, plan: Plan) -> Any | None:
        """Return the processor of the planned checkpoint, or None if the source has no tokenizer."""

    def processor_writer(self, plan: Plan) -> Callable[[Path], None]:
        """Make the processor, and return a function that writes it into the folder of the planned checkpoint.

        Raises:
            UserError: it cannot be made.
        """
        processor, images = self.processor(plan), self.image_processor(plan)

        def write(folder: Path) -> None:
            if processor is not None:
                processor.save_pretrained(folder)
            # The file for releases before 5.0; without a tokenizer, the only one about image preprocessing.
            images.save_pretrained(folder)

        return write

    def image_processor(self, plan: Plan) -> Any:
        """Return the image processor of the planned checkpoint, which is written even without a tokenizer."""
        from mgll_encoder.tower.preprocess import image_processor

        return image_processor(plan.after)

    def connector_layers(self, plan: Plan) -> tuple[ConnectorLayer, ...]:
        """Return the linear layers that alignment fits; normalizations before them stay as planned."""
        linear = {step.name for step in plan.steps if len(step.shape) == 2}
        return tuple(ConnectorLayer(name) for name in plan.connectors if f"{name}.weight" in linear)

    def for_alignment(self, plan: Plan, checkpoint: Checkpoint) -> Plan:  # noqa: ARG002 (used by overrides)
        """Return the plan of a swap whose connector will be fitted; it may have an additional layer."""
        return plan

    def pixel_rule(self, contract: VisionContract, config: Mapping[str, Any]) -> PixelRule:  # noqa: ARG002 (likewise)
        """Return the pixel rule for `encode_images`, given a model's vision contract and config.json."""
        return contract

    def encode_images(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:  # noqa: ARG002 (likewise)
        """Run a model on images [n, 3, S, S] prepared by `pixel_rule`, at least up to its connector."""
        model.get_image_features(pixel_values=pixels)

    def token_order(self, model: Any, contract: VisionContract) -> Tensor | None:  # noqa: ARG002 (likewise)
        """Return indices that reorder an image's features at the connector row by row; None if they already are."""
        return None
