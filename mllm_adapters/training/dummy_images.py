"""A batch without images, made safe for several processes.

DeepSpeed and DDP exchange the gradients (ZeRO-3 the weights, too) of every module that trains, so a process whose
batch never runs the projector would wait for ever for the others. Such a batch gets one row more: an image and its
prompt, with no label. It runs through every module and adds nothing to the loss, nor to any gradient.
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
    """A collator that adds a row with an image to batches without any.

    Attributes:
        collate: Makes the batch.
        filler: The row, see `filler_row`.
    """

    collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    filler: Row

    def __call__(self, batch: Sequence[Row]) -> dict[str, Tensor]:
        """The batch, of one row more where no row has what belongs to images."""
        if any(self.filler.keys() <= row.keys() for row in batch):
            return self.collate(batch)
        return self.collate([*batch, self.filler])


def filler_row(dataset: Dataset[dict[str, Tensor]], examples: ExampleTable) -> Row | None:
    """A row with an image and without labels: the shortest example that has one; None if none has.

    Args:
        dataset: Encodes the examples, by index.
        examples: What it is made of.
    """
    shown, length = examples.column("shown"), examples.column("length")
    pictured = np.flatnonzero(shown)
    if not len(pictured):
        return None
    row = dataset[int(pictured[np.lexsort((length[pictured], shown[pictured]))[0]])]
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}
