"""A tower in memory: the transformers model of its architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgll_encoder.tower.architectures import ARCHITECTURES, first_patch
from mgll_encoder.tower.header import TowerHeader
from mgll_encoder.tower.spec import TowerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class Tower:
    """A tower in memory.

    Attributes:
        header: Its source and specification.
        model: The transformers model of its architecture, in eval mode: ``CLIPVisionModel``, ``Dinov2Model`` ...
        projection: Weight of the projection into the image-text space [projection_dim, width], or None.
            Image features are ``pooled(pixels) @ projection.T`` (not normalized).
    """

    header: TowerHeader
    model: "PreTrainedModel"
    projection: Tensor | None

    @property
    def spec(self) -> TowerSpec:
        """Specification of the tower."""
        return self.header.spec

    @property
    def into_shared(self) -> Tensor | None:
        """The projection; the identity [width, width] if the features are in the image-text space without one."""
        architecture = self.header.architecture
        if architecture.shares_space and self.spec.pooling == next(iter(architecture.poolings)):
            return torch.eye(self.spec.width)
        return self.projection

    def pooled(self, pixels: Tensor) -> Tensor:
        """Compute features [N, width] of pixels [N, 3, S, S]; see `pooled`."""
        return pooled(self.model, self.spec, pixels)

    @classmethod
    def from_model(
        cls, model: "PreTrainedModel", spec: TowerSpec, projection: Tensor | None = None
    ) -> "Tower":
        """Wrap a model made in this process (for example by training) as a tower, for ``save_tower``.

        Args:
            model: A model of ``build_model(spec)``'s class and geometry.
            spec: Its specification, with the preprocessing it was trained with.
            projection: Weight [projection_dim, width], if it has one.
        """
        if projection is not None:
            spec = spec.model_copy(update={"projection_dim": projection.shape[0]})
        header = TowerHeader(
            spec=spec,
            tensors={name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()},
            dropped={},
            layout="model in memory",
            source=Path(),
            files=(),
            activation_source="stored",
            preprocessing_source="stored",
        )
        return cls(header, model.eval(), projection)


def filled_model(spec: TowerSpec, state: Mapping[str, Tensor]) -> "PreTrainedModel":
    """Build the transformers model of a specification from these tensors, without copying them, in eval mode."""
    with torch.device("meta"):  # do not initialize weights that are replaced
        model = build_model(spec)
    model.load_state_dict(state, assign=True)
    if ARCHITECTURES[spec.architecture].position_ids:
        rows = state[ARCHITECTURES[spec.architecture].positions].shape[-2]
        embeddings: Any = model.embeddings
        embeddings.position_ids = torch.nn.Buffer(torch.arange(rows)[None], persistent=False)
    model.eval()
    return model


def pooled(model: "PreTrainedModel", spec: TowerSpec, pixels: Tensor) -> Tensor:
    """Compute image features [N, width], before any projection.

    Args:
        model: A model of ``build_model(spec)``'s class.
        spec: Its specification, which states the ``pooling``.
        pixels: [N, 3, S, S].
    """
    architecture = ARCHITECTURES[spec.architecture]
    return architecture.poolings[spec.pooling](model, pixels, first_patch(spec))


def build_model(spec: TowerSpec) -> "PreTrainedModel":
    """Build the transformers model of a specification, with random weights."""
    import transformers

    kind: type[PreTrainedModel] = getattr(transformers, ARCHITECTURES[spec.architecture].model_class)
    return kind(vision_config(spec), **ARCHITECTURES[spec.architecture].options)


def vision_config(spec: TowerSpec) -> "PreTrainedConfig":
    """Build the transformers config of a tower."""
    import transformers

    architecture = ARCHITECTURES[spec.architecture]
    kind: type[PreTrainedConfig] = getattr(transformers, architecture.model_class).config_class
    return kind.from_dict(architecture.vision_settings(spec))
