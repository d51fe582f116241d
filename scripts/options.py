"""Write docs/options.md: every option of every command, from the commands themselves.

python scripts/options.py
"""

from pathlib import Path
from typing import Annotated

import typer

from eval_mcq.cli.umbrella import PROGRAMS, command_of
from mgll_encoder.common import cli
from mgll_encoder.common.files import write_text
from mgll_encoder.common.old_options import OLD_OPTIONS, OLD_VALUES
from mgll_encoder.common.option_table import OptionRow, option_markdown, option_rows, renamed_markdown

app = cli.new_app("Write docs/options.md: every option of every command, from the commands themselves.")

PAGE = Path(__file__).parents[1] / "docs" / "options.md"

TEXT = """# Options

Every option of every command. A word means the same everywhere: `--labels` is a label table, `--manifest` a manifest
of images and texts, `--data` rows to train on, `--bench` a benchmark; `--encoder` is a tower, `--mllm` the model that a
swap starts from, `--model` one that is trained or asked. `--seed` draws, `--split-seed` splits the patients, with
`--test-share` and `--val-share`. `--device` and `--precision` say where and in which number format to compute.

Every command also has `--help`, `--version`, `--install-completion` and `--show-completion` (bash, fish, and zsh, whose
first TAB only loads the completion). `mgll` is all five under one name: {umbrella}.

`python scripts/options.py` writes this page; a test compares it with the commands.

## All options

{table}
## Old names

They are accepted until the next release, and each run that uses some says so. `--precision` also reads {values}.

{renamed}"""


def all_rows() -> list[OptionRow]:
    """Return the options of all programs."""
    return [row for program in PROGRAMS.values() for row in option_rows(command_of(program), program.name)]


def page() -> str:
    """Return the page."""
    return TEXT.format(
        umbrella=", ".join(f"`mgll {word}` is `{program.name}`" for word, program in PROGRAMS.items()),
        table=option_markdown(all_rows()),
        renamed=renamed_markdown(OLD_OPTIONS),
        values=", ".join(f"`{old}` as `{new}`" for old, new in OLD_VALUES["--precision"].items()),
    )


@app.command()
def options(out: Annotated[Path, typer.Option(help="The page to write.")] = PAGE) -> None:
    """Write docs/options.md: every option of every command, from the commands themselves.

    Example: python scripts/options.py
    """
    write_text(out, page(), force=True)
    cli.say(f"Written: {out}")


if __name__ == "__main__":
    cli.run(app)
