"""The losses over several ranks. In a separate file, because every spawned process repeats its imports."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mgll_encoder.pretraining.losses import Alphas, MGLLLoss

WIDTH = 8


def _shared_problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    model = torch.nn.ModuleDict({"image": torch.nn.Linear(5, WIDTH), "text": torch.nn.Linear(4, WIDTH)})
    model["loss"] = MGLLLoss(Alphas(1.0, 0.3, 0.7))
    truth = torch.zeros(2, 6, 5)
    truth[0, :, 0] = truth[0, 4, 1] = 1
    truth[1, torch.arange(6), torch.tensor([2, 3, 2, 4, 3, 2])] = 1
    return model, torch.randn(6, 5), torch.randn(5, 4), truth


def _gradients(model, images, texts, truth, keys) -> tuple[float, torch.Tensor]:
    value = model["loss"](model["image"](images), model["text"](texts), truth, keys)["loss"]
    value.backward()
    return float(value.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, images, texts, truth = _shared_problem()
    mine = slice(0, 4) if rank == 0 else slice(4, 6)  # unequal shares, overlapping texts
    used = truth[:, mine].sum((0, 1)).nonzero().flatten().flip(0)
    value, gradient = _gradients(model, images[mine], texts[used], truth[:, mine][:, :, used], 100 + used)
    dist.all_reduce(gradient)
    if rank == 0:
        torch.save({"value": value, "gradient": gradient / 2}, Path(folder) / "result.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_rank_on_the_global_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    model, images, texts, truth = _shared_problem()
    value, gradient = _gradients(model, images, texts, truth, torch.arange(5))
    assert result["value"] == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(result["gradient"], gradient, atol=1e-6, rtol=1e-5)
