"""``mgll``: the five commands under one name. A command is imported only when it is used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from mgll_encoder.common.cli import Commands, new_app, prepared, run
from mgll_encoder.common.spelling import with_commands_below


class Program(NamedTuple):
    """A command of this project.

    Attributes:
        name: Its name as a program of its own.
        module: The module with its ``app``.
        about: The first sentence of its help text.
    """

    name: str
    module: str
    about: str


PROGRAMS: Mapping[str, Program] = {
    "encoder": Program(
        "mgll-encoder", "mgll_encoder.cli", "Read, convert, train and probe MGLL vision towers."
    ),
    "swap": Program(
        "swap-encoder", "mllm_adapters.cli.swap", "Put an MGLL vision tower into a multimodal LLM."
    ),
    "retrain": Program(
        "retrain-projector",
        "mllm_adapters.cli.retrain",
        "Retrain the projector of a multimodal LLM, with tower and language model frozen.",
    ),
    "lora": Program(
        "finetune-lora",
        "mllm_adapters.cli.lora",
        "Fine-tune a multimodal LLM: its projector, and its language model with LoRA adapters.",
    ),
    "eval": Program(
        "eval-mcq",
        "eval_mcq.cli.main",
        "Measure a multimodal LLM disease by disease: build questions from labels, run them, compare models.",
    ),
}
"""Command of ``mgll`` -> program."""


def command_of(program: Program) -> Any:
    """Import a program and return its command; its examples are as one types them below ``mgll``."""
    command = prepared(import_module(program.module).app, program.name)
    word = next(word for word, one in PROGRAMS.items() if one is program)
    for one in with_commands_below(command):
        one.help = one.help and one.help.replace(f"{program.name} ", f"mgll {word} ")
    return command


class _Group(Commands):
    """Imports the command that is used; the help text needs none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the name of the command, the command itself, and the arguments that are left."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, command_of(PROGRAMS[name]) if name else None, rest


app = new_app(
    """Put medical vision towers into multimodal LLMs, retrain them, and measure them disease by disease.

    Each command is also a program of its own: mgll-encoder, swap-encoder, retrain-projector, finetune-lora, eval-mcq.

    Example: mgll swap --mllm llava-med --encoder mgll-fundus.pt
    """,
    cls=_Group,
)


def _listed(program: Program) -> Callable[[], None]:
    """Return what stands for a program in the list of commands, before it is imported."""

    def stand_in() -> None:
        raise AssertionError(f"{program.name} was not imported")

    return stand_in


for word, listed in PROGRAMS.items():
    app.command(word, help=listed.about)(_listed(listed))


@app.callback()
def umbrella() -> None:
    """Hold the commands together: Typer needs a callback for the help text of a group."""


def main() -> None:
    """Entry point of ``mgll``."""
    run(app, "mgll")


if __name__ == "__main__":
    main()
