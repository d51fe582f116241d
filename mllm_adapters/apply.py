"""Executing a plan on disk: shard by shard, tensor by tensor, in a hidden folder that is renamed at the end."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mgll_encoder.checkpoint import read_json
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import check_free, new_folder
from mllm_adapters.card import model_card
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import Family, Plan, Step
from mllm_adapters.loading import check_complete
from mllm_adapters.operations import compute
from mllm_adapters.streaming import DTYPE_CODES, nbytes, write_safetensors

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
PROVENANCE = "mgll_swap.json"
CARD = "README.md"
REWRITTEN = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "adapter_config.json",
    CARD,
    PROVENANCE,
)
"""Side files that a swap writes anew or, an adapter being merged, leaves out; the source's others are copied."""


def apply_plan(
    plan: Plan,
    family: Family,
    checkpoint: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    fitted: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the planned checkpoint.

    Args:
        plan: What to write.
        family: The family that made the plan; it makes the processor.
        checkpoint: The plan's source.
        out: Folder that appears when everything is written and checked.
        force: Replace ``out`` if it exists.
        progress: Called with the number of bytes written, tensor by tensor.
        fitted: Values of the tensors that the plan has fitted, by name (`mllm_adapters.align`).

    Raises:
        UserError: ``out`` cannot be written, something in the source cannot be read, or the planned tensors are not
            those of the planned model.
    """
    check_complete(plan)
    processor = family.processor(plan)
    with new_checkpoint(out, force, inputs(plan)) as partial:
        write_weights(
            partial, checkpoint, plan.steps, lambda steps: compute(plan, checkpoint, steps, fitted), progress
        )
        copy_files((f for f in checkpoint.side_files if f.name not in REWRITTEN), partial)
        _update_generation(partial / GENERATION, plan)
        if processor is not None:
            processor.save_pretrained(partial)
        # The file that releases before 5.0 read; without a tokenizer, all that says how to prepare images.
        family.image_processor(plan).save_pretrained(partial)
        (partial / PROVENANCE).write_text(provenance(plan), encoding="utf-8")
        (partial / CARD).write_text(model_card(plan), encoding="utf-8")
        # Last, so that a folder left behind by a kill is no checkpoint.
        (partial / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    return out


def inputs(plan: Plan) -> tuple[Path, ...]:
    """The files and folders that a plan reads."""
    return (plan.source, *([plan.tower] if plan.tower else []), *plan.parts.values())


def check_output(out: Path, force: bool, inputs: Iterable[Path]) -> None:
    """Refuse an output path that is taken, or (whatever ``force`` says) that is or holds an input.

    Raises:
        UserError: it is.
    """
    for given in inputs:
        if given.resolve().is_relative_to(out.resolve()):
            what = "is" if given.resolve() == out.resolve() else "holds"
            raise UserError(f"output {out} {what} the input {given}: choose another --out")
    check_free(out, force)


@contextmanager
def new_checkpoint(out: Path, force: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """`new_folder` for a checkpoint made of others, which it never replaces.

    Raises:
        UserError: ``out`` is taken, is or holds an input, or cannot be written.
    """
    check_output(out, force, inputs)
    try:
        with new_folder(out, force) as partial:
            yield partial
    except OSError as error:
        where = error.filename or out
        raise UserError(f"{out} cannot be written ({where}: {error.strerror or error})") from error


def write_weights(
    folder: Path,
    source: Checkpoint,
    steps: Iterable[Step],
    compute: Callable[[list[Step]], Iterable[tuple[Step, Tensor]]],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write shards and their index; source files of which nothing changes are hard-linked.

    Args:
        folder: Existing folder to write into.
        source: Checkpoint that kept tensors come from.
        steps: Every tensor of the target.
        compute: Gives the values of the steps that it is asked for.
        progress: Called with the number of bytes written, tensor by tensor.
    """
    groups: dict[Path | None, list[Step]] = {}
    for step in steps:
        stays = step.sources and step.operation != "tower"
        file = source.header(step.sources[0]).file if stays else None
        groups.setdefault(file, []).append(step)
    weight_map: dict[str, str] = {}
    for number, (file, group) in enumerate(groups.items(), start=1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if file is not None and _untouched(file, group, source):
            link_or_copy(file, folder / name)
            progress(sum(map(nbytes, group)))
        else:
            write_safetensors(folder / name, group, _reporting(compute(group), progress))
        _check_written(folder / name, group)
        weight_map |= dict.fromkeys((step.name for step in group), name)
    if len(groups) > 1:
        total = sum(nbytes(step) for group in groups.values() for step in group)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def bytes_linked(plan: Plan, source: Checkpoint) -> int:
    """Bytes of the plan that need not be written, because their source file stays as it is."""
    groups: dict[Path, list[Step]] = {}
    for step in plan.steps:
        if step.operation == "keep":
            groups.setdefault(source.header(step.sources[0]).file, []).append(step)
    return sum(sum(map(nbytes, g)) for file, g in groups.items() if _untouched(file, g, source))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where the file system cannot link."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files, but not their permissions: the copies of a read-only source can be written."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def provenance(plan: Plan) -> str:
    """What was done, with which versions, as the JSON text of ``mgll_swap.json``."""
    versions = {name: version(name) for name in ("mgll-mllm", "torch", "transformers", "safetensors")}
    summary = plan.model_dump(mode="json", exclude={"steps", "dropped", "config"})
    return json.dumps({"format": 1, "versions": versions, "plan": summary}, indent=2) + "\n"


def _update_generation(file: Path, plan: Plan) -> None:
    if plan.generation:
        source = read_json(file) if file.is_file() else {}
        file.write_text(json.dumps({**source, **plan.generation}, indent=2) + "\n", encoding="utf-8")


def _untouched(file: Path, group: list[Step], source: Checkpoint) -> bool:
    held = {header.name for header in source.tensors.values() if header.file == file}
    return (
        file.suffix == ".safetensors"
        and bool(held)
        and {s.name for s in group if s.operation == "keep"} == held
    )


def _reporting(
    tensors: Iterable[tuple[Step, Tensor]], progress: Callable[[int], None]
) -> Iterable[tuple[Step, Tensor]]:
    for step, tensor in tensors:
        yield step, tensor
        progress(nbytes(step))


def _check_written(path: Path, steps: list[Step]) -> None:
    """Read the header back: names, dtypes and shapes must be those of the plan."""
    with safe_open(path, "pt") as weights:
        views = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    found = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    planned = {step.name: (DTYPE_CODES[step.dtype], step.shape) for step in steps}
    if found != planned:
        raise ValueError(
            f"{path.name} does not hold what was planned: {sorted(set(found) ^ set(planned))[:3]}"
        )
