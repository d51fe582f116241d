"""Prepares a training: checks everything, loads and freezes the model, renders the data, finds tensor names."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from mgll_encoder.common.devices import AUTO, train_on
from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError
from mgll_encoder.common.trained_on import Training
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import STAGES, StageReport, apply_stage, components, is_adapter
from mllm_adapters.data.corpus import Corpus, read_corpus
from mllm_adapters.data.dataset import DataCounts, ExampleTable, prepare_examples
from mllm_adapters.loading.load import load_folder
from mllm_adapters.loading.quantization import keep_differentiable, nf4
from mllm_adapters.training.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """A prepared training that has not been started.

    Attributes:
        checkpoint: The model's checkpoint.
        corpus: The conversations.
        recipe: See `Recipe`.
        model: The model, frozen except for the stage's parameters.
        processor: Its processor.
        stage: The trained components.
        examples: The training examples.
        counts: Counts of used and skipped rows.
        disk_names: Parameter name -> its tensor's name in the checkpoint, for all parameters that change in a
            full checkpoint: fully trained ones, and the layers that have adapters.
        max_length: Longest example in tokens: the recipe's, or the language model's context if that is
            shorter.
        precision: Of the forward pass; trained parameters are always float32.
        use_cpu: Whether to compute on the CPU.
    """

    checkpoint: Checkpoint
    corpus: Corpus
    recipe: Recipe
    model: Any
    processor: Any
    stage: StageReport
    examples: ExampleTable
    counts: DataCounts
    disk_names: Mapping[str, str]
    max_length: int
    precision: str
    use_cpu: bool = False

    @property
    def source(self) -> Path:
        """Return the checkpoint's folder."""
        return self.checkpoint.folder

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps on the available devices."""
        batches = math.ceil(len(self.examples) / (self.recipe.batch_size * ranks()))
        per_epoch = math.ceil(batches / self.recipe.gradient_accumulation)
        return self.recipe.max_steps or math.ceil(self.recipe.epochs * per_epoch)

    def training(self, command: str) -> Training:
        """Return the record of the training data."""
        rows = self.examples.table.select_columns("images").select(self.examples.kept)
        digests = [self.corpus.digests[name] for row in rows for name in row["images"]]
        parts = [part.component for part in self.stage.components if part.trainable]
        return Training.of(parts, command, digests, self.corpus.splits())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a run to be continued: recipe, data, precision, tower and projector."""
        digest = hashlib.sha256(self.checkpoint.config_bytes)
        parts = components(self.model)
        for name, parameter in self.model.named_parameters():
            if parts[name] != "language_model" and not is_adapter(name):
                digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return {
            "precision": self.precision,
            "data_sha256": self.corpus.digest(),
            "model_sha256": digest.hexdigest(),
            "ranks": ranks(),
            **asdict(self.recipe),
        }


def ranks() -> int:
    """Return the number of training processes, as set by torchrun, deepspeed and accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process; rank 0 writes."""
    return int(os.environ.get("RANK", "0"))


def prepare_training(
    source: Path, data: Path | Sequence[Path], images: Path | None, recipe: Recipe, device: str = AUTO
) -> Job:
    """Check everything, load the model, and freeze all but the stage's parameters. Writes nothing.

    Raises:
        UserError: the data or the model are not usable (see `read_corpus`, `prepare_examples`, `load_folder`), the
            language model has an encoder, or the stage does not fit the model.
    """
    checkpoint = check_source(source)
    corpus = read_corpus(data, images, recipe.rows)
    if rank() == 0:
        corpus.warn_of_test_files()
    use_cpu = train_on(device)
    precision = recipe.precision
    if precision == "auto":
        half = not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if half else "float32"
    dtype = getattr(torch, precision)
    quantization = nf4(checkpoint.config, source, dtype) if recipe.qlora else None
    model, processor = load_folder(checkpoint, dtype=dtype, quantization=quantization)
    if recipe.qlora:
        keep_differentiable(model)
    torch.manual_seed(recipe.seed)  # for new adapters
    stage = apply_stage(model, recipe.stage, recipe.lora)
    whole = [name for name in stage.names if not is_adapter(name)]
    adapted = [f"{layer}.weight" for layer in stage.adapted]
    disk_names = names_on_disk([*whole, *adapted], checkpoint.tensors, _renaming(model))
    for name in whole:
        parameter = model.get_parameter(name)
        parameter.data = checkpoint.read(disk_names[name]).to(parameter.device, torch.float32)
    for name in set(stage.names) - set(whole):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(torch.float32)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", recipe.max_length)
    max_length = min(recipe.max_length, context)
    examples, counts = prepare_examples(corpus, processor, max_length, STAGES[recipe.stage].learns_from_text)
    return Job(
        checkpoint=checkpoint,
        corpus=corpus,
        recipe=recipe,
        model=model,
        processor=processor,
        stage=stage,
        examples=examples,
        counts=counts,
        disk_names=disk_names,
        max_length=max_length,
        precision=precision,
        use_cpu=use_cpu,
    )


def check_source(source: Path) -> Checkpoint:
    """Check, from headers alone, that a checkpoint can be trained.

    Raises:
        UserError: it is in its original layout, an adapter, or its language model has an encoder.
    """
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        raise UnsupportedCheckpointError(
            f"{source} is an adapter: train from its base, or merge it first (`finetune_lora(merge=True)` "
            "also writes a full checkpoint)"
        )
    checkpoint, _, layout = open_checkpoint(source)
    if layout != "transformers":
        raise UnsupportedCheckpointError(
            f"{source} is in its original layout: first "
            f"`convert(mllm={source}, out={source.name}-hf)`, then retrain that"
        )
    text = build_config(checkpoint.config, f"{source}/config.json").get_text_config()
    if text.is_encoder_decoder:
        raise UnsupportedCheckpointError(
            f"{source}: its language model ({text.model_type}) reads the prompt with an encoder, and "
            "`retrain_projector()` trains only decoder models: take one on a decoder, such as Vicuna"
        )
    return checkpoint


def names_on_disk(
    parameters: Iterable[str], tensors: Iterable[str], rename: Callable[[str], str] = str
) -> dict[str, str]:
    """Find the stored tensor of each parameter: the one whose name is the parameter's, or a suffix of it.

    transformers renames on loading (``multi_modal_projector.linear_1.weight`` becomes
    ``model.multi_modal_projector.linear_1.weight``).

    Args:
        parameters: Names in the loaded model.
        tensors: Names on disk.
        rename: The library's renaming of a name on disk, except for a prefix.

    Raises:
        UserError: a parameter has no such tensor, or several.
    """
    stored: dict[str, list[str]] = {}
    for tensor in tensors:
        stored.setdefault(rename(tensor), []).append(tensor)
    found: dict[str, str] = {}
    for name in parameters:
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        matches = [tensor for suffix in suffixes for tensor in stored.get(suffix, [])]
        if len(matches) != 1:
            raise BadDataError(
                f"{len(matches)} stored tensors for parameter {name}, expected 1: {', '.join(matches)}"
            )
        found[name] = matches[0]
    return found


def _renaming(model: Any) -> Callable[[str], str]:
    """Return transformers' renaming of names on disk for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [row for row in get_model_conversion_mapping(model) if isinstance(row, WeightRenaming)]

    def rename(name: str, renamings: list[WeightRenaming]) -> str:
        return rename_source_key(name, renamings, [])[0]

    return partial(rename, renamings=renamings)
