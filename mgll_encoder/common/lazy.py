"""Packages whose names are imported on first use (PEP 562), from a table of names; no other module is imported."""

from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

DISTRIBUTION = "mgll-mllm"
"""Name of this project on PyPI; its three packages share one version."""


def version() -> str:
    """Return this project's version from its metadata; ``0+unknown`` if it is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for a package.

    Args:
        package: Its ``__name__``.
        homes: Public name -> module that defines it, relative to the package. ``__version__`` is added.
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
