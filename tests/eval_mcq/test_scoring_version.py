"""The stored scores of a small model for this `SCORING_VERSION`. Changed scores need a new version.

After an intended change: increment `SCORING_VERSION`, then update the numbers with

    python -m tests.eval_mcq.test_scoring_version
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval_mcq.backends.fingerprint import code_version
from eval_mcq.items.schema import load_bench
from eval_mcq.runs.run import Settings, describe_run, run_bench
from eval_mcq.scoring import modes
from eval_mcq.scoring.engine import Way
from eval_mcq.scoring.modes import SCORING_VERSION
from eval_mcq.scoring.prompt import Mode
from eval_mcq.scoring.score import Scorer
from mgll_encoder.common.errors import MismatchError
from mllm_adapters import load_mllm
from tests.builders import tiny_llava
from tests.eval_mcq.helpers import identity, question, write_bench

GOLDEN = Path(__file__).with_name("golden_scoring.json")

TOLERANCE = {"probabilities": 2e-5, "letter_mass": 2e-5, "log_likelihoods": 2e-3}
"""What torch and the processor may make of the last digits; everything else is the same."""

MODES: tuple[Mode, ...] = ("letters", "options", "options-mean", "generate")
WAYS: tuple[Way, ...] = ("prefix", "tree", "plain")
FIELDS = ("id", "rotation", "chosen", "probabilities", "letter_mass", "log_likelihoods", "tokens", "reply")


def fixed_model(folder: Path) -> Path:
    """A tiny LLaVA whose weights depend only on their names, large enough that its answers differ."""
    tiny_llava(folder)
    weights = folder / "model.safetensors"
    drawn = {name: _drawn(name, value) for name, value in sorted(load_file(weights).items())}
    save_file(drawn, weights, metadata={"format": "pt"})
    return folder


def _drawn(name: str, value: torch.Tensor) -> torch.Tensor:
    # RandomState's stream is frozen, other than that of torch or of numpy's newer generators.
    normal = np.random.RandomState(crc32(name.encode())).standard_normal(tuple(value.shape))
    if value.ndim == 1:
        normal = 0.1 * normal + (1 if name.endswith("weight") else 0)
    else:
        normal = normal * 1.5 / math.sqrt(math.prod(value.shape[1:]))
    return torch.from_numpy(normal).to(value.dtype)


def fixed_bench(folder: Path) -> Path:
    """Several questions per picture, two pictures in a question, a rotated and a 16-bit one; two to four options."""
    folder.mkdir()
    y, x = np.mgrid[0:40, 0:56]
    Image.fromarray(np.stack([4 * x, 6 * y, 3 * (x + y) % 256], axis=2).astype(np.uint8)).save(
        folder / "a.png"
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(folder / "a.png").save(folder / "b.png", exif=turned)
    Image.fromarray((1200 * y + 60 * x).astype(np.uint16)).save(folder / "c.png")
    options = ["drusen", "a cataract", "nothing at all", "diabetic retinopathy"]
    pictures = [["a.png"], ["a.png"], ["b.png"], ["c.png"], ["a.png", "c.png"]]
    questions = [
        question(
            f"q{i}", options=options[: 2 + i % 3], answer=i % 2, question="What is seen" + " here" * i + "?"
        )
        | {"images": images}
        for i, images in enumerate(pictures)
    ]
    return write_bench(folder / "bench.jsonl", questions)


def numbers(model: Path, bench: Path, out: Path, mode: Mode, way: Way) -> list[dict[str, Any]]:
    """The rows of a run, without what identifies it."""
    asked = load_bench(bench)
    scorer = Scorer(*load_mllm(model, dtype=torch.float32), mode=mode, way=way)
    record = describe_run(identity(model), asked, mode, 3)
    run = run_bench(asked, lambda: scorer, record, out, Settings(batch_size=8))
    return [{f: row for f, row in json.loads(row.line()).items() if f in FIELDS} for row in run.rows]


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Describe the differences between two runs."""
    return [
        f"{row['id']} rotation {row['rotation']} {field}: {row.get(field)}, was {before.get(field)}"
        for row, before in zip(found, expected, strict=True)
        for field in FIELDS
        if not _same(row.get(field), before.get(field), TOLERANCE.get(field, 0))
    ]


def _same(found: Any, expected: Any, tolerance: float) -> bool:
    return found == (pytest.approx(expected, abs=tolerance, rel=0) if tolerance and expected else expected)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return fixed_model(folder / "model"), fixed_bench(folder / "bench")


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Any]:
    return json.loads(GOLDEN.read_text())


def test_the_stored_numbers_are_those_of_this_version(golden):
    assert golden["version"] == SCORING_VERSION, f"update them: python -m {__name__}"
    assert code_version().startswith(f"{SCORING_VERSION}, pictures-")


@pytest.mark.parametrize(
    ("mode", "way"), [*((mode, "auto") for mode in MODES), *(("letters", way) for way in WAYS)]
)
def test_this_version_gives_the_numbers_that_it_stands_for(made, golden, tmp_path, mode, way):
    found = differences(numbers(*made, tmp_path / "run", mode, way), golden["rows"][mode])
    assert not found, f"other numbers under the same SCORING_VERSION, see {__name__}: {found[:3]}"


@pytest.mark.parametrize("change", ["softmax", "pixels", "template", "order"])
def test_a_small_change_of_the_numbers_is_noticed(made, golden, tmp_path, monkeypatch, change):
    import eval_mcq.runs.run as running
    import eval_mcq.scoring.prompt as prompts

    if change == "softmax":
        letters = modes.LIKELIHOODS["letters"]
        cooler = lambda ask, found: letters.score(ask, [[values * 1.01 for values in of] for of in found])  # noqa: E731
        monkeypatch.setitem(modes.LIKELIHOODS, "letters", modes.Likelihood(letters.continuations, cooler))
    elif change == "pixels":
        read = running.open_image
        monkeypatch.setattr(running, "open_image", lambda path: read(path).point(lambda value: value * 0.99))
    elif change == "template":
        other = prompts.Prompt("letters-1", "{letter}) {text}", prompts.INSTRUCTION)
        monkeypatch.setitem(prompts.PROMPTS, "letters", other)
    else:
        monkeypatch.setattr("eval_mcq.scoring.modes.LETTERS", "BACDEFGHIJKLMNOPQRSTUVWXYZ")
    assert differences(numbers(*made, tmp_path / "run", "letters", "auto"), golden["rows"]["letters"])


def test_an_unfinished_run_of_another_scoring_version_is_not_continued(made, tmp_path):
    model, bench = made
    asked = load_bench(bench)
    record = describe_run(identity(model), asked)
    old = record.model_copy(update={"code": record.code.replace(SCORING_VERSION, "scoring-0")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(old.model_dump_json())
    with pytest.raises(MismatchError, match=r"different scoring version \(.*`force=True`"):
        run_bench(asked, lambda: pytest.fail("not to be loaded"), record, tmp_path / "run")


def write() -> None:
    """Store the numbers of a new version."""
    if GOLDEN.is_file() and json.loads(GOLDEN.read_text())["version"] == SCORING_VERSION:
        sys.exit(
            f"{GOLDEN.name} has the numbers of {SCORING_VERSION} already: raise it in eval_mcq/scoring/modes.py first"
        )
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model, bench = fixed_model(folder / "model"), fixed_bench(folder / "bench")
        rows = {mode: numbers(model, bench, folder / mode, mode, "auto") for mode in MODES}
    lines = [
        f'  "{mode}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in of) + "\n  ]"
        for mode, of in rows.items()
    ]
    GOLDEN.write_text(
        f'{{\n "version": "{SCORING_VERSION}",\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
