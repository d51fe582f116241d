"""``mgll-encoder inspect`` and ``convert``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgll_encoder.common.cli import next_line, note, say, spelled, stdout, warn
from mgll_encoder.common.files import check_free
from mgll_encoder.common.terminal_table import TerminalTable
from mgll_encoder.weights.locate import check_tower

if TYPE_CHECKING:
    from mgll_encoder.tower.header import TowerHeader

_SIZES = (224, 336, 448)
_POOLED = {
    "class": "class token",
    "mean": "mean of the patch tokens",
    "mean_norm": "LayerNorm of the mean of the patch tokens",
    "attention": "pooling head",
}

_NEXT = {
    "vision": "swap-encoder --mllm llava-med --encoder {}",
    "clip": "mgll-encoder zero-shot --data labels.csv --images images --encoder {}",
    "open-clip": "mgll-encoder zero-shot --data labels.csv --images images --encoder {}",
}

PathArgument = Annotated[
    Path,
    typer.Argument(
        help="MGLL training checkpoint, open_clip or OpenAI state dict (.pt, .bin, .safetensors), "
        "a transformers folder, a folder of this project, or a hub id such as openai/clip-vit-large-patch14."
    ),
]
ActivationOption = Annotated[
    str | None,
    typer.Option(
        help="'gelu' or 'quick_gelu', for files that do not store it. It cannot be detected from the weights; the "
        "wrong one raises no error, but features are about 1 % off."
    ),
]


ImageSizeOption = Annotated[
    int | None,
    typer.Option(help="Input size in pixels of the tower; its position table is resampled to it."),
]
PoolingOption = Annotated[
    str | None,
    typer.Option(
        help="Image features: 'class' (class token) or 'mean' (mean of the patch tokens; not for a CLIP)."
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="'raw' or 'ema', for training checkpoints that also contain a moving average of the weights."
    ),
]


def inspect(
    path: PathArgument,
    activation: ActivationOption = None,
    weights: WeightsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Describe a tower, without reading its weights.

    Example: mgll-encoder inspect mgll-fundus.pt
    """
    check_tower(path)
    from mgll_encoder.tower.load import inspect_tower

    header = inspect_tower(path, **_choices(activation, weights))
    facts = _facts(header)
    if as_json:
        stdout.print_json(json.dumps(facts))
    else:
        _print_table(path, header.architecture.title, facts)
    for message in header.warnings:
        warn(message)


def convert(
    path: PathArgument,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="'vision': the image tower, for transformers and all commands here. 'clip': with its text tower, as a "
            "CLIPModel, for the stock zero-shot pipeline. 'open-clip': the same for open_clip's local-dir."
        ),
    ] = "vision",
    activation: ActivationOption = None,
    weights: WeightsOption = None,
    image_size: ImageSizeOption = None,
    pooling: PoolingOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
) -> None:
    """Write a tower as a folder that transformers or open_clip can read, alone or with its text tower.

    Example: mgll-encoder convert mgll-fundus.pt --out mgll-fundus
    """
    check_free(out, force)
    check_tower(path)
    from mgll_encoder.paired.convert import convert_tower

    note(f"Reading {path} ...")
    fitted: dict[str, Any] = {"image_size": image_size, "pooling": pooling}
    done = convert_tower(path, out, to=to, **_choices(activation, weights), **fitted, force=force)
    for message in done.warnings:
        warn(message)
    for line in (f"wrote {out}", next_line(_NEXT[to], out)):
        say(line)


def _choices(activation: str | None, weights: str | None) -> dict[str, Any]:
    """Return the options as keyword arguments; the functions check them."""
    return {"activation": activation, "weights": weights}


def _facts(header: "TowerHeader") -> dict[str, Any]:
    spec = header.spec
    return {
        "layout": header.layout + (f", {header.weights} weights" if header.weights else ""),
        "architecture": spec.architecture,
        **spec.model_dump(),
        "registers": spec.registers,
        "pooling": spec.pooling,
        "activation_source": header.activation_source,
        "preprocessing_source": header.preprocessing_source,
        "patch_tokens": {size: (size // spec.patch_size) ** 2 for size in sorted({spec.image_size, *_SIZES})},
        "parameters": header.parameters,
        "dtypes": list(header.dtypes),
        "dropped": header.dropped,
        "files": [str(file) for file in header.files],
        "warnings": [spelled(warning) for warning in header.warnings],
    }


def _print_table(path: Path, title: str, facts: dict[str, Any]) -> None:
    tokens = ", ".join(f"{count} at {size} px" for size, count in facts["patch_tokens"].items())
    dropped = ", ".join(f"{count} {group}" for group, count in facts["dropped"].items())
    size = (
        f"width {facts['width']}, {facts['depth']} blocks, {facts['heads']} heads, MLP {facts['mlp_width']}"
    )
    rows = {
        "layout": facts["layout"],
        "architecture": title + (f", {facts['registers']} register tokens" if facts["registers"] else ""),
        "geometry": size,
        "input": f"{facts['image_size']} px in patches of {facts['patch_size']}",
        "patch tokens": tokens,
        "image features": _POOLED[facts["pooling"]],
        "projection": f"to {facts['projection_dim']}" if facts["projection_dim"] else "none",
        "activation": f"{facts['activation']} ({facts['activation_source']})",
        "resize": f"{facts['resize']} ({facts['preprocessing_source']})",
        "mean": " ".join(f"{value:.6g}" for value in facts["mean"]),
        "std": " ".join(f"{value:.6g}" for value in facts["std"]),
        "parameters": f"{facts['parameters']:,} ({', '.join(facts['dtypes'])})",
        "dropped": f"{dropped} tensors" if dropped else "nothing",
    }
    table = TerminalTable(str(path), show_header=False).add_words("", "")
    for name, value in rows.items():
        table.add_row(name, value)
    stdout.print(table)
