"""The families, by name, and the detection of a checkpoint's family."""

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from mgll_encoder.common.errors import (
    InvalidArgumentError,
    UnsupportedCheckpointError,
    UserError,
    unknown_name,
)
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.foreign import other_format, refuse_adapter
from mgll_encoder.weights.weight_file import open_weights
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.locate import check_checkpoint
from mllm_adapters.checkpoints.quantized import refuse_quantized, refuse_quantized_files
from mllm_adapters.core.contract import FAMILY_KEY, Family
from mllm_adapters.core.family_table import FAMILIES
from mllm_adapters.core.not_read import not_read

LOADED_BY = ("AutoModelForImageTextToText", "AutoProcessor")
"""Commands that merge an adapter into its base."""

LOOSE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

_DESCRIBED: Mapping[str, Callable[[Any], bool]] = {
    "model_type": lambda value: isinstance(value, str),
    "architectures": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
"""The fields that identify families, and whether a value is valid for them."""

LooseMatches = dict[str, tuple[Path, ...]]
"""Family -> its weight files in a folder without config.json."""


def family(name: str) -> Family:
    """Return the family of this name.

    Raises:
        UserError: there is none; the message suggests the nearest.
    """
    if name not in FAMILIES:
        raise unknown_name("family", name, FAMILIES)
    module, attribute = FAMILIES[name].split(":")
    return cast(Family, getattr(import_module(module), attribute))


def families() -> Iterator[Family]:
    """Yield all families, in the order of the table."""
    return map(family, FAMILIES)


def detect(config: Mapping[str, Any], where: str) -> tuple[Family, str]:
    """Detect family and layout from a config.json.

    Args:
        config: Contents of config.json.
        where: Name of the checkpoint in error messages.

    Raises:
        UserError: no family recognizes it, or its weights are quantized; known models come with an
            alternative.
    """
    for name, fits in _DESCRIBED.items():
        if config.get(name) is not None and not fits(config[name]):
            raise UnsupportedCheckpointError(
                f"{where}: field '{name}' is {config[name]!r:.80}: expected class names as text"
            )
    described = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    if row := not_read(config):
        raise UnsupportedCheckpointError(f"{where} ({described}): {row.explain(config)}")
    refuse_quantized(config, where, to_load=True)
    found = _recognized(config)
    if found is not None:
        return found
    raise UnsupportedCheckpointError(
        f"{where}: no known family has {described}: supported are {', '.join(FAMILIES)}"
    )


def open_checkpoint(folder: Path, given: Mapping[str, Path] | None = None) -> tuple[Checkpoint, Family, str]:
    """Open a checkpoint and detect its family and layout.

    Args:
        folder: The checkpoint's folder, or one that contains it and its parts.
        given: Paths of its parts, name -> path.

    Raises:
        UserError: there is no checkpoint, one of an unknown family, or several; or the family has no such
            part.
    """
    inner, matches, config = _inner_folder(folder)
    if not matches:
        found, layout = detect(config, f"{inner}/config.json")
        refuse_quantized_files(inner)
        if not _reads_adapters(found, layout):
            refuse_adapter(inner, *LOADED_BY)
        loose: tuple[Path, ...] = ()
    else:
        found, layout, loose = _loose(inner, matches)
    for part in given or {}:
        if not found.spec.parts:
            raise InvalidArgumentError(
                f"`parts['{part}']`: a checkpoint of {found.spec.title} has no parts outside its folder"
            )
        if part not in found.spec.parts:
            raise unknown_name(f"`parts` for {found.spec.title}", part, found.spec.parts)
    return Checkpoint(inner, found.spec.extra_weights, given=given, loose=loose, config=config), found, layout


def family_of(folder: Path) -> str | None:
    """Return the name of the family that a folder's config.json belongs to; None if no family reads it.

    Args:
        folder: A checkpoint folder with a config.json.

    Raises:
        UserError: config.json cannot be read.
    """
    config = read_json(folder / "config.json")
    found = None if not_read(config) else _recognized(config)
    return found[0].spec.name if found else None


def family_of_model(model: Any) -> Family:
    """Return the family of a loaded model, from its configuration.

    Raises:
        UserError: no family recognizes it.
    """
    return detect(model.config.to_dict(), type(model).__name__)[0]


def _recognized(config: Mapping[str, Any]) -> tuple[Family, str] | None:
    if not config:  # means loose weights, see `Family.layout`
        return None
    if not all(config.get(name) is None or fits(config[name]) for name, fits in _DESCRIBED.items()):
        return None
    if config.get(FAMILY_KEY) in FAMILIES:
        marked = family(config[FAMILY_KEY])
        layout = marked.layout(config)
        if layout is not None:
            return marked, layout
    for candidate in families():
        layout = candidate.layout(config)
        if layout is not None:
            return candidate, layout
    return None


def _reads_adapters(found: Family, layout: str) -> bool:
    """Whether the family itself merges LoRA adapters (or says why not) in checkpoints of this layout."""
    return layout == "original" and any(f.startswith("adapter_model") for f in found.spec.extra_weights)


def _inner_folder(folder: Path) -> tuple[Path, LooseMatches, dict[str, Any]]:
    """Return the checkpoint folder itself, or the only checkpoint of a known family in it.

    Also return the families whose loose weights it contains, or the contents of its config.json; the other
    is empty.
    """
    check_checkpoint(folder)
    if (folder / "config.json").is_file():
        return folder, {}, read_json(folder / "config.json")
    if matches := _loose_matches(folder):
        return folder, matches, {}
    configs = {file: read_json(file) for file in sorted(folder.glob("*/config.json"))}
    inner: list[tuple[Path, LooseMatches, dict[str, Any]]]
    inner = [(file.parent, {}, config) for file, config in configs.items() if _recognized(config)]
    inner = inner or [(place, matches, {}) for place, matches in _with_loose(folder)]
    if len(inner) == 1:
        return inner[0]
    if inner:
        names = ", ".join(path.name for path, *_ in inner)
        raise UnsupportedCheckpointError(
            f"{folder} contains {len(inner)} checkpoints ({names}): pass the folder of one of them"
        )
    refuse_adapter(folder, *LOADED_BY)
    if len(configs) == 1:
        ((file, config),) = configs.items()
        detect(config, str(file))
    if configs:
        names = ", ".join(config.parent.name for config in configs)
        raise UnsupportedCheckpointError(
            f"{folder} contains no config.json and no weights of a known family, nor does a folder in it "
            f"({names}): complete the download, or pass the checkpoint's own folder"
        )
    other = other_format(folder)
    raise UnsupportedCheckpointError(
        f"{folder} is not a checkpoint folder: {f'{other}; ' if other else ''}expected a folder with a config.json"
    )


def _loose(folder: Path, matches: LooseMatches) -> tuple[Family, str, tuple[Path, ...]]:
    (name, files), *more = matches.items()
    if more:
        raise UnsupportedCheckpointError(
            f"{folder} contains weights of both {name} and {more[0][0]}: keep each in a separate folder"
        )
    layout = family(name).layout({})
    assert layout is not None, "a family with loose weights has a layout for them"
    return family(name), layout, files


def _loose_matches(folder: Path) -> LooseMatches:
    """Return the families whose weight files are in a folder without config.json, with those files."""
    names = {f: list(open_weights(f).headers) for f in sorted(folder.iterdir()) if _may_be_loose(f)}
    matches: LooseMatches = {}
    for candidate in families():
        patterns = candidate.spec.bare_weights
        if patterns and any(re.match(patterns[0], key) for keys in names.values() for key in keys):
            whole = re.compile("|".join(patterns))
            matches[candidate.spec.name] = tuple(
                f for f, keys in names.items() if any(map(whole.match, keys))
            )
    return matches


def _with_loose(folder: Path) -> list[tuple[Path, LooseMatches]]:
    """Return the subfolders with weight files of a family, without unreadable ones."""
    found = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            if not (inner / "config.json").is_file() and (matches := _loose_matches(inner)):
                found.append((inner, matches))
        except UserError:
            continue
    return found


def _may_be_loose(file: Path) -> bool:
    return file.is_file() and file.suffix in LOOSE_SUFFIXES
