"""One folder per family, what they share, and their conversation formats."""

from importlib.resources import files


def read_template(name: str) -> str:
    """A chat template of the folder ``templates``."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")
