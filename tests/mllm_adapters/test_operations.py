"""Operations of a plan: every name that a step can have is one of them, and says what it needs."""

from typing import get_args

import pytest
import torch

from mllm_adapters.core.operations import KEEP, LORA, OPERATIONS, OperationName, Step


def test_every_name_in_a_plan_has_its_operation() -> None:
    assert set(OPERATIONS) == set(get_args(OperationName))
    assert {operation.label for operation in OPERATIONS.values() if operation.copies_bytes} == {
        "kept as they are",
        "kept under a new name",
    }


def test_a_step_knows_its_operation() -> None:
    step = Step(name="a", dtype="float16", shape=(2,), operation="keep", sources=("a",))
    assert step.kind is KEEP
    assert step.model_dump()["operation"] == "keep"  # as the record of a swap has it


def test_a_low_rank_update_is_merged() -> None:
    step = Step(
        name="a", dtype="float32", shape=(2, 2), operation="lora", sources=("a", "down", "up"),
        arguments={"scale": 0.5},
    )  # fmt: skip
    assert LORA.compute is not None
    made = LORA.compute(step, torch.zeros(2, 2), torch.ones(1, 2), torch.ones(2, 1))
    assert torch.equal(made, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("missing", ["sources", "arguments"])
def test_a_step_without_what_its_operation_needs_is_refused(missing: str) -> None:
    step = {"name": "a", "dtype": "float32", "shape": (2, 2), "operation": "lora"}
    given = {"sources": ("a", "down", "up"), "arguments": {"scale": 0.5}}
    with pytest.raises(ValueError, match="operation 'lora'"):
        Step.model_validate({**step, **{name: value for name, value in given.items() if name != missing}})
