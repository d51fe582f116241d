"""Loads a vision tower from any supported format; `examine` reads its header, `model` builds it."""

from pathlib import Path

import torch
from torch import Tensor

from mgll_encoder.common.hub import at_hand
from mgll_encoder.tower.architectures.clip import PROJECTION
from mgll_encoder.tower.examine import PROJECTION_FILE, examine
from mgll_encoder.tower.folder_metadata import check_kind
from mgll_encoder.tower.header import TowerHeader, check_finite
from mgll_encoder.tower.model import Tower, filled_model
from mgll_encoder.tower.spec import Activation, Pooling
from mgll_encoder.weights.torch_file import WeightSet
from mgll_encoder.weights.weight_file import open_weights


def inspect_tower(
    path: Path | str, *, activation: Activation | None = None, weights: WeightSet | None = None
) -> TowerHeader:
    """Read the header of a tower: keys, shapes and configs, no weights.

    Args:
        path: An official MGLL training checkpoint, an open_clip or OpenAI state dict (whole CLIP or
            ``visual`` only), a transformers folder (CLIPVisionModel, with projection, CLIPModel, Dinov2Model,
            Dinov2WithRegistersModel) or state dict, a folder written by ``save_tower``, or the hub id of any of these
            folders.
        activation: For sources that do not store it; must not contradict one that does. Attention heads are
            width // 64 unless a config says otherwise (OpenAI's rule; the default of open_clip and timm).
        weights: Of a training checkpoint with two sets of weights, ``ema`` for the moving average; None takes the raw
            ones, with a warning.

    Raises:
        UserError: the source is missing, damaged, of another architecture, or contradicts its config.
    """
    return examine(at_hand(path, check_kind), activation, weights, {})


def tower_state_dict(
    path: Path | str, *, activation: Activation | None = None, weights: WeightSet | None = None
) -> tuple[TowerHeader, dict[str, Tensor]]:
    """Read a tower's tensors by their names in the loaded model, in their stored dtype.

    The projection is not among them. Arguments and errors as for ``load_tower``.
    """
    header = examine(at_hand(path, check_kind), activation, weights, {})
    return header, _read(header)[0]


def load_tower(
    path: Path | str,
    *,
    activation: Activation | None = None,
    dtype: torch.dtype | None = None,
    weights: WeightSet | None = None,
    image_size: int | None = None,
    pooling: Pooling | None = None,
) -> Tower:
    """Load a tower as the transformers model of its architecture.

    Args:
        path: As for ``inspect_tower``.
        activation: As for ``inspect_tower``.
        dtype: Dtype of the model; float32 by default, whatever is stored.
        weights: As for ``inspect_tower``.
        image_size: Input size in pixels, for which the position table is resampled; None for the stored one.
        pooling: How image features are computed, see `TowerSpec`; None for the stored way.

    Returns:
        The tower in eval mode on the CPU.

    Raises:
        UserError: as for ``inspect_tower``; the weights are not finite, the size is not a multiple of the patch size,
            or the architecture does not have this pooling.
    """
    fitted = {"image_size": image_size, "pooling": pooling}
    changes = {name: value for name, value in fitted.items() if value is not None}
    header = examine(at_hand(path, check_kind), activation, weights, changes)
    tensors, projection = _read(header)
    dtype = dtype or torch.float32
    own = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}  # not the mapped file
    projection = None if projection is None else projection.to(dtype, copy=True).contiguous()
    return Tower(header, filled_model(header.spec, own), projection)


def _read(header: TowerHeader) -> tuple[dict[str, Tensor], Tensor | None]:
    """Read all tensors of a tower, and its projection."""
    assert header.stored is not None, "a tower in memory has no file"
    tensors = header.stored.read_all()
    if (projection := header.source / PROJECTION_FILE).is_file():
        tensors |= open_weights(projection).read([PROJECTION])
    for name, tensor in tensors.items():
        check_finite(name, tensor, header.source)
    return tensors, tensors.pop(PROJECTION, None)
