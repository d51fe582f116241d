"""Letters scored by vLLM: one device or several, with its prefix caching and parallelism (https://docs.vllm.ai).

Prompts are tokenized here and sent as token ids, with the decoded images. vLLM inserts the image tokens and makes the
pixels; the ids that it read are compared with this project's for every question, the pixels for the first.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval_mcq.backends.base import Identity
from eval_mcq.backends.fingerprint import code_version, model_fingerprint, package_versions
from eval_mcq.backends.vllm_models import INSTEAD, check_model
from eval_mcq.backends.vllm_process import VLLMError, VLLMProcess
from eval_mcq.items.schema import MCQItem
from eval_mcq.records.backend_record import BackendRecord
from eval_mcq.scoring.answerer import Answerer
from eval_mcq.scoring.modes import LIKELIHOODS, Score
from eval_mcq.scoring.prompt import PROMPTS, Ask, Mode
from eval_mcq.scoring.requests import Prepared, PromptTokenizer, TokenizedRequest
from mgll_encoder.common.devices import Precision
from mgll_encoder.common.errors import (
    InvalidArgumentError,
    MismatchError,
    TrainingError,
    UnsupportedCheckpointError,
)
from mgll_encoder.text.pretrained import load_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

_logger = logging.getLogger(__name__)

PYTHON = "MGLL_VLLM_PYTHON"
"""Environment variable with the interpreter of vLLM's environment."""

PLACEMENT = (
    "block_size", "disable_custom_all_reduce", "distributed_executor_backend", "enable_prefix_caching", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
    "pipeline_parallel_size", "tensor_parallel_size",
)  # fmt: skip
"""Options of vLLM that say where and in which pieces it computes; a run may continue with others."""

TAKEN: Mapping[str, str] = {
    "model": "the model is given by `model`",
    "tokenizer": "prompts are tokenized here",
    "dtype": "the number format is given by `precision`",
    "seed": "nothing is drawn",
    "trust_remote_code": "code in a model folder is never run",
    "data_parallel_size": "start one run per device with `shard`, and merge them",
    "disable_log_stats": "it is set here",
}
"""Options of vLLM that are not passed on, and why."""


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Read options of ``vllm.LLM``, each as ``NAME=VALUE``; a value is JSON, or else text.

    Raises:
        UserError: one has another form, is given twice, or is not for the user to set.
    """
    options: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name.isidentifier() and value):
            raise InvalidArgumentError(
                f"`vllm_options` has '{one}', expected NAME=VALUE, such as tensor_parallel_size=2"
            )
        if name in TAKEN:
            raise InvalidArgumentError(f"`vllm_options` has '{name}', which is not passed on: {TAKEN[name]}")
        if name in options:
            raise InvalidArgumentError(f"`vllm_options` has '{name}' twice")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def vllm_python(given: str | Path | None = None) -> Path:
    """Return the interpreter of vLLM's environment: the given one, that of ``MGLL_VLLM_PYTHON``, or this one."""
    return Path(given or os.environ.get(PYTHON) or sys.executable)


@dataclass(frozen=True)
class VLLMModel:
    """A model folder that vLLM loads.

    Attributes:
        folder: The folder.
        mode: Scoring mode; only ``letters``.
        dtype: Number format, or ``auto``.
        python: The interpreter in whose environment vLLM is installed.
        options: Options of ``vllm.LLM``.
    """

    folder: Path
    mode: Mode
    dtype: Precision
    python: Path
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.mode != "letters":
            raise InvalidArgumentError(
                f"vLLM scores `mode=letters`, not '{self.mode}': leave `engine` out for the other modes"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InvalidArgumentError(
                "`engine=vllm` starts its own processes: leave accelerate launch out, and give several devices by "
                "`vllm_options=tensor_parallel_size=N` or one `shard` each"
            )

    @cached_property
    def process(self) -> VLLMProcess:
        """The process, with vLLM imported.

        Raises:
            UserError: vLLM is not installed there.
        """
        _logger.info(f"Importing vLLM in {self.python} ...")
        return VLLMProcess(self.python)

    @cached_property
    def number_format(self) -> str:
        """As for this project's engine, ``auto`` is bfloat16, and float32 on a CPU."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.process.versions["device"] == "cpu" else "bfloat16"

    @cached_property
    def identity(self) -> Identity:
        """What its answers depend on; imports vLLM, and hashes the folder.

        Raises:
            UserError: it is not a model folder, vLLM is not known to compute it alike, or vLLM is not installed.
        """
        check_model(self.folder)
        versions = self.process.versions
        sha256 = model_fingerprint(self.folder)
        decisive = {name: value for name, value in self.options.items() if name not in PLACEMENT}
        record = BackendRecord(
            name="vllm",
            version=versions["vllm"],
            sent={**{k: versions[k] for k in ("torch", "transformers", "device")}, "options": decisive},
        )
        return Identity(
            str(self.folder), sha256, self.number_format, code_version(),
            {**package_versions(), "vllm": versions["vllm"]}, record,
        )  # fmt: skip

    def load(self) -> "VLLMAnswerer":
        """Load the model.

        Raises:
            UserError: vLLM does not take it.
        """
        from transformers import AutoProcessor

        processor = load_pretrained(AutoProcessor, self.folder, f"the processor in {self.folder}")
        process = self.process
        _logger.info(f"Loading {self.folder} with vLLM {process.versions['vllm']} ...")
        options = {"dtype": self.number_format, "seed": 0, "disable_log_stats": True, **self.options}
        try:
            process.load(self.folder, options)
        except VLLMError as error:
            raise UnsupportedCheckpointError(
                f"vLLM {process.versions['vllm']} does not load {self.folder}: {error}; {INSTEAD}"
            ) from None
        return VLLMAnswerer(process, processor, self.mode)


class VLLMAnswerer(Answerer[Prepared]):
    """Scores letters with a model in vLLM.

    Args:
        process: vLLM, with the model loaded.
        processor: The model's processor here, which tokenizes prompts.
        mode: Scoring mode.

    Raises:
        UserError: the processor is missing, or has no chat template.
    """

    def __init__(self, process: VLLMProcess, processor: Any, mode: Mode = "letters") -> None:
        self.process = process
        self.writer = PromptTokenizer(processor, PROMPTS[mode])
        self.likelihood = LIKELIHOODS[mode]
        self.pixel_difference: float | None = None
        self._compared = False

    def prompt(self, item: MCQItem, rotation: int = 0) -> str:
        """Return the text before the answer, including chat template and image placeholders."""
        return self.writer.prompt(item, rotation)

    def check_options(self, items: Sequence[MCQItem]) -> None:
        """Check that the letters of the question with the most options are single tokens.

        Raises:
            UserError: one is not; names the question.
        """
        widest = Ask(max(items, key=lambda item: len(item.options)))
        self.likelihood.continuations(self.writer, widest, self.prompt(widest.item))

    def prepare(self, asks: Sequence[Ask], images: "list[Image]") -> Prepared:
        """Tokenize questions on the same images."""
        return self.writer.prepare(asks, images, self.likelihood.continuations)

    def answer(self, batch: Sequence[Prepared]) -> list[list[Score]]:
        """Score all questions in one call, so that vLLM batches them.

        Raises:
            UserError: vLLM failed, or read other tokens than this project's engine would.
        """
        if not self._compared:
            self._compare_pixels(batch[0])
        images = [image for prepared in batch for image in prepared.images]
        rows, first = [], 0
        for prepared in batch:
            shown = list(range(first, first + len(prepared.images)))
            first += len(prepared.images)
            rows += [
                {"tokens": self.writer.unexpanded(row.prompt), "images": shown, "wanted": row.wanted[0][0]}
                for row in prepared.rows
            ]
        try:
            found = iter(self.process.score(images, rows))
        except VLLMError as error:
            raise TrainingError(
                f"vLLM stopped: {error}; the answers so far are kept, and the same `run()` goes on"
            ) from None
        return [[self._score(prepared, row, next(found)) for row in prepared.rows] for prepared in batch]

    def _score(self, prepared: Prepared, row: TokenizedRequest, found: Mapping[str, Any]) -> Score:
        expected = row.tokens or self._tokens(row, prepared.images)
        if found["tokens"] != expected:
            raise MismatchError(
                f"question '{row.ask.item.id}': vLLM read {len(found['tokens'])} tokens, which are not the "
                f"{len(expected)} of its prompt: its image processor differs; leave `engine` out to use this "
                "project's engine"
            )
        return self.likelihood.score(row.ask, [[torch.tensor(found["log_probabilities"])]])

    def _tokens(self, row: TokenizedRequest, images: "Sequence[Image]") -> list[int]:
        ids: list[int] = self.writer.batch([row.prompt], [images])["input_ids"][0].tolist()
        return ids

    def _compare_pixels(self, prepared: Prepared) -> None:
        """Compare the pixels of vLLM's processor with this one's, on the first images."""
        self._compared = True
        pixels = prepared.inputs.get("pixel_values")
        if not torch.is_tensor(pixels):
            _logger.warning("this model's processor makes no single array of pixels: they were not compared")
            return
        prompt = prepared.rows[0].prompt
        difference = self.process.pixel_difference(prepared.images, prompt, pixels.float().numpy())
        self.pixel_difference = difference
        if difference:
            _logger.warning(
                f"the pixels of vLLM's processor (transformers {self.process.versions['transformers']}) differ from "
                f"this environment's by up to {difference:.2g}: its probabilities differ a little"
            )
        elif difference is None:
            _logger.warning("the pixels of vLLM's processor have another shape than this environment's")
