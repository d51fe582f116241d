"""What an earlier version of this project wrote can still be verified, undone, retrained and made a delta."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_adapters import plan_swap
from mllm_adapters.cli.swap import main
from mllm_adapters.core.fates import Recorded
from mllm_adapters.core.provenance import read_record
from mllm_adapters.swap.replace_tensors import replace_tensors
from mllm_adapters.swap.verify import Verification
from tests.builders import invoke, refused
from tests.mllm_adapters.llava_checkpoints import a_tower

FITTED = "fitted on 20 images, held-out R² 0.858"

FORMAT_2: dict[str, Any] = {
    "processor": "the source's, with the new preprocessing",
    "readers": {"multi_modal_projector.linear_1": FITTED},
    "alignment": {
        "images": "pictures",
        "used": 20,
        "readers": [{"reader": "multi_modal_projector.linear_1", "r2": 0.8584}],
    },
}
"""Fields of a plan as version 0.1.0 recorded them before connectors had their name (9681f13)."""


def in_format_2(folder: Path, name: str = "mgll_swap.json") -> Path:
    """Give a record the form that it had."""
    record = json.loads((folder / name).read_text())
    del record["plan"]["connectors"]
    record |= {"format": 2, "plan": {**record["plan"], **FORMAT_2}}
    (folder / name).write_text(json.dumps(record))
    return folder


@pytest.fixture
def old(tiny_llava: Path, tmp_path: Path) -> Path:
    plan = plan_swap(tiny_llava, a_tower(tmp_path / "mgll", width=48))
    return in_format_2(plan.write(tmp_path / "old"))


def test_its_phrases_are_kept_under_the_names_of_today(old: Path) -> None:
    record = read_record(old)
    plan = record.plan_with({"model_type": "llava"})
    assert plan.connectors == {"multi_modal_projector.linear_1": Recorded(words=FITTED)}
    assert plan.processor == Recorded(words="the source's, with the new preprocessing")
    assert plan.alignment is not None
    assert plan.alignment["connectors"] == [{"connector": "multi_modal_projector.linear_1", "r2": 0.8584}]


def test_it_is_verified_restored_and_made_a_delta(old: Path, tiny_llava: Path, tmp_path: Path) -> None:
    assert [c.name for c in Verification(old, tmp_path / "mgll", tiny_llava).checks() if not c.passed] == []
    assert invoke(main, "restore", old, "--mllm", tiny_llava, "--out", tmp_path / "back").code == 0
    delta = tmp_path / "delta"
    assert invoke(main, "extract", old, "--mllm", tiny_llava, "--out", delta).code == 0
    in_format_2(delta, "mgll_delta.json")
    made = invoke(main, "compose", "--delta", delta, "--mllm", tiny_llava, "--out", tmp_path / "again")
    assert made.code == 0, made.err
    assert read_record(tmp_path / "again") == read_record(old)


def test_training_carries_it_on(old: Path, tmp_path: Path) -> None:
    trained = replace_tensors(old, tmp_path / "trained", {})
    assert json.loads((trained / "mgll_swap.json").read_text())["format"] == 3
    assert read_record(trained).plan == read_record(old).plan


@pytest.mark.parametrize("damage", [{"plan": 3}, {"plan": {"readers": 3}}, {"plan": {"processor": 3}}, {}])
def test_a_damaged_one_is_refused_in_one_line(old: Path, damage: dict[str, Any]) -> None:
    (old / "mgll_swap.json").write_text(json.dumps({"format": 2, **damage}))
    assert "mgll_swap.json" in refused(main, "verify", old)
