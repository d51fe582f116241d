"""What a cell of a label table may contain, and how uncertain cells count."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.data.label_cells import WORDS, LabelLists, truth_of
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.probing.finetune import OPEN, TowerWithHead
from mgll_encoder.probing.linear import evaluate, kept_labels, linear_scores
from mgll_encoder.tower.model import Tower
from tests import builders


@pytest.mark.parametrize(
    ("said", "cells"),
    [
        (True, ["1", "1.0", " 1 ", "yes", "Yes", "TRUE", "1.00"]),
        (False, ["0", "0.0", "no", "No", "false", "", "  ", "-0"]),
        (None, ["-1", "-1.0", "uncertain", "NaN", "nan", "NA", "n/a", "unknown", "?", "null"]),
    ],
)
def test_a_cell_is_true_false_or_open(said: bool | None, cells: list[str]) -> None:
    assert [truth_of(cell) for cell in cells] == [said] * len(cells)


@pytest.mark.parametrize("cell", ["2", "0.5", "maybe", "inf", "1;0", "-2"])
def test_any_other_cell_is_no_truth(cell: str) -> None:
    with pytest.raises(ValueError, match=f"is '{cell}': expected 1, 0, yes, no"):
        truth_of(cell)


def lists(*cells: str, separator: str | None = None, known: tuple[str, ...] = ()) -> list[set[str]]:
    read = LabelLists(separator, cells, known, "column 'labels'")
    return [set(read(cell)) for cell in cells]


def test_labels_are_separated_by_what_people_write() -> None:
    two = [{"a b", "c"}, {"c"}]
    assert lists("A  b; c", "C") == lists("a b|c", "c") == lists("a b；c", "c") == two
    assert lists("a b, c", "c", "a b")[:2] == two, "commas, for both stand alone elsewhere"
    assert lists("['a b', 'c']", "['c']") == lists('["a b", "c"]', "c") == two
    assert lists("a b / c", "c", separator="/") == lists("a b and c", "c", separator=" and ") == two
    assert lists("a; b", "a", separator="none") == [{"a; b"}, {"a"}]


def test_a_label_with_a_comma_stays_one_where_its_parts_are_none(caplog: pytest.LogCaptureFixture) -> None:
    assert lists("retinopathy, mild", "retinopathy, severe") == [
        {"retinopathy, mild"},
        {"retinopathy, severe"},
    ]
    assert "'retinopathy, mild' is read as one label" in "\n".join(caplog.messages)
    assert lists("a, b", "a", "b", known=("a, b",))[0] == {"a, b"}, "a preset knows it"


@pytest.mark.parametrize("joint", [", ", "/", " + ", " & ", " and "])
def test_a_class_made_of_two_others_is_refused(joint: str) -> None:
    with pytest.raises(
        BadDataError,
        match=r"'a.+b' consists of other labels of the table, but 'c, d' does not: give `label_separator=",
    ):
        lists(f"a{joint}b", "a", "b", "c, d")
    assert lists(f"a{joint}b", "a", "b", separator="none")[0] == {f"a{joint}b"}


@pytest.mark.parametrize("cell", ["['a' 'b']", "['a', b]", "['a'", "[__import__('os')]", '["\\ud800"]'])
def test_a_list_that_cannot_be_read_is_no_label(cell: str) -> None:
    with pytest.raises(ValueError, match=r"expected quoted labels|surrogates"):
        lists(cell)


def test_a_word_for_unknown_is_no_label() -> None:
    assert lists("nan", "unknown; a", "-1", "N/A") == [set(), {"a"}, set(), set()]


@pytest.fixture
def half_open() -> tuple[np.ndarray, LabeledImages]:
    """Features of 300 images, with one label uncertain for a third of them."""
    rng = np.random.default_rng(0)
    truth = rng.random((300, 2)) < 0.4
    features = (truth @ rng.normal(size=(2, 8)) + rng.normal(size=(300, 8))).astype(np.float32)
    known = np.ones((300, 2), bool)
    known[:, 0] = rng.random(300) > 0.3
    patients = tuple(str(i // 2) for i in range(300))
    data = LabeledImages((), ("a", "b"), truth & known, patients, np.arange(300) >= 150, known=known)
    return features, data


def test_an_open_cell_counts_neither_for_nor_against_its_label(
    half_open: tuple[np.ndarray, LabeledImages],
) -> None:
    features, data = half_open
    assert data.known is not None
    assert not data.exclusive
    scores, kept = linear_scores(features, data)
    result = evaluate(scores, kept, data, replicates=20)
    for place, name in enumerate(data.names):
        counted = data.known[data.test][:, place]
        truth, score = data.truth[data.test][counted, place], scores[counted, place]
        assert result.labels[name] == pytest.approx({
            "AUC": 100 * roc_auc_score(truth, score),
            "mAP": 100 * average_precision_score(truth, score),
            "ACC": 100 * accuracy_score(truth, score >= 0.5),
        })  # fmt: skip
    alone = LabeledImages((), ("a",), data.truth[:, :1], data.patients, data.test)
    some = alone.subset(data.known[:, 0])
    assert np.allclose(
        scores[data.known[data.test][:, 0], 0], linear_scores(features[data.known[:, 0]], some)[0][:, 0]
    )


def test_a_label_that_is_never_denied_cannot_be_judged(half_open: tuple[np.ndarray, LabeledImages]) -> None:
    _, data = half_open
    truth = data.truth.copy()
    nowhere_denied = LabeledImages(
        (),
        data.names,
        truth,
        data.patients,
        data.test,
        known=np.stack([truth[:, 0], data.truth[:, 1] | True], 1),
    )
    assert kept_labels(nowhere_denied) == [1]


def test_open_labels_do_not_move_a_fine_tuned_head() -> None:
    """The gradient of the head's row equals that of a batch without the uncertain image."""
    from transformers import CLIPVisionModel

    from mgll_encoder import TowerSpec

    torch.manual_seed(0)
    spec = TowerSpec(
        width=32, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=28, activation="gelu"
    )
    tower = Tower.from_model(CLIPVisionModel(builders.tower_config()), spec)
    truth = np.array([[1, 0], [0, 1], [1, 1]], bool)
    data = LabeledImages((), ("a", "b"), truth, ("1", "2", "3"), np.zeros(3, bool))
    model = TowerWithHead(tower, data, exclusive=False)
    pixels, labels = torch.rand(3, 3, 28, 28), torch.from_numpy(truth).float()

    def gradient(kept: list[int], changed: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        model(pixels[kept], changed[kept])["loss"].backward()
        return model.head.weight.grad.clone()

    open_first = labels.clone()
    open_first[0, 0] = OPEN
    # label a: of the two other images only; label b: of all three; means over 5 cells instead of 2 * 2 and 2 * 3
    found = gradient([0, 1, 2], open_first)
    assert torch.allclose(found[0], gradient([1, 2], labels)[0] * 4 / 5, atol=1e-6)
    assert torch.allclose(found[1], gradient([0, 1, 2], labels)[1] * 6 / 5, atol=1e-6)


def test_every_word_is_in_the_documentation() -> None:
    table = (Path(__file__).parents[2] / "docs" / "tables.md").read_text(encoding="utf-8")
    assert not [word for word in WORDS if word and f"`{word}`" not in table]
