"""Trainings in processes of their own, as torchrun starts them, on the CPU.

They are forked from one server that has imported everything, because importing takes longer than training here.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common import signals

TOLD = 143
"""Exit code of a process that SIGTERM ended."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.mllm_adapters.ranks_imports"])

ZERO2 = {
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}
ZERO3 = {**ZERO2, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
DEEPSPEED = {"zero2": ZERO2, "zero3": ZERO3}


def run(
    ranks: int, model: Path, data: Path, out: Path, recipe: Mapping[str, Any], **more: Any
) -> list[float]:
    """Train, and return the losses that the first process saw.

    Args:
        ranks: Number of processes.
        model: Checkpoint folder.
        data: Conversations; images lie in ``images`` beside them.
        out: Folder to write.
        recipe: Recipe keys.
        **more: ``resume``; ``kill``, (rank, step): that process kills itself at the end of the step, and the others
            are ended as torchrun ends them; ``told``, likewise: that process gets
            SIGTERM; ``again``: train once more in the same processes, into that folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report = out.with_name(f"{out.name}.losses.json")
    tasks = [
        CONTEXT.Process(target=_rank, args=(rank, ranks, port, model, data, out, dict(recipe), report, more))
        for rank in range(ranks)
    ]
    for task in tasks:
        task.start()
    while any(task.is_alive() for task in tasks):
        if any(task.exitcode for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    codes = [task.exitcode for task in tasks]
    if "told" in more:
        assert codes == [TOLD] * ranks, codes
        return []
    if "kill" in more:
        assert codes[more["kill"][0]] == -signal.SIGKILL, codes
        return []
    assert codes == [0] * ranks, codes
    return [loss for _, loss in json.loads(report.read_text())]


def _rank(
    rank: int,
    ranks: int,
    port: int,
    model: Path,
    data: Path,
    out: Path,
    recipe: dict,
    report: Path,
    more: dict,
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    try:
        _train(model, data, out, recipe, report, **more)
    except signals.Terminated:
        os._exit(TOLD)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads may outlive the work


def _train(
    model: Path, data: Path, out: Path, recipe: dict, report: Path,
    resume: bool = False, kill: tuple[int, int] | None = None, told: tuple[int, int] | None = None,
    again: Path | None = None,
) -> None:  # fmt: skip
    import torch
    from transformers import TrainerCallback

    from mllm_adapters.training.engine import train
    from mllm_adapters.training.prepare import prepare_training, rank
    from mllm_adapters.training.recipe_file import resolve

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if (rank(), state.global_step) in (kill, told):
                os.kill(os.getpid(), signal.SIGKILL if kill else signal.SIGTERM)

    torch.set_num_threads(1)
    resolved = resolve(None, [f"{key}={json.dumps(value)}" for key, value in recipe.items()])
    for folder in (again, out) if again else (out,):
        job = prepare_training(model, data, data.parent / "images", resolved.recipe)
        with signals.watched():
            outcome = train(job, folder, resolved.options, resume=resume, callbacks=[Kill()])
    if rank() == 0:
        report.write_text(json.dumps(outcome.losses))
