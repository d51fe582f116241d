"""The losses against explicit sums from the paper, against open_clip, and their own properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.pretraining.losses import (
    PLAIN_CLIP,
    Alphas,
    MGLLLoss,
    jensen_shannon,
    pointwise,
    smooth_kl,
    soft_clip,
)

IMAGES, GRANULARITIES, TEXTS, WIDTH = 6, 3, 9, 8


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image features, text features, truth: three texts per granularity; image 5 has none at the last one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, WIDTH, generator=generator, dtype=torch.float64)
    texts = torch.randn(TEXTS, WIDTH, generator=generator, dtype=torch.float64)
    truth = torch.zeros(GRANULARITIES, IMAGES, TEXTS, dtype=torch.float64)
    for g in range(GRANULARITIES):
        for i in range(IMAGES):
            truth[g, i, 3 * g + (i // (g + 1)) % 3] = 1
    truth[1, 2, 3:5] = 1  # two diseases
    truth[2, 5] = 0
    truth[0, 0, 2] = 1
    return F.normalize(images, dim=1), F.normalize(texts, dim=1), truth


def soft_clip_written_out(images, texts, truth, scale, repeats=True) -> float:
    """The paper's double sums, term by term, over the listed texts including repeats."""
    listed = [
        [
            (u, float(truth[g, i, u]))
            for g in range(len(truth))
            for u in range(len(texts))
            if truth[g, i, u] > 0
        ]
        for i in range(len(images))
    ]
    similarity = lambda i, u: math.exp(scale * float(images[i] @ texts[u]))  # noqa: E731
    everything = [u for mine in listed for u, _ in mine]
    if not repeats:
        everything = sorted(set(everything))
    total, count = 0.0, sum(map(len, listed))
    for i, mine in enumerate(listed):
        for u, cooccurrence in mine:
            weight = cooccurrence / sum(c for _, c in mine)
            over_texts = sum(similarity(i, other) for other in everything)
            over_images = sum(similarity(n, u) for n in range(len(images)))
            total -= weight * (
                math.log(similarity(i, u) / over_texts) + math.log(similarity(i, u) / over_images)
            )
    return total / (2 * count)


def test_soft_clip_is_the_sum_of_the_paper(batch):
    images, texts, truth = batch
    for cooccurrence in (truth, truth * torch.rand(truth.shape, generator=torch.Generator().manual_seed(1))):
        ours = soft_clip(5 * images @ texts.T, cooccurrence)
        assert float(ours) == pytest.approx(soft_clip_written_out(images, texts, cooccurrence, 5), abs=1e-9)
    # negative control: a denominator over unique texts is another number
    once = soft_clip_written_out(images, texts, truth, 5, repeats=False)
    assert abs(float(soft_clip(5 * images @ texts.T, truth)) - once) > 1e-2


def test_one_distinct_text_per_image_is_open_clip():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(7, WIDTH), dim=1), F.normalize(torch.randn(7, WIDTH), dim=1)
    loss = MGLLLoss(PLAIN_CLIP)
    ours = loss(images, texts, torch.eye(7)[None], torch.arange(7))["loss"]
    torch.testing.assert_close(ours, ClipLoss()(images, texts, loss.scale), atol=1e-6, rtol=0)


def test_repeated_joined_labels_are_open_clip_too():
    torch.manual_seed(1)
    images, texts = F.normalize(torch.randn(7, WIDTH), dim=1), F.normalize(torch.randn(3, WIDTH), dim=1)
    owner = torch.tensor([0, 1, 2, 0, 0, 1, 2])
    loss = MGLLLoss(PLAIN_CLIP)
    ours = loss(images, texts, F.one_hot(owner)[None], torch.arange(3))["loss"]
    torch.testing.assert_close(ours, ClipLoss()(images, texts[owner], loss.scale), atol=1e-6, rtol=0)


@pytest.mark.parametrize("term", [soft_clip, pointwise, smooth_kl])
def test_the_order_of_granularities_texts_and_images_does_not_matter(batch, term):
    images, texts, truth = batch
    value = term(5 * images @ texts.T, truth)
    assert float(value) > 0
    g, i, u = torch.tensor([2, 0, 1]), torch.randperm(IMAGES), torch.randperm(TEXTS)
    shuffled = term(5 * images[i] @ texts[u].T, truth[g][:, i][:, :, u])
    torch.testing.assert_close(shuffled, value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("term", [soft_clip, pointwise, smooth_kl])
def test_every_granularity_counts(batch, term):
    images, texts, truth = batch
    logits = 5 * images @ texts.T
    for g in range(GRANULARITIES):
        changed = truth.clone()
        changed[g] = changed[g].roll(1, dims=0)
        assert abs(float(term(logits, changed) - term(logits, truth))) > 1e-4


@pytest.mark.parametrize("magnitude", [0.0, -1.0, 1e4])
def test_loss_and_gradient_are_finite_everywhere(batch, magnitude):
    _, _, truth = batch
    logits = (magnitude * torch.ones(IMAGES, TEXTS)).requires_grad_()
    bumped = logits + (torch.arange(TEXTS) % 2) * magnitude
    total = soft_clip(bumped, truth) + pointwise(bumped, truth) + smooth_kl(bumped, truth)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_repeating_a_true_text_does_not_lower_its_best_score():
    """Eight images share one text: the optimum of the point-wise loss still calls all eight pairs true."""
    logits = torch.zeros(8, 2, requires_grad=True)
    truth = torch.zeros(1, 8, 2)
    truth[0, :7, 0] = 1
    truth[0, 7, 1] = 1
    optimizer = torch.optim.SGD([logits], lr=20.0)
    for _ in range(200):
        optimizer.zero_grad()
        pointwise(logits, truth).backward()
        optimizer.step()
    assert torch.equal(logits.sigmoid() > 0.95, truth[0] > 0)


def test_an_image_without_a_label_at_a_granularity_is_not_a_negative_there(batch):
    images, texts, truth = batch
    logits = 5 * images @ texts.T
    silent = logits.clone()
    silent[5, 6:] += 100  # image 5 has no text at the last granularity, whose texts are 6 to 8
    torch.testing.assert_close(pointwise(silent, truth), pointwise(logits, truth))
    silent[4, 6:] += 100
    assert float(pointwise(silent, truth) - pointwise(logits, truth)) > 1


def test_jensen_shannon_of_equal_distributions_is_zero_and_of_disjoint_ones_is_log_two():
    p = torch.log_softmax(torch.randn(1, 4, 5), dim=-1)
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(
        jensen_shannon(p.repeat(2, 1, 1), everywhere), torch.zeros(4), atol=1e-6, rtol=0
    )
    disjoint = torch.log_softmax(torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]]), dim=-1)
    divergence = jensen_shannon(disjoint, torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(divergence, torch.tensor([2 * math.log(2)]))


def test_jensen_shannon_equals_the_written_sum_over_the_present_granularities():
    torch.manual_seed(0)
    log_p = torch.log_softmax(torch.randn(3, 1, 5), dim=-1)
    present = torch.tensor([[True], [False], [True]])
    p = log_p.exp()[[0, 2], 0]
    expected = sum((q * (q / p.mean(0)).log()).sum() for q in p)
    torch.testing.assert_close(jensen_shannon(log_p, present), expected[None])
    assert float(jensen_shannon(log_p, torch.tensor([[False], [True], [False]]))) == 0
    assert float(jensen_shannon(log_p, torch.zeros(3, 1, dtype=torch.bool))) == 0


def test_smooth_kl_vanishes_where_the_granularities_agree(batch):
    images, texts, _ = batch
    same = torch.zeros(2, IMAGES, TEXTS, dtype=torch.float64)
    same[:, torch.arange(IMAGES), torch.arange(IMAGES)] = 1
    assert float(smooth_kl(5 * images @ texts.T, same)) == pytest.approx(0, abs=1e-12)


def test_at_the_optimum_an_image_is_the_weighted_centroid_of_its_texts():
    """Free image vectors, texts on orthogonal axes: V_i = Σ_k w_ik T_ik / |Σ_k w_ik T_ik|.

    The paper's statement leaves the negatives out, so the batch is large, and the softmax soft, to make
    each of them weigh little.
    """
    torch.manual_seed(0)
    count = 60
    rows, texts = torch.arange(count), torch.eye(2 * count)
    truth = torch.zeros(2, count, 2 * count)
    truth[0, rows, rows // 2] = 0.2  # a text that two images share
    truth[1, rows, count + rows] = 0.8  # and one of its own
    images = torch.randn(count, 2 * count, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        soft_clip(F.normalize(images, dim=1) @ texts.T, truth).backward()
        optimizer.step()
    found = F.normalize(images.detach(), dim=1)
    weighted, unweighted = F.normalize(truth.sum(0) @ texts), F.normalize((truth.sum(0) > 0).float() @ texts)
    assert (found * weighted).sum(1).min() > 0.98
    assert (found * unweighted).sum(1).max() < 0.95


def test_the_temperature_is_clamped_without_losing_its_gradient():
    loss = MGLLLoss(PLAIN_CLIP)
    assert loss.scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    assert loss.scale.item() == pytest.approx(100, rel=1e-5)
    images = torch.eye(3, requires_grad=True)
    loss(images, torch.eye(3).roll(1, 0), torch.eye(3)[None], torch.arange(3))["loss"].backward()
    assert loss.log_scale.item() == 9.0  # forward writes nothing
    assert float(loss.log_scale.grad) > 0  # wrong pairs ask for a softer temperature, and are heard


def test_features_are_normalized_and_the_total_is_the_weighted_sum(batch):
    images, texts, truth = (part.float() for part in batch)
    loss, keys = MGLLLoss(Alphas(1.0, 0.5, 2.0)), torch.arange(TEXTS)
    result = loss(images, texts, truth, keys)
    longer = loss(7 * images, 0.1 * texts, truth, keys)
    torch.testing.assert_close(longer["loss"], result["loss"])
    expected = result["soft_clip"] + 0.5 * result["pointwise"] + 2 * result["smooth_kl"]
    torch.testing.assert_close(result["loss"], expected)
    ablated = MGLLLoss(Alphas(1.0, 0.0, 2.0))(images, texts, truth, keys)
    assert set(ablated) == {"loss", "soft_clip", "smooth_kl"}


@pytest.mark.parametrize("values", [(0, 0, 0), (1, -1, 0), (math.nan, 1, 1)])
def test_useless_weights_are_refused(values):
    with pytest.raises(InvalidArgumentError, match="`alphas`"):
        Alphas(*values)
