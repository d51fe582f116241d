"""Makes batches without images safe for several processes.

DeepSpeed and DDP exchange the gradients (ZeRO-3 also the weights) of every trained module, so the processes
would deadlock if one of them did not run the projector. Such a batch gets one additional row: an image and
its prompt, without labels. It passes through every module and contributes nothing to the loss or any
gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mllm_adapters.data.dataset import IGNORED, ExampleTable

Row = Mapping[str, Tensor]


@dataclass(frozen=True)
class FillingCollator:
    """A collator that adds a row with an image to batches without one.

    Attributes:
        collate: Makes the batch.
        filler: The additional row, see `filler_row`.
    """

    collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    filler: Row

    def __call__(self, batch: Sequence[Row]) -> dict[str, Tensor]:
        """Collate the batch, with the additional row if no row has an image."""
        if any(self.filler.keys() <= row.keys() for row in batch):
            return self.collate(batch)
        return self.collate([*batch, self.filler])


def filler_row(dataset: Dataset[dict[str, Tensor]], examples: ExampleTable) -> Row | None:
    """Make an unlabeled row with an image from the shortest example that has one; None if none has.

    Args:
        dataset: Encodes the examples, by index.
        examples: The examples of the dataset.
    """
    shown, length = examples.column("shown"), examples.column("length")
    pictured = np.flatnonzero(shown)
    if not len(pictured):
        return None
    row = dataset[int(pictured[np.lexsort((length[pictured], shown[pictured]))[0]])]
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}
