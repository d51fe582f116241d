"""One folder per family, shared modules, and conversation formats."""

from importlib.resources import files


def read_template(name: str) -> str:
    """Read a chat template of the folder ``templates``."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")
