"""Results in the formats of other programs: GGUF files for llama.cpp and Ollama."""

from importlib.resources import files


def read_template(name: str) -> str:
    """Return a template of this package."""
    return files(__name__).joinpath(name).read_text("utf-8")
