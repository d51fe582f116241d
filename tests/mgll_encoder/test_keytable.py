"""Key tables: patterns with fields, and the names that rules give."""

import pytest
import torch

from mgll_encoder.weights.keytable import Destination, Drop, KeyTable, Split, Transpose

TABLE = KeyTable(
    {
        "blocks.{}.norm{1,2}.*": "layers.{}.layer_norm{}.{}",
        "blocks.{}.qkv.{weight,bias}": Split("layers.{}.{q,k,v}_proj.{}"),
        "{llm,t5}_model.*": "language_model.{1}",
        "proj": Transpose("projection.weight"),
        "*position_ids": None,
        "counter": Drop("a counter"),
        "head.*": "head.{}",
    },
    prefix="module.",
)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("blocks.11.norm2.weight", ("layers.11.layer_norm2.weight",)),
        ("module.blocks.0.norm1.bias", ("layers.0.layer_norm1.bias",)),
        ("blocks.3.qkv.bias", ("layers.3.q_proj.bias", "layers.3.k_proj.bias", "layers.3.v_proj.bias")),
        ("t5_model.shared.weight", ("language_model.shared.weight",)),
        ("head.position_ids", ()),  # the first pattern that matches counts
        ("counter", ()),
        ("head.weight", ("head.weight",)),
    ],
)
def test_a_name_goes_where_the_first_matching_rule_says(name: str, targets: tuple[str, ...]) -> None:
    place = TABLE.find(name)
    assert place is not None
    assert place.targets == targets


@pytest.mark.parametrize(
    "name",
    [
        "blocks.x.norm1.weight",
        "blocks.0.norm3.weight",
        "blocks.0.qkv.scale",
        "xproj",
        "blocks.0.norm1",
        "proj.weight",
    ],
)
def test_a_name_in_no_rule_is_not_guessed(name: str) -> None:
    assert TABLE.find(name) is None


def test_tensors_are_cut_and_turned_as_the_rule_says() -> None:
    fused = torch.arange(6.0).reshape(6, 1)
    parts = TABLE.find("blocks.0.qkv.weight").cut(fused)
    assert [part.flatten().tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert TABLE.find("proj").cut(torch.ones(2, 3))[0].shape == (3, 2)
    assert TABLE.find("head.weight").cut(fused)[0] is fused
    with pytest.raises(NotImplementedError):
        Destination(Drop("a counter"), ()).cut(fused)
