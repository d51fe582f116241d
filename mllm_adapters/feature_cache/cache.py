"""Features of the training images from a frozen tower, computed once and shared by epochs, ranks and runs.

With the cache a training step opens no image, tokenizes no text and runs no tower: rows come from a table of tokens,
features from `mllm_adapters.feature_cache.store`, and `mllm_adapters.feature_cache.cached_modules` feeds
them to the model.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from datasets import Dataset as Table
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mgll_encoder.common.errors import MismatchError, UserError
from mllm_adapters.data.arrow_cache import compute_table
from mllm_adapters.data.chat_template import Example
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import (
    PER_TOKEN,
    AnswerCollator,
    ExampleTable,
    encode,
    encode_with,
    to_example,
)
from mllm_adapters.feature_cache.cached_modules import (
    KEY,
    ModelWithCache,
    NotCacheableError,
    OutputSpec,
    joined,
    record,
)
from mllm_adapters.feature_cache.precompute import ComputeSettings, computed, moved, open_store, precompute
from mllm_adapters.feature_cache.store import FeatureStore

_logger = logging.getLogger(__name__)

ENCODED_VERSION = 1
"""Part of the key of encoded rows: changes when a row's tokens would change."""

ENCODED = pa.schema([("tensors", pa.large_binary()), ("images", pa.list_(pa.string()))])
"""Tokens, labels and the like of a row as safetensors, and the hashes of its images."""

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Tolerance for cached against new features, relative to the largest: rounding depends on the batch size."""

TEXT = ("input_ids", "attention_mask", "labels", *PER_TOKEN)


class CachedDataset(Dataset[dict[str, Any]]):
    """Examples whose tokens and features are all precomputed."""

    def __init__(
        self, rows: Table, kept: NDArray[np.int64], store: FeatureStore, pixels: Sequence[str]
    ) -> None:
        self.rows, self.kept, self.store, self.pixels = rows, kept, store, pixels

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(self.kept[index])]
        tensors = {name: value.long() for name, value in safetensors.torch.load(row["tensors"]).items()}
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        if row["images"]:  # as in an encoded example, image inputs are present only if the row has images
            return {**tensors, KEY: [self._image(digest) for digest in row["images"]]}
        return tensors

    def _image(self, digest: str) -> dict[str, Any]:
        features, lengths = self.store.get(digest)
        first = len(lengths) - len(self.pixels)
        return {
            "features": features,
            "lengths": lengths[:first],
            "pixels": dict(zip(self.pixels, lengths[first:], strict=True)),
        }


class CachedCollator(AnswerCollator):
    """Batches rows of a `CachedDataset`."""

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate as `AnswerCollator`, with the image features that the cached modules return."""
        images = [image for row in batch for image in row.get(KEY, ())]
        tensors: dict[str, Any] = super().__call__(
            [{k: v for k, v in row.items() if k != KEY} for row in batch]
        )
        return tensors | {KEY: joined(images)} if images else tensors


@dataclass(frozen=True)
class Cached:
    """A model that trains on cached features.

    Attributes:
        dataset: The examples.
        collator: Makes batches of them.
        cast: The model with cached modules; ``cast.towers_back()`` restores its towers for a block.
    """

    dataset: CachedDataset
    collator: CachedCollator
    cast: ModelWithCache


def cache_features(
    model: Any, examples: ExampleTable, corpus: Corpus, processor: Any, place: ComputeSettings
) -> Cached | None:
    """Compute missing features, and replace the model's towers by cached modules.

    Args:
        model: The model that the Trainer will call, its stage set.
        examples: The training examples.
        corpus: The corpus that ``examples`` were made from.
        processor: The model's processor.
        place: Device and precision.

    Returns:
        The dataset to train on, or None if nothing can be cached (a note says why).

    Raises:
        UserError: the disk is too small, an image is damaged, or the model's output with cached features
            differs from its output without them.
    """
    model.eval()
    shown = examples.table.select_columns("shown").with_format("numpy")[:]["shown"][examples.kept]
    if not shown.any():
        return None
    sampled = _samples(examples, np.flatnonzero(shown), np.flatnonzero(shown > 1))
    collator = AnswerCollator(processor.tokenizer.pad_token_id or 0)
    rows = [encode(examples[i], corpus.folder, processor) for i in sampled]
    try:
        with place.autocast():
            calls = record(model, moved(collator(rows[:1]), place.device))
    except NotCacheableError as reason:
        _logger.info(f"no feature cache: {reason}")
        return None
    plan = OutputSpec(
        calls, {name: (v.dtype, tuple(v.shape[1:])) for name, v in rows[0].items() if _is_pixels(name, v)}
    )
    store = open_store(model, processor, plan, place)
    shows = examples.table.select_columns("images").select(examples.kept)
    paths = {corpus.digests[name]: corpus.folder / name for row in shows for name in row["images"]}
    precompute(model, processor, plan, store, paths, place)
    encoded = _encoded(examples, corpus, processor)
    dataset = CachedDataset(encoded, examples.kept, store, list(plan.pixels))
    replaying = CachedCollator(collator.pad_token_id)
    fresh = computed(model, plan, moved(collator(rows), place.device), place)
    cast = ModelWithCache(model, plan)
    try:
        _verify(cast, fresh, moved(replaying([dataset[i] for i in sampled]), place.device), place)
    except UserError:
        cast.restore()
        raise
    cast.leave()
    return Cached(dataset, replaying, cast)


def _samples(examples: ExampleTable, single: NDArray[np.int64], several: NDArray[np.int64]) -> list[int]:
    """Choose examples to verify the cache: the first, the next with another image, the first with several images."""
    first = int(single[0])
    shown = examples[first].images
    other = next((int(i) for i in single[1:1000] if examples[int(i)].images != shown), first)
    return list(dict.fromkeys([first, other, *several[:1].tolist()]))


def _is_pixels(name: str, value: Tensor) -> bool:
    return name not in TEXT and value.is_floating_point()


def _verify(
    cast: ModelWithCache, fresh: tuple[list[Tensor], Tensor], batch: Mapping[str, Any], place: ComputeSettings
) -> None:
    """Compare the cached modules' outputs, and the loss, with those of the towers.

    Raises:
        UserError: they differ.
    """
    tolerance = TOLERANCE[place.stored]
    features, loss = fresh
    far = max(
        float((kept.float() - new.float()).abs().max() / new.float().abs().max().clamp(min=1e-6))
        if kept.shape == new.shape
        else float("inf")
        for kept, new in zip(batch[KEY]["features"], features, strict=True)
    )
    with torch.no_grad(), place.autocast():
        replayed = cast.model(**batch).loss
    apart = float((replayed - loss).abs() / loss.abs().clamp(min=1.0))
    if not (far <= tolerance and apart <= tolerance):
        raise MismatchError(
            f"the feature cache does not fit this model: features differ by {far:.1e} of the largest, the loss by "
            f"{apart:.1e} (allowed {tolerance:.0e}): add `feature_cache=False`, and report the model"
        )


def _encoded(examples: ExampleTable, corpus: Corpus, processor: Any) -> Table:
    """Encode all rows of a table as `ENCODED`; images are blank, since only their number of tokens matters."""
    work = Encoder(processor, corpus.sizes, corpus.digests)
    made_of = json.dumps([ENCODED_VERSION, examples.key])
    key = hashlib.sha256(made_of.encode()).hexdigest() if examples.key else ""
    return compute_table(examples.table, work, ENCODED, key, "Tokenizing conversations")


@dataclass
class Encoder:
    """Encodes rendered rows as rows of `ENCODED`, in any process.

    Attributes:
        processor: The model's processor.
        sizes: Image path -> (width, height) in pixels.
        digests: Image path -> hash of the file.
    """

    processor: Any
    sizes: Mapping[str, tuple[int, int]]
    digests: Mapping[str, str]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Map the columns of a batch of rows to columns of the result."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {
            "tensors": [b"" if row["damaged"] else self._tensors(to_example(row)) for row in rows],
            "images": [[] if row["damaged"] else [self.digests[i] for i in row["images"]] for row in rows],
        }

    def _tensors(self, example: Example) -> bytes:
        blanks = [Image.new("RGB", self.sizes[name]) for name in example.images]
        made = encode_with(example, blanks, self.processor)
        kept = {n: v.int() for n, v in made.items() if n != "attention_mask" and not _is_pixels(n, v)}
        return safetensors.torch.save(kept)
