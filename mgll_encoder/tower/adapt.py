"""Changes to the input of a tower: another image size, another normalization of the pixels."""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.tower.architectures.base import Architecture

Channels = tuple[float, float, float]


def resample_positions(pos: Tensor, grid: int, *, leading: int = 1, antialias: bool = False) -> Tensor:
    """Resample a position table to another patch grid.

    Bicubic, ``align_corners=False``; the rows before the grid are unchanged. Bit-identical to
    ``CLIPVisionEmbeddings.interpolate_pos_encoding`` of transformers (with ``antialias``, to that of
    ``Dinov2WithRegistersEmbeddings``).

    Args:
        pos: Position table [leading + g·g, C], class token first.
        grid: Patches along one side of the new grid.
        leading: Rows before the grid: 1 for a class token, 0 for none.
        antialias: Whether to smooth a table before it is made smaller.

    Returns:
        Table [leading + grid·grid, C] in the dtype of ``pos`` (computed in float32, or float64 if ``pos`` is).

    Raises:
        UserError: ``pos`` is not such a table, or ``grid`` is not positive.
    """
    old = isqrt(max(pos.shape[0] - leading, 0))
    if old < 1 or leading + old * old != pos.shape[0] or grid < 1:
        raise IncompatibleTowerError(
            f"cannot resample {pos.shape[0]} positions to a {grid}x{grid} grid: "
            f"expected {leading} + g*g rows, and a grid of at least 1x1"
        )
    if grid == old:
        return pos
    exact = pos if pos.dtype == torch.float64 else pos.float()
    patches = exact[None, leading:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = interpolate(
        patches, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    patches = patches.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return torch.cat((exact[:leading], patches)).to(pos.dtype)


def fit_positions(table: Tensor, architecture: Architecture, grid: int) -> Tensor:
    """Resample a position table [..., leading + g·g, C] to another grid, as the architecture's library does."""
    rows = table.reshape(-1, table.shape[-1])
    fitted = resample_positions(rows, grid, leading=architecture.leading, antialias=architecture.antialias)
    return fitted.reshape(*table.shape[:-2], *fitted.shape)


def fold_normalization(
    patch_weight: Tensor,
    pos: Tensor,
    *,
    trained: tuple[Channels, Channels],
    given: tuple[Channels, Channels],
    leading: int = 1,
) -> tuple[Tensor, Tensor]:
    """Change the weights so that the tower expects pixels with another normalization.

    With x = s_g·x_g + m_g, the input that the tower was trained on is
    (x - m_t)/s_t = (s_g/s_t)·x_g + (m_g - m_t)/s_t.
    The scale goes into the patch convolution, the shift into the positions of all patches (not of the class
    token). Exact, because the convolution has stride = kernel and no padding, so every patch gets the same
    shift. It can be applied before or after ``resample_positions``, which preserves constants.

    Args:
        patch_weight: Patch convolution [C, 3, p, p]; a bias does not change.
        pos: Position table [leading + g·g, C].
        trained: Mean and standard deviation that the tower was trained with (0-1 scale).
        given: Mean and standard deviation that the pixels will be normalized with.
        leading: Rows of the table before the patches.

    Returns:
        New patch convolution and position table, in the dtypes of the old ones (computed in float64).
    """
    if trained == given:
        return patch_weight, pos
    (trained_mean, trained_std), (given_mean, given_std) = (
        [torch.tensor(values, dtype=torch.float64, device=patch_weight.device) for values in pair]
        for pair in (trained, given)
    )
    weight = patch_weight.double()
    shift = torch.einsum("ocij,c->o", weight, (given_mean - trained_mean) / trained_std)
    scale = (given_std / trained_std)[None, :, None, None]
    moved = pos.double().clone()
    moved[leading:] += shift
    return (weight * scale).to(patch_weight.dtype), moved.to(pos.dtype)
