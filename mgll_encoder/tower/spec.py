"""The specification that is stored with a tower."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mgll_encoder.common.errors import BadDataError

Activation = Literal["gelu", "quick_gelu", "gelu_pytorch_tanh"]
Pooling = Literal["class", "mean", "mean_norm", "attention"]
Resize = Literal["squash", "crop", "pad"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PixelRule(BaseModel):
    """How an image becomes pixels: always bicubic, always square.

    Attributes:
        image_size: Side of the (square) input in pixels.
        mean: Per-channel mean of the normalization, on a 0-1 scale.
        std: Per-channel standard deviation of the normalization, on a 0-1 scale.
        resize: ``squash`` (both sides to image_size), ``crop`` (shorter side, then center crop) or
            ``pad`` (to a square with the mean color, then resize).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: PositiveInt
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: Resize = "squash"


class TowerSpec(PixelRule):
    """Geometry and preprocessing of a vision tower.

    Attributes:
        architecture: Its name in `mgll_encoder.tower.architectures.ARCHITECTURES`.
        width: Hidden size C of the transformer.
        depth: Number of transformer blocks.
        heads: Attention heads.
        mlp_width: Hidden size of the MLP in each block.
        patch_size: Side of a patch in pixels.
        activation: ``gelu`` (exact), ``quick_gelu`` (x·sigmoid(1.702x)) or ``gelu_pytorch_tanh``. It cannot be
            detected from the weights.
        projection_dim: Width of the shared image-text space, or None if the file has no projection.
        layer_norm_eps: Epsilon of every LayerNorm.
        registers: Register tokens between class token and patch tokens.
        pooling: How image features are computed: ``class`` (the class token after the last LayerNorm), ``mean`` (the
            mean of the patch tokens after it), ``mean_norm`` (the mean of the patch tokens, then the LayerNorm, as in
            fine-tuning an MAE with global pooling) or ``attention`` (SigLIP's pooling head).
    """

    architecture: str = Field(default="clip", exclude_if=lambda value: value == "clip")
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_width: PositiveInt
    patch_size: PositiveInt
    activation: Activation
    projection_dim: PositiveInt | None = None
    layer_norm_eps: float = 1e-5
    registers: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    pooling: Pooling = Field(default="class", exclude_if=lambda value: value == "class")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided among {self.heads} attention heads")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patch tokens per image (without the class token)."""
        return self.grid**2


Contract = TypeVar("Contract", bound=PixelRule)


def checked(kind: type[Contract], fields: Mapping[str, Any], where: Path) -> Contract:
    """Build a specification from fields read from a file, and validate them.

    Args:
        kind: ``PixelRule`` or ``TowerSpec``.
        fields: Its fields.
        where: The file, for the error message.

    Raises:
        UserError: a field is missing, unknown or of the wrong type.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        found = f"field '{name}' is {first['input']!r}: " if name else ""
        raise BadDataError(f"{where}: {found}{first['msg']}") from None
