"""A tiny LLaVA and a tiny MGLL tower, to try an installed wheel with: ``python -m tests.tiny_example FOLDER``."""

import sys
from pathlib import Path

from tests import builders
from tests.mllm_adapters.llava_checkpoints import a_tower


def write(folder: Path) -> None:
    """Write ``llava/`` and ``tower/``."""
    builders.tiny_llava(folder / "llava")
    a_tower(folder / "tower")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
