"""``swap-encoder export``: write a result for llama.cpp and Ollama."""

from pathlib import Path
from typing import Annotated

import typer

from mgll_encoder.common import cli
from mgll_encoder.common.extras import needs
from mllm_adapters import api
from mllm_adapters.cli.common_options import FORCE_HELP


@needs("gguf")
def export(
    model: Annotated[str, typer.Argument(help="LLaVA in the transformers layout: folder or hub id.")],
    out: Annotated[
        Path, typer.Option("--gguf", metavar="DIR", help="Folder for the GGUF files and the Modelfile.")
    ],
    precision: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    converter: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's convert_hf_to_gguf.py, to write the language model. Default: write it here."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Export a LLaVA-shaped model for llama.cpp and Ollama, as GGUF files.

    Write the language model with its tokenizer, the vision tower with the projector, a Modelfile, and a README that
    says what llama.cpp does otherwise.

    Example: swap-encoder export llava-med-mgll --gguf llava-med-mgll-gguf
    """
    from rich.filesize import decimal

    from mllm_adapters.swap.writer import check_output

    plan = api.plan_gguf(model, precision=precision, converter=converter)
    check_output(out, force, [plan.source.checkpoint.folder])
    for name, size in plan.sizes.items():
        cli.say(f"{name}: {decimal(size)} ({precision})")
    for note in plan.notes:
        cli.warn(note)
    if dry_run:
        return
    plan.write(out, force=force)
    cli.say(f"Written: {out}")
    written = (out / "model.gguf", out / "mmproj.gguf")
    cli.say(cli.next_line("llama-server --model {} --mmproj {}", *written))
