"""Packages whose names are imported on first use (PEP 562): a table of names, and no other module is touched."""

from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

DISTRIBUTION = "mgll-mllm"
"""Under which pip knows this project; its three packages have one version."""


def version() -> str:
    """The version of this project by its metadata; ``0+unknown`` for sources that are not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        homes: Public name -> module that defines it, relative to the package. ``__version__`` comes by itself.
    """

    def get(name: str) -> Any:
        if name == "__version__":
            return version()
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted({"__version__", *homes})

    return get, names
