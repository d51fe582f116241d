"""Environments with only some of the packages, as links to the installed ones."""

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from mgll_encoder.common.extras import installed_distribution

PACKAGE = "mgll-mllm"
ROOT = Path(__file__).parents[1]


def requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """Requirements of a distribution with one of its extras."""
    found = map(Requirement, installed_distribution(distribution).requires or ())
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]


def closure(*extras: str) -> set[str]:
    """Names of the installed distributions that the core and some extras need, directly or not."""
    found: set[str] = set()
    todo = [(PACKAGE, extra) for extra in ("", *extras)]
    done = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        if name != PACKAGE:
            found.add(name)
        for one in requirements(name, extra):
            other = re.sub(r"[-_.]+", "-", one.name).lower()
            try:
                metadata.version(other)
            except metadata.PackageNotFoundError:
                continue  # an extra of an extra that nobody has installed
            todo += [(other, inner) for inner in ("", *one.extras)]
    return found


def environment(folder: Path, *extras: str, wheel: Path | None = None) -> Path:
    """A site-packages folder with what this package's core and some extras need, and nothing else.

    Args:
        folder: Where; must not exist.
        extras: Names of extras.
        wheel: This package itself, to be installed there; without it only its metadata is.
    """
    folder.mkdir()
    for name in closure(*extras):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (link := folder / top).exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    if wheel:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    else:
        own = installed_distribution(PACKAGE)
        installed(folder, PACKAGE, own.version, own.read_text("METADATA") or "")
    return folder


def installed(folder: Path, name: str, version: str, text: str = "") -> None:
    """Make a distribution look as if it were installed in a folder on the path, with other code."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    text = text or f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (place / "METADATA").write_text(text, encoding="utf-8")


def python(
    site: Path, *arguments: object, cwd: Path | None = None, sources: Path | None = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run Python with one site-packages folder, this package's sources if wanted, and the standard library."""
    path = os.pathsep.join(str(folder) for folder in (site, sources) if folder)
    return subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        cwd=cwd or site,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def command(
    site: Path, entry: str, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a console command (``module:function``) in such an environment."""
    module, _, function = entry.partition(":")
    name = next(one.name for one in metadata.entry_points(group="console_scripts") if one.value == entry)
    script = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; {function}()"
    return python(site, "-c", script, *arguments, cwd=cwd)
