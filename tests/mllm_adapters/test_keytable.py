"""Key tables of families: steps for every tensor, and none that is guessed."""

from pathlib import Path

import pytest
import torch

from mgll_encoder.common.errors import UserError
from mgll_encoder.weights.keytable import Drop, Reshape, Split
from mllm_adapters.checkpoints.checkpoint import TensorHeader
from mllm_adapters.families.keytable import OriginalLayout

LAYOUT = OriginalLayout(
    {
        "embed": "embed",
        "norm.*": "layer_norm.{}",
        "wqkv.weight": Split("{q,k,v}_proj.weight", groups=2, units=(2, 1, 1)),
        "pos_embed": Reshape("positions", 2),
        "inv_freq": None,
        "counter": Drop("a counter"),
    },
    of="a test",
)


def header(name: str, *shape: int) -> TensorHeader:
    return TensorHeader(name, torch.float16, shape, Path("host/model.safetensors"))


def test_every_tensor_becomes_steps_or_is_left_out_with_its_reason() -> None:
    given = [
        header("embed", 8, 4), header("norm.weight", 4), header("wqkv.weight", 16, 4), header("pos_embed", 1, 9, 4),
        header("inv_freq", 2), header("counter"),
    ]  # fmt: skip
    steps, dropped = LAYOUT.steps(given, "host")
    assert [(s.name, s.operation, s.shape) for s in steps] == [
        ("embed", "keep", (8, 4)), ("layer_norm.weight", "rename", (4,)), ("q_proj.weight", "slice", (8, 4)),
        ("k_proj.weight", "slice", (4, 4)), ("v_proj.weight", "slice", (4, 4)), ("positions", "reshape", (9, 4)),
    ]  # fmt: skip
    assert steps[3].arguments == {"groups": 2, "units": 4, "start": 2, "stop": 3}
    assert [(d.name, d.reason) for d in dropped] == [
        ("inv_freq", "not part of the transformers layout"), ("counter", "a counter"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("vision.extra", (1,), "host: tensor vision.extra is not part of a test"),
        ("embed.lora_A.weight", (1,), "merge"),
        ("wqkv.weight", (12, 4), "12 rows, expected a multiple of 8"),
    ],
)
def test_a_tensor_in_no_rule_or_of_another_shape_is_refused(
    name: str, shape: tuple[int, ...], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        LAYOUT.steps([header(name, *shape)], "host")
