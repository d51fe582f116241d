"""Writes the folder of a plan: a whole checkpoint, or a delta."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.common.local_paths import without_local
from mgll_encoder.common.texts import read_json
from mgll_encoder.common.trained_on import (
    TRAINED_ON,
    Training,
    trainings_of,
    without_tower,
    write_trainings,
)
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.file_copy import copy_files
from mllm_adapters.checkpoints.locate import PROVENANCE
from mllm_adapters.checkpoints.older_releases import rewrite_for_older_releases, with_rope_theta
from mllm_adapters.core.contract import Family, Plan
from mllm_adapters.core.operations import Step
from mllm_adapters.core.provenance import SwapRecord, input_record, record_of
from mllm_adapters.core.streaming import nbytes
from mllm_adapters.core.values import compute, open_tower
from mllm_adapters.loading.load import GENERATION, check_complete
from mllm_adapters.swap.card import CARD, model_card
from mllm_adapters.swap.writer import (
    CONFIG,
    Written,
    check_output,
    tell_left_behind,
    untouched,
    write_checkpoint,
    write_weights,
)

REWRITTEN = (
    CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "adapter_config.json",
    CARD,
    PROVENANCE,
    TRAINED_ON,
)
"""Side files that a swap rewrites or, when merging an adapter, drops; the source's others are copied."""


def apply_plan(
    plan: Plan,
    family: Family,
    checkpoint: Checkpoint,
    out: Path,
    *,
    force: bool = False,
    copy: bool = False,
    checked: bool = False,
    fitted: Mapping[str, Tensor] | None = None,
    trainings: Sequence[Training] = (),
    weights: Callable[[Path], Written] | None = None,
    records: Callable[[SwapRecord, str], Mapping[str, str]] | None = None,
    read: Iterable[Path] = (),
) -> Path:
    """Write the planned checkpoint, or a delta of it.

    Args:
        plan: The plan.
        family: The family that made the plan; it makes the processor.
        checkpoint: The plan's source.
        out: Folder that appears when everything is written and checked.
        force: Replace ``out`` if it exists.
        copy: Copy unchanged files instead of hard-linking them (sharing blocks if the file system can).
        checked: The plan has already passed `check_complete`.
        fitted: Values of the fitted tensors, by name (`mllm_adapters.alignment.align`).
        trainings: Records of the images that they were fitted on, or of other trainings.
        weights: Writes other weights than those of the whole plan into a folder.
        records: Makes other files than record and card, by name, from both.
        read: Further inputs, in addition to those of the plan.

    Raises:
        UserError: ``out`` cannot be written, the source cannot be read, or the planned tensors are not those
            of the planned model.
    """
    if not checked:
        check_complete(plan)
    weights = weights or partial(
        write_weights,
        source=checkpoint,
        steps=plan.steps,
        compute=lambda steps: compute(plan, checkpoint, steps, fitted),
        copy=copy,
    )
    given = (*read, *inputs(plan))
    check_output(out, force, given)
    write_processor = family.processor_writer(plan)
    tower = open_tower(plan)
    with ThreadPoolExecutor(1) as aside:
        # Training checkpoints are large, and are hashed completely, in parallel to the writing.
        hashing = aside.submit(input_record, tower.source, hashed_files(tower)) if tower else None

        def sides(folder: Path) -> None:
            copy_files((f for f in checkpoint.side_files if f.name not in REWRITTEN), folder)
            _update_generation(folder / GENERATION, plan)
            write_processor(folder)
            rewrite_for_older_releases(folder)
            write_trainings(folder, [*_inherited(plan, checkpoint), *trainings])
            tell_left_behind(checkpoint)

        def texts(written: Written) -> Mapping[str, str]:
            made_of = hashing.result() if hashing else None
            spec = tower.spec if tower else None
            record = record_of(plan, checkpoint, made_of, spec, written.files, written.hashes)
            card = model_card(plan, record)
            return records(record, card) if records else {PROVENANCE: record.dump(), CARD: card}

        config = (json.dumps(with_rope_theta(without_local(plan.config)), indent=2) + "\n").encode()
        return write_checkpoint(
            out, config=config, weights=weights, sides=sides, records=texts, force=force, inputs=given
        )


def _inherited(plan: Plan, checkpoint: Checkpoint) -> tuple[Training, ...]:
    """Return the training data that the planned checkpoint inherits from its source and its tower."""
    before = trainings_of(checkpoint.folder)
    return (*without_tower(before), *trainings_of(plan.tower)) if plan.tower else before


def inputs(plan: Plan) -> tuple[Path, ...]:
    """Return the files and folders that a plan reads."""
    return (plan.source, *([plan.tower] if plan.tower else []), *plan.parts.values())


def bytes_linked(plan: Plan, source: Checkpoint) -> int:
    """Return the bytes of the plan that need not be written, because their source file is unchanged."""
    groups: dict[Path, list[Step]] = {}
    for step in plan.steps:
        if step.kind.in_place:
            groups.setdefault(source.header(step.sources[0]).file, []).append(step)
    return sum(sum(map(nbytes, g)) for file, g in groups.items() if untouched(file, g, source))


def hashed_files(tower: TowerHeader) -> list[Path]:
    """Return the files of a tower whose hashes are recorded: weights, and the configurations next to them."""
    folder = tower.source
    texts = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return list(dict.fromkeys([*tower.files, *texts]))


def _update_generation(file: Path, plan: Plan) -> None:
    if plan.generation:
        source = read_json(file) if file.is_file() else {}
        file.write_text(json.dumps({**source, **plan.generation}, indent=2) + "\n", encoding="utf-8")
