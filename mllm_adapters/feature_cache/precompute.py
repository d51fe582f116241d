"""Fills a feature store: the model's towers encode every image once; each rank computes its share."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mgll_encoder.common.files import cache_folder
from mgll_encoder.common.images import READER_VERSION, open_image
from mgll_encoder.common.locks import locked
from mgll_encoder.common.progress import saying_what_is_kept, track
from mllm_adapters.data.fingerprints import modules_fingerprint, pixel_fingerprint
from mllm_adapters.feature_cache.cached_modules import OutputSpec, seen_of_images, watched
from mllm_adapters.feature_cache.store import SHARD_BYTES, FeatureStore, Stored, readable, size_of

_logger = logging.getLogger(__name__)

FEATURES_VERSION = 1
"""Part of the key: changes when the features of a model and image would change."""

IMAGES_AT_ONCE = 8
"""Images per forward pass of the towers."""

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ComputeSettings:
    """Device, precision and processes for computing features.

    Attributes:
        device: Device of the model.
        precision: ``float32`` or ``bfloat16``, of the forward pass.
        dtype: Dtype of the stored features, or ``auto`` for that of the forward pass.
        rank: Number of this process; each computes its share of the store.
        ranks: Number of processes.
        workers: Processes that open images.
    """

    device: torch.device
    precision: str = "float32"
    dtype: str = "auto"
    rank: int = 0
    ranks: int = 1
    workers: int = 0

    @property
    def stored(self) -> torch.dtype:
        """Return the dtype of stored features."""
        return DTYPES[self.precision if self.dtype == "auto" else self.dtype]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the Trainer's autocast context for this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def open_store(model: Any, processor: Any, plan: OutputSpec, place: ComputeSettings) -> FeatureStore:
    """Open the store of this tower, preprocessing and precision."""
    modules = {call.name: model.get_submodule(call.name) for call in plan.calls}
    about = {
        "version": FEATURES_VERSION,
        "reader": READER_VERSION,
        "towers": modules_fingerprint(modules),
        "preprocessing": pixel_fingerprint(processor),
        "plan": plan.described(),
        "precision": place.precision,
        "stored": str(place.stored),
        "device": place.device.type,
    }
    return FeatureStore(cache_folder("vision"), about)


def precompute(
    model: Any,
    processor: Any,
    plan: OutputSpec,
    store: FeatureStore,
    paths: Mapping[str, Path],
    place: ComputeSettings,
) -> None:
    """Compute the features of all images that are not in the store. An interrupted run can be continued.

    Args:
        model: The model, with its towers.
        processor: Its processor.
        plan: The tensors to store for an image.
        store: The store to fill.
        paths: Hash of an image -> its file.
        place: Device and precision.

    Raises:
        UserError: the disk is too small, or an image cannot be read.
    """
    share = list(paths)[place.rank :: place.ranks]
    lock = store.folder / f"{place.rank}-of-{place.ranks}.lock"
    with locked(lock, otherwise=None):  # a second run waits, and finds everything computed
        store.refresh()
        if missing := store.missing(share):
            features = _features(model, processor, plan, [(d, paths[d]) for d in missing], place)
            _write(features, store, len(missing), place)
    if place.ranks > 1:
        PartialState().wait_for_everyone()
        store.refresh()


def _write(
    features: Iterator[tuple[str, Stored]], store: FeatureStore, count: int, place: ComputeSettings
) -> None:
    shard: dict[str, Stored] = {}
    size = kept = 0
    with saying_what_is_kept(
        lambda: f"the features of {kept:,} of {count:,} images are kept in {store.folder}"
    ):
        for number, (digest, stored) in enumerate(track(features, "Caching the features of images", count)):
            if number == 0:
                _announce(store, count * place.ranks, size_of(stored))
            shard[digest] = stored
            size += size_of(stored)
            if size >= SHARD_BYTES:
                store.add(shard)
                kept += len(shard)
                shard, size = {}, 0
        if shard:
            store.add(shard)


def computed(
    model: Any, plan: OutputSpec, batch: Mapping[str, Any], place: ComputeSettings
) -> tuple[list[Tensor], Tensor]:
    """Compute the towers' used outputs for a batch, and the loss."""
    modules = {call.name: model.get_submodule(call.name) for call in plan.calls}
    with torch.no_grad(), place.autocast(), watched(modules) as seen:
        loss = model(**batch).loss
    return seen_of_images(seen, plan, 1)[0][0], loss


def moved(batch: Any, device: torch.device) -> Any:
    """Move a batch to a device, for any nesting."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    return [moved(value, device) for value in batch] if isinstance(batch, list) else batch


def _announce(store: FeatureStore, images: int, each: int) -> None:
    store.check_space(images * each)
    _logger.info(
        f"feature cache: {images:,} images x {readable(each)} = {readable(images * each)} in {store.folder}"
    )


class _Images(Dataset[tuple[str, dict[str, Tensor]]]):
    """Images as inputs of the model's vision part."""

    def __init__(self, images: Sequence[tuple[str, Path]], processor: Any, accepted: frozenset[str]) -> None:
        self.images, self.processor, self.accepted = images, processor, accepted

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Tensor]]:
        digest, path = self.images[index]
        made = self.processor(
            text=[self.processor.image_token], images=[open_image(path)], return_tensors="pt"
        )
        return digest, {name: value for name, value in made.items() if name in self.accepted}


def _features(
    model: Any, processor: Any, plan: OutputSpec, images: Sequence[tuple[str, Path]], place: ComputeSettings
) -> Iterator[tuple[str, Stored]]:
    """Yield the hash and features of every image."""
    accepted = frozenset(inspect.signature(_sight(model)).parameters)
    loader = DataLoader(
        _Images(images, processor, accepted),
        batch_size=IMAGES_AT_ONCE,
        num_workers=place.workers,
        collate_fn=list,
    )
    for batch in loader:
        shapes = {tuple((name, value.shape) for name, value in inputs.items()) for _, inputs in batch}
        for group in [batch] if len(shapes) == 1 else [[entry] for entry in batch]:
            yield from _towers(model, plan, group, place)


def _sight(model: Any) -> Any:
    """Return the family's method that encodes only images; of the whole model or of the inner one."""
    return next(part for part in model.modules() if hasattr(part, "get_image_features")).get_image_features


def _towers(
    model: Any, plan: OutputSpec, group: Sequence[tuple[str, dict[str, Tensor]]], place: ComputeSettings
) -> Iterator[tuple[str, Stored]]:
    """Run the towers on images of one shape."""
    modules = {call.name: model.get_submodule(call.name) for call in plan.calls}
    names = group[0][1]
    inputs = {name: torch.cat([each[name] for _, each in group]).to(place.device) for name in names}
    with torch.no_grad(), place.autocast(), watched(modules) as seen:
        _sight(model)(**inputs)
    found = seen_of_images(seen, plan, len(group))
    for (digest, each), (tensors, lengths) in zip(group, found, strict=True):
        stored = [tensor.to(place.stored).cpu() for tensor in tensors]
        yield digest, (stored, [*lengths, *(len(each[name]) for name in plan.pixels)])
