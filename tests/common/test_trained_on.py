"""Weights carry a record of their training images, so that nobody tests on these by mistake."""

import hashlib
import json

import pytest

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.trained_on import (
    MOST_POINTS,
    TRAINED_ON,
    Training,
    as_numbers,
    trainings_of,
    without_tower,
    write_trainings,
)

DIGESTS = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(300)]


def test_a_record_is_read_as_it_was_written_and_is_small(tmp_path):
    tower = Training.of(("tower",), "pretrain", DIGESTS, [{"split_by": "patient", "split_test": 0.3}])
    lora = Training.of(("projector", "language_model"), "finetune-lora", DIGESTS[:7])
    write_trainings(tmp_path, [tower, lora, tower])
    assert list(trainings_of(tmp_path)) == [tower, lora]
    assert (tmp_path / TRAINED_ON).stat().st_size < 13 * len(DIGESTS)
    assert set(as_numbers(DIGESTS)) == set(trainings_of(tmp_path)[0].images)
    assert lora.title == "projector and language model (finetune-lora)"
    assert without_tower([tower, lora]) == (lora,)


def test_a_long_curve_is_averaged_in_equal_parts(tmp_path):
    losses = tuple((step, float(step % 10)) for step in range(1, 10_001))
    training = Training.of(("projector",), "retrain-projector", []).with_curves(losses, ((5, 0.5),))
    assert len(training.losses) == MOST_POINTS
    assert training.losses[-1] == (10_000, 4.5)  # whole periods of ten: all means are equal
    assert {value for _, value in training.losses} == {4.5}
    assert training.scores == ((5, 0.5),)
    write_trainings(tmp_path, [training])
    assert trainings_of(tmp_path) == (training,)


def test_no_record_is_no_training(tmp_path):
    write_trainings(tmp_path, [])
    assert not (tmp_path / TRAINED_ON).exists()
    assert trainings_of(tmp_path) == ()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"trainings": [{"parts": ["tower"], "command": "pretrain", "images": "AAA"}]}, "trainings.0.images"),
        ({"trainings": [{"parts": [], "command": "pretrain", "images": ""}]}, "trainings.0.parts"),
        ({"trainings": [{"parts": ["tower"], "command": "pretrain", "images": 7}]}, "trainings.0.images"),
        ({"format": 9}, "format"),
    ],
)
def test_a_damaged_record_is_refused_by_its_field(tmp_path, change, field):
    (tmp_path / TRAINED_ON).write_text(json.dumps({"format": 1, "trainings": []} | change))
    with pytest.raises(BadDataError, match=f"{TRAINED_ON}: '{field}'"):
        trainings_of(tmp_path)
