"""What the processes of `ranks` share: imported once, forked many times."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import deepspeed
import torch
import transformers  # noqa: F401

import mllm_adapters.training.engine  # noqa: F401

torch.set_num_threads(1)
# Sums in shared memory instead of over gloo: compiled by gcc at first use, minutes on a busy machine.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
