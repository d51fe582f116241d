"""Shared by the commands that write checkpoints: help texts, and ``--part``."""

from pathlib import Path

from mgll_encoder.common.errors import InvalidArgumentError

OUT_HELP = "Folder to write."
COPY_HELP = "Copy unchanged files instead of hard-linking them (sharing blocks where the file system can)."
FORCE_HELP = "Replace the output folder if it exists."


def parts_of(options: list[str] | None) -> dict[str, Path]:
    """Parse ``--part NAME=PATH``.

    Raises:
        UserError: an option does not have this form.
    """
    parts = {}
    for option in options or []:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise InvalidArgumentError(
                f"--part {option}: expected NAME=PATH, such as --part vision-tower=openai/clip"
            )
        parts[name] = Path(path)
    return parts
