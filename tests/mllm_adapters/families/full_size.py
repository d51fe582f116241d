"""A plan for a published checkpoint of full size, from its headers alone."""

from pathlib import Path

from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.streaming import nbytes
from mllm_adapters.loading.load import check_complete


def check_full_size(plan: Plan, checkpoint: Checkpoint, *, weights: int) -> None:
    """Every tensor of the source is used or dropped, every tensor of the target is made once.

    Args:
        plan: The plan.
        checkpoint: Its source.
        weights: Number of weights of the target model, as published or counted by hand.
    """
    check_complete(plan)
    names = [step.name for step in plan.steps]
    assert len(names) == len(set(names)), "a target tensor is made twice"
    dropped = [tensor.name for tensor in plan.dropped]
    used = {source for step in plan.steps if step.operation != "tower" for source in step.sources}
    used |= {step.replaces for step in plan.steps if step.replaces}
    assert len(dropped) == len(set(dropped))
    assert not used & set(dropped), "a source tensor is both used and dropped"
    own = {name for name in used if "/" not in name}
    assert own | set(dropped) == set(checkpoint.tensors), "a source tensor is forgotten"
    sliced: dict[str, int] = {}
    for step in plan.steps:
        if step.operation == "slice":
            sliced[step.sources[0]] = sliced.get(step.sources[0], 0) + nbytes(step)
    for name, found in sliced.items():
        header = checkpoint.header(name)
        expected = header.dtype.itemsize
        for side in header.shape:
            expected *= side
        assert found == expected, f"the parts of {name} do not add up"
    size = {step.dtype: 0 for step in plan.steps}
    for step in plan.steps:
        count = 1
        for side in step.shape:
            count *= side
        size[step.dtype] += count
    assert sum(size.values()) == weights


def published_tower(folder: Path, image_size: int = 224, **geometry: int) -> Path:
    """The headers of an MGLL ViT-L/14 in a transformers folder, without its bytes; or of another ViT."""
    import torch

    from mgll_encoder import TowerSpec, vision_config
    from mgll_encoder.tower.model import build_model
    from tests.builders import sparse_checkpoint

    sizes = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096, "patch_size": 14, **geometry}
    spec = TowerSpec(**sizes, image_size=image_size, activation="gelu")
    with torch.device("meta"):
        state = build_model(spec).state_dict()
    shapes = {f"vision_model.{name}": tuple(value.shape) for name, value in state.items()}
    return sparse_checkpoint(folder, vision_config(spec).to_dict(), shapes, "F32")
