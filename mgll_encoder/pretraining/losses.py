"""The losses of multi-granular language learning (Li et al., ICLR 2026, arXiv 2511.15943).

A batch has N images V_i and the U *unique* texts T_u that belong to them. ``truth[g, i, u]`` > 0 means that text u
belongs to image i at granularity g (the co-occurrence of the paper; 1 for an ordinary label). Labels repeat often, so
encoding each text once saves time, and sharing it among its images gives the correct multi-positive target. All
functions take ``logits[i, u]`` = sim(V_i, T_u)/τ with cosine similarity.

Repeated texts: the paper's denominator Σ_n Σ_m runs over the texts of every image, so a text that belongs
to c pairs of the batch counts c times. :func:`soft_clip` adds log c to the logit of a unique text, so its
value is exactly the paper's sum. With one joined label string per image it *is* plain CLIP (the control).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.pretraining.distributed import gather_batch

MAX_LOG_SCALE = math.log(100)
"""Maximum of log(1/τ), as in CLIP."""


@dataclass(frozen=True)
class Alphas:
    """Weights α₁, α₂, α₃ of the three terms; 0 disables a term.

    The equations scale the terms differently: the point-wise loss is a sum over some fifty texts of a batch, the others
    are means. With equal weights it dominates them; with the defaults all three contribute.

    Attributes:
        soft_clip: Weight of :func:`soft_clip`.
        pointwise: Weight of :func:`pointwise`.
        smooth_kl: Weight of :func:`smooth_kl`.
    """

    soft_clip: float = 1.0
    pointwise: float = 0.02
    smooth_kl: float = 0.1

    def __post_init__(self) -> None:
        values = (self.soft_clip, self.pointwise, self.smooth_kl)
        if min(values) < 0 or max(values) <= 0 or not all(map(math.isfinite, values)):
            raise InvalidArgumentError(
                f"`alphas` is {values}: give three finite weights, none negative, at least one above 0"
            )


PLAIN_CLIP = Alphas(1.0, 0.0, 0.0)
"""The control: with one joined label string per image, soft CLIP is CLIP."""


def soft_clip(logits: Tensor, truth: Tensor) -> Tensor:
    """Compute soft CLIP: the cross-entropy of every image with all its texts, in both directions.

    l_ik = −w_ik log( exp(sim(V_i,T_ik)/τ) / Σ_n Σ_m exp(sim(V_i,T_nm)/τ) ), l_ki likewise over images,
    w_ik = truth_ik / Σ_k truth_ik, L = 1/(2 Σ_i M_i) Σ_i Σ_k (l_ik + l_ki); k runs over the texts of image i
    at all granularities.

    Args:
        logits: sim(V_i, T_u)/τ, [N, U].
        truth: Co-occurrence per granularity, [G, N, U], not negative. Images without any text do not count.

    Returns:
        The loss, a scalar.
    """
    pairs = truth > 0
    texts_per_image = pairs.sum(dim=(0, 2))
    multiplicity = pairs.sum(dim=(0, 1)).to(logits.dtype)
    weights = truth.sum(dim=0).to(logits.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    log_over_texts = logits - torch.logsumexp(logits + multiplicity.log(), dim=1, keepdim=True)
    log_over_images = F.log_softmax(logits, dim=0)
    scores = torch.where(weights > 0, weights * (log_over_texts + log_over_images), 0.0)
    return -scores.sum() / (2 * texts_per_image.sum().clamp_min(1))


def pointwise(logits: Tensor, truth: Tensor) -> Tensor:
    """Compute the point-wise loss: the binary cross-entropy of every image with every text of a granularity.

    L_P = −(1/N) Σ_i Σ_j [ y_ij log x_ij + (1 − y_ij) log(1 − x_ij) ], x_ij = sigmoid(logits_ij), j over the
    unique texts of each granularity in the batch; y_ij is 1 for every true pair, however often its text
    occurs. An image without a text at a granularity is unlabeled there and does not count.

    Args:
        logits: Scores of the pairs, [N, U].
        truth: Co-occurrence per granularity, [G, N, U].

    Returns:
        The loss, a scalar.
    """
    pairs = truth > 0
    asked = pairs.any(dim=2, keepdim=True) & pairs.any(dim=1, keepdim=True)
    scores = F.binary_cross_entropy_with_logits(
        logits.expand(pairs.shape), pairs.to(logits.dtype), reduction="none"
    )
    return torch.where(asked, scores, 0.0).sum() / logits.shape[0]


def smooth_kl(logits: Tensor, truth: Tensor) -> Tensor:
    """Compute smooth KL: the texts of an image should select the same images at every granularity.

    The common support of the distributions is the batch's images: P_g(j | i) = softmax_j(Σ_u w_giu sim(V_j,
    T_u)/τ), w_gi the normalized co-occurrence of image i at granularity g. With M = mean_g P_g, the loss is
    Σ_g KL(P_g ‖ M), averaged over images: m times the Jensen-Shannon divergence, 0 where the granularities
    agree. Computed in log space, over the granularities that the image has.

    Args:
        logits: sim(V_i, T_u)/τ, [N, U].
        truth: Co-occurrence per granularity, [G, N, U].

    Returns:
        The loss, a scalar between 0 and G log G.
    """
    present = truth.sum(dim=2) > 0
    weights = truth.to(logits.dtype)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    log_p = F.log_softmax(weights @ logits.T, dim=2)
    return jensen_shannon(log_p, present).mean()


def jensen_shannon(log_p: Tensor, present: Tensor) -> Tensor:
    """Compute Σ_g KL(P_g ‖ M) with M = mean_g P_g, from log probabilities.

    Args:
        log_p: Log probabilities, [G, ..., K]; they sum to one over the last axis.
        present: Which distributions exist, [G, ...].

    Returns:
        The divergence in nats, [...]; 0 where fewer than two distributions are present.
    """
    count = present.sum(dim=0).clamp_min(1).to(log_p.dtype)
    absent = torch.where(present, 0.0, -torch.inf)[..., None]
    # without any distribution the mixture would be log 0; such entries are masked below
    mixture = torch.logsumexp(torch.where(present.any(dim=0)[..., None], log_p + absent, log_p), dim=0)
    mixture = mixture - count.log()[..., None]
    divergence = (log_p.exp() * (log_p - mixture)).sum(dim=-1)
    return torch.where(present, divergence, 0.0).sum(dim=0)


class MGLLLoss(nn.Module):
    """α₁ soft CLIP + α₂ point-wise + α₃ smooth KL, with a learnable temperature.

    Across ranks, features are gathered with exact gradients and equal texts are merged, so that the loss (on
    every rank) and the gradients (averaged by DDP) equal those of one process with the global batch.

    Attributes:
        log_scale: log(1/τ), learnable; clamped to log 100. The gradient passes through the clamp, so it can recover.
    """

    def __init__(self, alphas: Alphas | None = None, temperature: float = 0.07) -> None:
        super().__init__()
        self.alphas = alphas or Alphas()
        # shape [1]: DeepSpeed cannot broadcast a scalar parameter between CPUs
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    @property
    def scale(self) -> Tensor:
        """1/τ, at most 100; a scalar."""
        excess = (self.log_scale - MAX_LOG_SCALE).clamp_min(0).detach()
        return (self.log_scale - excess).exp()[0]

    def forward(self, images: Tensor, texts: Tensor, truth: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Return the total as ``loss`` and each active term under its name.

        Args:
            images: Image features, [N, D]; normalized here.
            texts: Features of the batch's unique texts, [U, D]; normalized here.
            truth: Co-occurrence, [G, N, U].
            keys: Identity of each text, int64 [U], equal on all ranks for equal strings.
        """
        # full precision even under autocast: with 1/τ = 100, half precision is too coarse
        with torch.autocast(images.device.type, enabled=False):
            images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
            images, texts, truth = gather_batch(images, texts, truth.float(), keys)
            logits = self.scale * images @ texts.T
            terms: dict[str, Tensor] = {}
            if self.alphas.soft_clip:
                terms["soft_clip"] = soft_clip(logits, truth)
            if self.alphas.pointwise:
                terms["pointwise"] = pointwise(logits, truth)
            if self.alphas.smooth_kl:
                terms["smooth_kl"] = smooth_kl(logits, truth)
            total = sum(
                (getattr(self.alphas, name) * value for name, value in terms.items()), torch.zeros(())
            )
        return {"loss": total, **{name: value.detach() for name, value in terms.items()}}
