"""Changing the image size and the normalization changes only what it should."""

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from mgll_encoder import fold_normalization, resample_positions
from mgll_encoder.common.errors import IncompatibleTowerError
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from tests.mgll_encoder import towers

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
CLIP = (CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    return towers.vision_model(image_size=42)


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalize(pixels: Tensor, rule: tuple) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in rule)
    return (pixels - mean) / std


def hidden(model: CLIPVisionModel, pixels: Tensor, **options: bool) -> Tensor:
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **options).hidden_states[-2]


def rebuilt(model: CLIPVisionModel, weight: Tensor, pos: Tensor, image_size: int) -> CLIPVisionModel:
    """The same tower with another patch convolution, position table and image size."""
    other = towers.vision_model(image_size=image_size)
    state = model.state_dict() | {
        "embeddings.patch_embedding.weight": weight, "embeddings.position_embedding.weight": pos,
    }  # fmt: skip
    other.load_state_dict(state)
    return other


def parts(model: CLIPVisionModel) -> tuple[Tensor, Tensor]:
    return (
        model.embeddings.patch_embedding.weight.detach(),
        model.embeddings.position_embedding.weight.detach(),
    )


@pytest.mark.parametrize("grid", [1, 2, 4, 7])
def test_resampling_is_bit_for_bit_that_of_transformers(tower: CLIPVisionModel, grid: int) -> None:
    _, pos = parts(tower)
    size = grid * 14
    with torch.no_grad():
        at_run_time = tower.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + grid**2, 32), size, size)[
            0
        ]
    assert torch.equal(resample_positions(pos, grid), at_run_time)


def test_a_tower_with_resampled_positions_equals_interpolation_at_run_time(tower: CLIPVisionModel) -> None:
    weight, pos = parts(tower)
    larger = rebuilt(tower, weight, resample_positions(pos, 5), 70)
    pixels = normalize(images(70), CLIP)
    assert torch.equal(hidden(larger, pixels), hidden(tower, pixels, interpolate_pos_encoding=True))


def test_resampling_keeps_the_class_row_the_dtype_and_the_same_grid() -> None:
    pos = torch.randn(10, 6, dtype=torch.bfloat16)
    assert torch.equal(resample_positions(pos, 3), pos)
    larger = resample_positions(pos, 5)
    assert (larger.shape, larger.dtype) == ((26, 6), torch.bfloat16)
    assert torch.equal(larger[0], pos[0])
    assert torch.equal(larger, resample_positions(pos.float(), 5).bfloat16()), "computed in float32"


@pytest.mark.parametrize(("rows", "grid"), [(9, 3), (10, 0), (0, 3), (1, 3)])
def test_positions_that_are_no_square_grid_are_refused(rows: int, grid: int) -> None:
    with pytest.raises(
        IncompatibleTowerError, match=f"cannot resample {rows} positions to a {grid}x{grid} grid"
    ):
        resample_positions(torch.zeros(rows, 4), grid)


@pytest.mark.parametrize(("trained", "given"), [(IMAGENET, CLIP), (IMAGENET, HALF), (CLIP, IMAGENET)])
@pytest.mark.parametrize(("grid", "fold_first"), [(3, True), (5, True), (5, False), (2, False)])
def test_folded_towers_see_host_pixels_as_their_own(
    tower: CLIPVisionModel, trained: tuple, given: tuple, grid: int, fold_first: bool
) -> None:
    weight, pos = parts(tower)
    size = grid * 14
    own = rebuilt(tower, weight, resample_positions(pos, grid), size)
    if fold_first:
        new_weight, folded = fold_normalization(weight, pos, trained=trained, given=given)
        folded = resample_positions(folded, grid)
    else:
        new_weight, folded = fold_normalization(
            weight, resample_positions(pos, grid), trained=trained, given=given
        )
    host = rebuilt(tower, new_weight, folded, size)
    pixels = images(size)
    expected = hidden(own, normalize(pixels, trained))
    torch.testing.assert_close(hidden(host, normalize(pixels, given)), expected, atol=1e-5, rtol=1e-5)
    assert (hidden(own, normalize(pixels, given)) - expected).abs().max() > 1e-3, (
        "without folding they must differ"
    )


def test_folding_scale_alone_is_not_enough(tower: CLIPVisionModel) -> None:
    weight, pos = parts(tower)
    new_weight, _ = fold_normalization(weight, pos, trained=IMAGENET, given=CLIP)
    half_done = rebuilt(tower, new_weight, pos, 42)
    pixels = images(42)
    difference = hidden(half_done, normalize(pixels, CLIP)) - hidden(tower, normalize(pixels, IMAGENET))
    assert difference.abs().max() > 1e-3


def test_folding_is_exact_in_double_precision(tower: CLIPVisionModel) -> None:
    weight, pos = (part.double() for part in parts(tower))
    new_weight, new_pos = fold_normalization(weight, pos, trained=IMAGENET, given=CLIP)
    pixels = images(42).double()
    own = torch.nn.functional.conv2d(normalize(pixels, IMAGENET), weight, stride=14).flatten(2).mT + pos[1:]
    host = (
        torch.nn.functional.conv2d(normalize(pixels, CLIP), new_weight, stride=14).flatten(2).mT + new_pos[1:]
    )
    torch.testing.assert_close(host, own, atol=1e-6, rtol=0)
    assert torch.equal(new_pos[0], pos[0])


def test_folding_the_same_normalization_changes_nothing(tower: CLIPVisionModel) -> None:
    weight, pos = parts(tower)
    same = fold_normalization(weight, pos, trained=CLIP, given=CLIP)
    assert torch.equal(same[0], weight)
    assert torch.equal(same[1], pos)
