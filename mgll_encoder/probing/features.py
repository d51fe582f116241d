"""Features of many images: read in workers, computed in batches, cached."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mgll_encoder.common.devices import AUTO, find_device
from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.common.files import appearing
from mgll_encoder.common.images import READER_VERSION, open_image
from mgll_encoder.common.progress import counting, track
from mgll_encoder.common.skipped import UNREADABLE, Skipped, unnamed
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.tower.model import Tower
from mgll_encoder.tower.preprocess import image_transform
from mgll_encoder.tower.spec import PixelRule

_NOT_FINITE = "gives features that are not finite"

_FEW = 256
"""Up to this many images, starting worker processes costs more than it saves."""


def workers_for(images: int, asked: int | None) -> int:
    """Return the number of reader processes: as requested; else one per core, up to 8, and 0 for few images."""
    if asked is not None:
        return asked
    return min(8, cpu_count()) if images > _FEW else 0


def pooled_features(
    tower: Tower,
    images: Sequence[Path],
    batch_size: int = 64,
    workers: int | None = None,
) -> NDArray[np.float32]:
    """Compute the tower's pooled features (see `mgll_encoder.tower.model.pooled`, no projection), [n, width].

    Args:
        tower: The tower; its own preprocessing is used.
        images: Image files.
        batch_size: Images per forward pass.
        workers: Processes that read images; 0 for none, None to choose automatically.

    Raises:
        UserError: an image cannot be read.
    """
    return _all_readable(images, _pooled(tower, images, batch_size, workers, AUTO))


def cached_features(tower: Tower, images: Sequence[Path], cache: Path) -> NDArray[np.float32]:
    """Compute `pooled_features`, cached in a file named by a hash of tower, preprocessing and images.

    Args:
        tower: The tower.
        images: Image files; identified by path, size and modification time.
        cache: Cache folder.

    Raises:
        UserError: an image cannot be read.
    """
    return _all_readable(images, _cached(tower, images, cache, None, AUTO))


def readable_features(
    tower: Tower,
    data: LabeledImages,
    cache: Path,
    skipped: Skipped,
    workers: int | None = None,
    device: str = AUTO,
) -> tuple[NDArray[np.float32], LabeledImages]:
    """Return cached features of the readable images, and their labels.

    Args:
        tower: The tower.
        data: The images.
        cache: As for `cached_features`.
        skipped: Collects the others.
        workers: As for `pooled_features`.
        device: See `mgll_encoder.common.devices.find_device`.

    Raises:
        UserError: ``skipped`` is strict and an image cannot be read, or none can be read.
    """
    features = _cached(tower, data.images, cache, workers, device)
    kept = np.asarray(~np.isnan(features).any(axis=1))
    return features[kept], without_unreadable(data, kept, skipped)


def open_every_image(data: LabeledImages, skipped: Skipped) -> LabeledImages:
    """Return the labels of the readable images, after opening each image once; for later repeated reading.

    Args:
        data: The images.
        skipped: Collects the others.

    Raises:
        UserError: as for `without_unreadable`.
    """
    with ThreadPoolExecutor() as pool:
        troubles = track(pool.map(unreadable, data.images), "Checking every image", len(data.images))
        kept = np.array([not trouble for trouble in troubles])
    return without_unreadable(data, kept, skipped)


def without_unreadable(data: LabeledImages, kept: NDArray[np.bool_], skipped: Skipped) -> LabeledImages:
    """Return the labels of the readable images, and count the others.

    Args:
        data: All images.
        kept: Whether each image can be read, [n].
        skipped: Collects the others.

    Raises:
        UserError: ``skipped`` is strict and an image cannot be read, or none can be read.
    """
    for place in np.flatnonzero(~kept):
        where = data.rows[place] if data.rows else f"image {place + 1}"
        skipped.add(UNREADABLE, f"{where}: the image {unreadable(data.images[place]) or _NOT_FINITE}")
    if not kept.any():
        raise BadDataError(f"none of {len(kept)} images can be read: {'; '.join(skipped.lines())}")
    return data.subset(kept)


def unreadable(path: Path) -> str:
    """Return why an image cannot be read, in words that follow its name; empty if it can."""
    try:
        open_image(path)
    except UserError as error:
        return unnamed(error, path)
    return ""


def tower_digest(tower: Tower) -> str:
    """Return a hash of a tower's weights and specification."""
    digest = hashlib.sha256(tower.spec.model_dump_json().encode())
    for name, value in sorted(tower.model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def images_digest(images: Sequence[Path]) -> str:
    """Return a hash of image files by path, size and modification time, and of the reader version."""
    digest = hashlib.sha256(f"reader {READER_VERSION}\n".encode())
    for path in images:
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _Images(Dataset[Tensor]):
    """Pixels of image files; all NaN for an unreadable image, since an error would end the worker."""

    def __init__(self, images: Sequence[Path], spec: PixelRule) -> None:
        self._images, self._side = images, spec.image_size
        self._transform = image_transform(spec)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self._transform(open_image(self._images[index]))
        except UserError:  # reported by the code that finds the NaN
            return torch.full((3, self._side, self._side), torch.nan)


def _pooled(
    tower: Tower, images: Sequence[Path], batch_size: int, workers: int | None, name: str
) -> NDArray[np.float32]:
    """Compute pooled features, NaN for unreadable images."""
    device = find_device(name)
    loader = DataLoader(
        _Images(images, tower.spec),
        batch_size=batch_size,
        num_workers=workers_for(len(images), workers),
        pin_memory=device.type == "cuda",
    )
    model: nn.Module = tower.model
    model.to(device)
    features = np.full((len(images), tower.spec.width), np.nan, np.float32)
    start = 0
    with torch.inference_mode(), counting("Computing the features of images", len(images)) as advance:
        for pixels in loader:
            good = ~torch.isnan(pixels).flatten(1).any(dim=1)
            if good.any():
                found = tower.pooled(pixels[good].to(device, tower.model.dtype)).float().cpu().numpy()
                features[start : start + len(pixels)][good.numpy()] = found
            start += len(pixels)
            advance(len(pixels))
    model.cpu()
    return features


def _cached(
    tower: Tower, images: Sequence[Path], cache: Path, workers: int | None, device: str
) -> NDArray[np.float32]:
    name = hashlib.sha256(f"{tower_digest(tower)} {images_digest(images)}".encode()).hexdigest()[:32]
    file = cache / f"{name}.safetensors"
    if not file.is_file():
        features = _pooled(tower, images, 64, workers, device)
        with appearing(file) as partial:
            save_file({"features": features}, partial)
    return load_file(file)["features"]


def _all_readable(images: Sequence[Path], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features if none of them is NaN."""
    if (bad := np.isnan(features).any(axis=1)).any():
        path = images[int(bad.argmax())]
        raise BadDataError(f"image {path} {unreadable(path) or _NOT_FINITE}")
    return features
