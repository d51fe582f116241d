"""Old names of options, which commands still accept: each run that uses some says so in one line on stderr."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from mgll_encoder.common.errors import InvalidArgumentError

_TABLE = {"--data": "--labels", "--benchmark": "--dataset"}
_TEST = {"--test-data": "--test-labels", "--test": "--test-share"}
_SPLIT = {"--test": "--test-share", "--val": "--val-share", "--seed": "--split-seed"}
_RATE = {"--lr": "--learning-rate"}

OLD_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "mgll-encoder pretrain": {
        "--data": "--manifest", "--preset": "--tower-size", "--tower-lr": "--tower-learning-rate", **_RATE,
    },
    "mgll-encoder probe": {
        "--mode": "--protocol", "--validation": "--val-share", **_TABLE, **_TEST, **_RATE,
    },
    "mgll-encoder zero-shot": {**_TABLE, **_TEST},
    "mgll-encoder retrieval": {"--data": "--manifest"},
    "mgll-encoder explain": {"--label": "--target", "--seed": "--split-seed", **_TABLE},
    "mgll-encoder data fundus": {"--layout": "--dataset", **_SPLIT},
    "mgll-encoder data xray": _SPLIT,
    "mgll-encoder data phantom": {"--size": "--image-size"},
    "swap-encoder": {"--align-device": "--device", "--delta": "--delta-only", "--dtype": "--precision"},
    "swap-encoder verify": {"--source": "--mllm"},
    "swap-encoder restore": {"--original": "--mllm"},
    "retrain-projector": {"--feature-dtype": "--feature-precision"},
    "finetune-lora": {"--feature-dtype": "--feature-precision"},
    "eval-mcq build": {"--layout": "--dataset"},
    "eval-mcq run": {"--dtype": "--precision"},
    "eval-mcq check": {"MODEL": "--model", "--dtype": "--precision", "--questions": "--limit"},
    "eval-mcq table": {"--layout": "--table-layout"},
    "eval-mcq compare": {"--layout": "--table-layout", "--control": "--control-arm"},
    "eval-mcq report": {
        "--html": "--out", "--control": "--control-arm", "--thumbnail": "--thumbnail-size",
        "--images": "--thumbnails", "--no-images": "--no-thumbnails",
    },
}  # fmt: skip
"""Command -> old name -> new name. A name without dashes is a positional argument that has become an option."""

OLD_VALUES: Mapping[str, Mapping[str, str]] = {
    "--precision": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}
"""Option -> old value -> new value."""


def accept_old_options(command: Any, path: str, say: Callable[[str], None]) -> None:
    """Make a command, and the commands below it, accept the old names of their options.

    Args:
        command: Command as built by Typer.
        path: Its name in `OLD_OPTIONS`, such as ``eval-mcq``.
        say: Prints a warning.
    """
    for name, below in getattr(command, "commands", {}).items():
        accept_old_options(below, f"{path} {name}", say)
    renamed = OLD_OPTIONS.get(path, {})
    if not renamed and not any(_option(command, option) for option in OLD_VALUES):
        return
    command.old_options = renamed
    make_parser = command.make_parser

    def with_old_options(context: Any) -> Any:
        parser = make_parser(context)
        for old, new in renamed.items():
            _add(parser, command, old, new)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            values, rest, order = parse(args)
            used = [*_move(values, command, renamed), *_spell_values(values, command)]
            if used and os.environ.get("RANK", "0") == "0" and not context.resilient_parsing:
                say(f"old spelling, accepted until the next release: {', '.join(used)}")
            return values, rest, order

        parser.parse_args = parse_args
        return parser

    command.make_parser = with_old_options


def _option(command: Any, name: str) -> Any:
    """Return the parameter of a command that has this option."""
    return next((one for one in command.params if name in (*one.opts, *one.secondary_opts)), None)


def _add(parser: Any, command: Any, old: str, new: str) -> None:
    """Read an old option as its own value, so that both spellings in one command line can be told apart."""
    parameter = _option(command, new)
    if not old.startswith("--"):
        parser.add_argument(parameter, dest=old)
        return
    action, constant = "append" if parameter.multiple else "store", None
    if parameter.is_flag:
        action, constant = "store_const", new not in parameter.secondary_opts
    parser.add_option(parameter, [old], dest=old, action=action, const=constant)


def _move(values: dict[str, Any], command: Any, renamed: Mapping[str, str]) -> list[str]:
    """Move the values of old options to the new ones, and say which were used."""
    used = []
    for old, new in renamed.items():
        if (value := values.pop(old, None)) is None:
            continue
        name = _option(command, new).name
        if name in values:
            raise InvalidArgumentError(f"{old} is the old name of {new}: give {new} only")
        values[name] = value
        used.append(f"{old} is {new} now")
    return used


def _spell_values(values: dict[str, Any], command: Any) -> list[str]:
    """Replace old values by new ones, and say which were given."""
    used = []
    for option, words in OLD_VALUES.items():
        parameter = _option(command, option)
        old = values.get(parameter.name, "") if parameter is not None else ""
        if old in words:
            values[parameter.name] = words[old]
            used.append(f"{option} {old} is {words[old]} now")
    return used
