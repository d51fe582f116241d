"""Gathering the batches of several ranks into one, with exact gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Gathers all ranks' rows, in rank order; the gradient of a row is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.start = sum(counts[: dist.get_rank()])
        ctx.count = len(rows)
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([block[:count] for block, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count], None


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks, [Σ_r n_r, ...], differentiably.

    If every rank computes the same loss from the result and DDP averages the gradients of the parameters, the
    parameters get the gradient of that loss exactly.

    Args:
        rows: This rank's rows, [n_r, ...]; n_r may differ between ranks.
    """
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    gathered: Tensor = _GatherRows.apply(rows, [int(count) for count in counts])
    return gathered


def gather_batch(images: Tensor, texts: Tensor, truth: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the global batch: all images, all distinct texts, and their co-occurrence.

    Args:
        images: This rank's image features, [N, D].
        texts: This rank's text features, one per unique text, [U, D].
        truth: This rank's co-occurrence, [G, N, U].
        keys: Identity of each text, int64 [U].

    Returns:
        Images [N', D], texts [U', D] and truth [G, N', U'] over all ranks; the arguments on a single rank. The feature
        of a text that several ranks encoded is the mean of their (equal) features: each gets its share of the gradient.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return images, texts, truth
    distinct, place = torch.unique(gather_rows(keys), return_inverse=True)
    copies = torch.bincount(place, minlength=len(distinct))
    merged = texts.new_zeros(len(distinct), texts.shape[1]).index_add(0, place, gather_rows(texts))
    columns = torch.searchsorted(distinct, keys)
    spread = truth.new_zeros(*truth.shape[:2], len(distinct)).index_copy(2, columns, truth)
    everyone = gather_rows(spread.transpose(0, 1).contiguous()).transpose(0, 1)
    return gather_rows(images), merged / copies[:, None], everyone
