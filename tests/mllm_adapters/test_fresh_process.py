"""A user's first process knows nothing of our classes: a checkpoint brings along what it needs."""

import subprocess
import sys
from pathlib import Path

from tests.mllm_adapters import complete

PROGRAM = """
import sys
from pathlib import Path
from mllm_adapters import load_mllm
for folder in map(Path, sys.argv[1:]):
    model, processor = load_mllm(folder)
    print(type(model).__name__, type(processor).__name__)
"""

FOUND = {
    "instructblip": "InstructBlipForConditionalGeneration MgllInstructBlipProcessor",  # a native model
    "janus-pro": "JanusForConditionalGeneration",
    "med-flamingo": "FlamingoForConditionalGeneration FlamingoProcessor",
    "qwen-vl": "QwenVLForConditionalGeneration QwenVLProcessor",
}


def test_converted_checkpoints_load_with_their_processors(golden: Path, tmp_path: Path) -> None:
    for name in FOUND:
        (tmp_path / name).mkdir()
    folders = [complete.steady(name, tmp_path / name, lambda: golden) for name in FOUND]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == len(FOUND), done.stdout
    for line, expected in zip(found, FOUND.values(), strict=True):
        assert line.startswith(expected)
        assert line.endswith("Processor")
