"""Optional dependencies: what a command needs beyond the core, and how to install it.

The packages of an extra are listed only in pyproject.toml; they are read from this package's metadata.
"""

import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec, TypeVar

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mgll_encoder.common.errors import MissingPackageError

PACKAGE = "mgll-mllm"
CORE = ""
"""Stands for the dependencies that are always installed."""
PARTNERS = ("accelerate", "peft", "bitsandbytes", "deepspeed", "gguf")
"""Packages that transformers uses at run time. The rest of its table is for its development, such as pandas < 2.3."""

P = ParamSpec("P")
R = TypeVar("R")


def needs(extra: str, *packages: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a command that needs an extra, or `CORE`: it runs only after `require` has passed."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @wraps(command)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            require(extra, "this command", *packages)
            return command(*args, **kwargs)

        return checked

    return decorate


def require(extra: str, purpose: str, *packages: str) -> None:
    """Check that the packages of an extra and of the core are installed and compatible, without importing them.

    Args:
        extra: Name of the extra, or `CORE`.
        purpose: What needs it, for the error message: an option, a file, "this command".
        packages: The packages of the extra that are needed; all if not given.

    Raises:
        UserError: a package is missing, or two of them are incompatible according to their metadata or the tables in
            transformers. The message contains the pip command that fixes it.
    """
    core = _requirements(CORE)
    part = {name: one for name, one in _requirements(extra).items() if not packages or name in packages}
    wanted = core | part
    versions = {name: found for name in wanted if (found := _version(name)) is not None}
    install = f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install {PACKAGE}"
    if missing := [name for name in wanted if name not in versions]:
        raise MissingPackageError(f"{purpose} needs {', '.join(missing)}, not installed here: {install}")
    for name in versions:
        for demand in _demands(name, versions):
            other = canonicalize_name(demand.name)
            if _fits(demand, versions[other]):
                continue
            ours_help = not all(_fits(wanted[one], versions[one]) for one in (name, other))
            raise MissingPackageError(
                f"{name} {versions[name]} needs {demand.name}{demand.specifier}, but {versions[other]} is installed: "
                + (install if ours_help else f"pip install '{demand.name}{demand.specifier}'")
            )


def _requirements(extra: str) -> dict[str, Requirement]:
    """Return the requirements of the core and an extra, by normalized name; empty if this package is not installed."""
    found: dict[str, Requirement] = {}
    for requirement in _declared(PACKAGE):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if (name := canonicalize_name(requirement.name)) == PACKAGE:
            for inner in requirement.extras:
                found |= _requirements(inner)
        else:
            found[name] = requirement
    return found


def _demands(distribution: str, versions: Mapping[str, str]) -> Iterator[Requirement]:
    """Yield an installed distribution's requirements on others in ``versions``, and transformers' optional ones."""
    for requirement in _declared(distribution, versions):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement
    if distribution == "transformers":
        yield from (partner for partner in _partners_of_transformers() if partner.name in versions)


def _declared(distribution: str, among: Mapping[str, str] | None = None) -> Iterator[Requirement]:
    try:
        lines = installed_distribution(distribution).requires or ()
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        if among is None or (name and canonicalize_name(name[0]) in among):
            yield Requirement(line)


def installed_distribution(name: str) -> metadata.Distribution:
    """Return an installed distribution, not an egg-info that an older setuptools left in the working folder."""
    found = list(metadata.distributions(name=name))
    if not found:
        raise metadata.PackageNotFoundError(name)
    return max(found, key=lambda one: one.read_text("METADATA") is not None)


def _partners_of_transformers() -> Iterator[Requirement]:
    """Yield the minimum versions of packages that transformers uses but does not install.

    They are in a table, and for quantizers in constants; both are read without importing transformers.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    table, constants = folder / "dependency_versions_table.py", folder / "utils" / "import_utils.py"
    lines = list(runpy.run_path(str(table))["deps"].values()) if table.is_file() else []
    if constants.is_file():
        found = re.findall(r'^(\w+)_MIN_VERSION = "([\d.]+)"$', constants.read_text("utf-8"), re.MULTILINE)
        lines += [f"{name.lower()}>={version}" for name, version in found]
    yield from (one for one in map(Requirement, lines) if one.name in PARTNERS)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)
