"""Options of all commands that compute something: device and number format."""

from typing import Annotated

import typer

from mgll_encoder.common.devices import Precision

Device = Annotated[
    str,
    typer.Option(
        "--device", help="Device to compute on: cpu, cuda, cuda:1 ...; auto uses the GPU if there is one."
    ),
]

HELP = "Number format: {auto}, float32, bfloat16 or float16."
"""Help text of ``--precision``; ``auto`` says what that word means in a command."""

Computed = Annotated[
    Precision,
    typer.Option("--precision", help=HELP.format(auto="auto (bfloat16 on a GPU, float32 elsewhere)")),
]
