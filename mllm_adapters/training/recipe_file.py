"""Recipes as YAML files: fields of transformers' TrainingArguments, and a few of ours.

The command line (options and ``key=value``) overrides the recipe file, which overrides the defaults.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, unknown_name
from mgll_encoder.common.texts import parse_yaml, read_text
from mllm_adapters.core.stages import STAGES
from mllm_adapters.training.recipe import EvalOptions, Recipe, RunOptions, check_value

THEIR_NAMES: Mapping[str, str] = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "workers": "dataloader_num_workers",
}
"""Our field -> the equivalent field of TrainingArguments, whose name is used in recipes."""

PATHS = ("deepspeed", "eval_bench")
"""Keys that are paths; in a recipe file they are relative to its folder."""

OURS_TO_SET: Mapping[str, str] = {
    "output_dir": "it follows from `out`",
    "run_name": "it follows from `out`",
    "resume_from_checkpoint": "use `resume=True`",
    "enable_jit_checkpoint": "use save_on_signal",
    "warmup_steps": "use warmup_ratio",
    "bf16": "use precision",
    "fp16": "use precision: bfloat16 or float32",
    "feature_dtype": "use feature_precision",
    "activation_checkpointing": "use gradient_checkpointing",
    "remove_unused_columns": "the collator's columns are all used",
    "logging_nan_inf_filter": "NaN losses must not be hidden",
    "push_to_hub": "upload the finished folder instead",
    "load_best_model_at_end": "use eval_bench and eval_every",
    "eval_strategy": "use eval_bench and eval_every",
    "auto_find_batch_size": "the batch size is part of the recipe",
    "fsdp": "use deepspeed",
}
"""Fields of TrainingArguments that a recipe may not set, and what to do instead."""

NO_EFFECT = ("do_", "eval_", "hub_", "per_device_eval_", "bf16_full_", "fp16_full_", "batch_eval_", "fsdp_")
"""Prefixes of fields of TrainingArguments without effect here: the Trainer evaluates and uploads nothing."""

GROUPS = (Recipe, RunOptions, EvalOptions)


@dataclass(frozen=True)
class Resolved:
    """A recipe file, options and overrides, combined.

    Attributes:
        recipe: Settings that affect the result.
        options: Settings that do not.
        evaluation: Evaluation during training.
    """

    recipe: Recipe
    options: RunOptions
    evaluation: EvalOptions

    def as_yaml(self) -> str:
        """Return the complete settings as a recipe file."""
        values: dict[str, Any] = {}
        for group in (self.recipe, self.options, self.evaluation):
            values |= {THEIR_NAMES.get(key, key): value for key, value in asdict(group).items()}
        values |= values.pop("arguments")
        return yaml.safe_dump({key: _plain(value) for key, value in values.items()}, sort_keys=False)


@dataclass(frozen=True)
class _Given:
    value: Any
    where: str
    folder: Path


def resolve(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> Resolved:
    """Combine a recipe file with the options of the command line.

    Args:
        file: A YAML file, or None.
        overrides: ``key=value``, the value in YAML.
        flags: Our field -> value of ``--field``; None if it was not given.
        **defaults: Our field -> the command's default, which replaces the field's own.

    Raises:
        UserError: the file cannot be read; a key is unknown, not allowed in recipes, given twice, or has an
            invalid value; or adapter settings are given for a stage without adapters.
    """
    known = _known()
    given = {key: _Given(v, f"{file}: {key}", file.parent) for key, v in _read(file).items()} if file else {}
    for key, entry in given.items():
        _check_key(key, known, f"{file}")
        _no_surprises(key, entry)
    given |= _typed(overrides, flags or {}, known)
    values: dict[type, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in defaults.items():
        values[known[THEIR_NAMES.get(key, key)][0]][key] = value
    for key, entry in given.items():
        group, name, kind = known[key]
        value = check_value(kind, _prepared(key, entry), entry.where)
        if name is None:
            values[Recipe].setdefault("arguments", {})[key] = _plain(value)
        else:
            values[group][name] = value
    resolved = Resolved(
        Recipe(**values[Recipe]), RunOptions(**values[RunOptions]), EvalOptions(**values[EvalOptions])
    )
    _check_adapters(resolved.recipe, given)
    return resolved


def _typed(overrides: Iterable[str], flags: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    here = Path()
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise InvalidArgumentError(
                f"'{text}' is not an override: write key=value, such as learning_rate=1e-4"
            )
        _check_key(key, known, "the command line")
        if key in given:
            raise InvalidArgumentError(f"{key} is given twice: '{text}' and {given[key].where}")
        given[key] = _Given(parse_yaml(value, f"'{text}'"), f"{key}= on the command line", here)
    for field, value in flags.items():
        key, flag = THEIR_NAMES.get(field, field), f"`{field}`"
        if value is None:
            continue
        _check_key(key, known, flag)
        if key in given:
            raise InvalidArgumentError(
                f"{key} is given twice: as {flag} and as {key}=; leave one of them out"
            )
        given[key] = _Given(value, flag, here)
    return given


def _read(file: Path) -> dict[str, Any]:
    found = parse_yaml(read_text(file, "recipe"), f"recipe {file}")
    if not isinstance(found, dict):
        raise BadDataError(f"recipe {file} has no keys: expected lines such as 'learning_rate: 1e-3'")
    return {str(key): value for key, value in found.items()}


def _check_key(key: str, known: Mapping[str, Any], where: str) -> None:
    if key in OURS_TO_SET:
        raise InvalidArgumentError(f"{where}: {key} is not for recipes: {OURS_TO_SET[key]}")
    if key in THEIR_NAMES:
        raise BadDataError(f"{where}: unknown recipe key '{key}': did you mean '{THEIR_NAMES[key]}'?")
    if key not in known and key.startswith(NO_EFFECT):
        raise InvalidArgumentError(f"{where}: {key} has no effect in these trainings: leave it out")
    if key not in known:
        nearest = unknown_name("recipe key", key, known)
        raise BadDataError(f"{where}: {str(nearest).partition('known are')[0].strip(' :')} "
                        "(keys are those of transformers' TrainingArguments, and ours: docs/training.md)")  # fmt: skip


def _no_surprises(key: str, entry: _Given) -> None:
    if entry.value is None and key not in (*PATHS, "max_steps"):
        raise InvalidArgumentError(f"{entry.where} has no value: write one, or leave the key out")


def _prepared(key: str, entry: _Given) -> Any:
    """Convert values beyond YAML: paths are relative to the file's folder, loggers may be one or several."""
    if key in PATHS and entry.value is not None:
        return entry.folder / str(entry.value)
    if key == "report_to":
        names = [entry.value] if isinstance(entry.value, str) else entry.value
        return tuple(name for name in names if name != "none") if isinstance(names, list | tuple) else names
    return entry.value


def _check_adapters(recipe: Recipe, given: Mapping[str, _Given]) -> None:
    if not STAGES[recipe.stage].lora:
        for key in ("rank", "lora_alpha", "lora_dropout"):
            if key in given:
                raise InvalidArgumentError(
                    f"{given[key].where} has no effect: stage '{recipe.stage}' has no adapters; leave it out, or "
                    "use stage lora or lora-vision"
                )


@cache
def _known() -> dict[str, tuple[type, str | None, Any]]:
    """Return recipe key -> its dataclass, its field there (None for an additional argument), and its type."""
    from transformers import TrainingArguments

    found: dict[str, tuple[type, str | None, Any]] = {}
    for key, kind in get_type_hints(TrainingArguments).items():
        theirs = {entry.name for entry in fields(TrainingArguments)} - OURS_TO_SET.keys()
        if key in theirs and not key.startswith(NO_EFFECT):
            found[key] = (Recipe, None, kind)
    for group in GROUPS:
        kinds = get_type_hints(group, include_extras=True)
        for entry in fields(group):
            if entry.name != "arguments":
                found[THEIR_NAMES.get(entry.name, entry.name)] = (group, entry.name, kinds[entry.name])
    return found


def _plain(value: Any) -> Any:
    """Convert a value to YAML and JSON types."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value
