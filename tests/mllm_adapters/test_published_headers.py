"""Plans of published checkpoints from their own indexes and settings, byte for byte; headers only.

``python -m tests.mllm_adapters.test_published_headers`` prints them as a table.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest

from mgll_encoder import TowerHeader, inspect_tower
from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Family, Plan
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.swap.apply import bytes_linked
from mllm_adapters.swap.report import total_bytes
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.published import PUBLISHED, Published, header_only, index_of, names_only

MGLL_GRID = 16
"""Patches along one side at 224 px, MGLL's own size."""


class Opened(NamedTuple):
    """A header-only copy."""

    row: Published
    source: Path
    checkpoint: Checkpoint
    family: Family


def opened(row: Published, files: Path, folder: Path) -> Opened:
    checkpoint, family, _ = open_checkpoint(header_only(row, files / row.folder, folder))
    return Opened(row, files / row.folder, checkpoint, family)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> TowerHeader:
    return inspect_tower(published_tower(tmp_path_factory.mktemp("tower") / "mgll"))


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda row: row.folder)
def copy(request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(request.param, published, tmp_path_factory.mktemp("copies") / request.param.folder)


def source_bytes(checkpoint: Checkpoint) -> int:
    return sum(header.dtype.itemsize * prod(header.shape) for header in checkpoint.tensors.values())


def test_the_headers_have_as_many_bytes_as_were_published(copy: Opened) -> None:
    index = index_of(copy.source)
    size = index["metadata"]["total_size"]
    assert source_bytes(copy.checkpoint) == size or size == 0, "0 is what Cosmos-Reason2 says"
    assert len(copy.checkpoint.files) == len(set(index["weight_map"].values()))
    assert copy.family.spec.name == copy.row.family


@pytest.mark.parametrize("size", [None, 224])
def test_the_plan_has_as_many_weights_as_its_parts(
    copy: Opened, tower: TowerHeader, size: int | None
) -> None:
    """Every tensor of the index is used or left out with a reason; the target's are those that the model wants."""
    plan = copy.family.plan(copy.checkpoint, tower, size)
    grid = copy.row.grid if size is None else MGLL_GRID
    check_full_size(plan, copy.checkpoint, weights=copy.row.swapped_weights(grid))
    assert total_bytes(plan) == copy.row.itemsize * copy.row.swapped_weights(grid)
    assert plan.after.grid == grid


def test_its_image_processor_is_written(copy: Opened, tower: TowerHeader, tmp_path: Path) -> None:
    """The published processors and tokenizer settings are read; no published tokenizer is here."""
    plan = copy.family.plan(copy.checkpoint, tower)
    copy.family.processor_writer(plan)(tmp_path)
    settings = read_json(tmp_path / "preprocessor_config.json")
    assert settings["image_mean"] == pytest.approx(list(plan.after.mean))


REFUSED = {
    "Qwen--Qwen-VL-Chat-Int4": ("quantization_config says gptq", "use the unquantized checkpoint"),
    "google--medgemma-27b-it": ("MedGemma",),
    "xinlai--LISA-7B": ("LISA is not supported",),
    "MiniCPM-Llama3-V-2_5": ("MiniCPM-V is not supported",),
    "xgen-mm": ("xGen-MM (BLIP-3) is not supported",),
    "Logics-Thinking": ("Logics-Thinking is not supported",),
}
"""Published checkpoints that are not read -> what the message says of them."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, published: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError) as refusal:
        open_and_plan(names_only(published / name, tmp_path / name), tmp_path)
    message = str(refusal.value)
    assert str(tmp_path / name) in message
    assert "\n" not in message
    assert all(word in message for word in REFUSED[name]), message


def open_and_plan(source: Path, folder: Path) -> Plan:
    checkpoint, family, _ = open_checkpoint(source)
    return family.plan(checkpoint, inspect_tower(published_tower(folder / "mgll")))


def test_every_index_is_read_or_refused(published: Path) -> None:
    """No published file is forgotten here."""
    held = {file.parent.name for file in published.glob("*/*.index.json")}
    assert held == {row.folder for row in PUBLISHED} | set(REFUSED)


def test_what_is_strict_refuses_nothing_that_is_published(published: Path) -> None:
    """Two repositories have lines of another program at the end of config.json, which no reader takes for JSON."""
    files = sorted(published.glob("*/*.json"))
    assert len(files) > 100
    for file in files:
        try:
            expected = json.loads(file.read_text())
        except ValueError:
            with pytest.raises(BadDataError, match="is not JSON"):
                read_json(file)
        else:
            assert read_json(file) == expected


def table(files: Path) -> Iterator[str]:
    """A row for each plan, in Markdown; bytes in full, as in the indexes."""
    yield "| model | tensors | dtype | published | headers | swapped | at 224 px | linked |"
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as scratch:
        new = inspect_tower(published_tower(Path(scratch) / "mgll"))
        for row in PUBLISHED:
            copy = opened(row, files, Path(scratch) / row.folder)
            plans = [copy.family.plan(copy.checkpoint, new, size) for size in (None, 224)]
            figures = (
                len(copy.checkpoint.tensors), row.dtype, index_of(copy.source)["metadata"]["total_size"],
                source_bytes(copy.checkpoint), *map(total_bytes, plans), bytes_linked(plans[0], copy.checkpoint),
            )  # fmt: skip
            cells = (f"{figure:,}" if isinstance(figure, int) else figure for figure in figures)
            yield f"| {row.folder.partition('--')[2]} | {' | '.join(cells)} |"


if __name__ == "__main__":
    here = Path(__file__).parents[3] / "shared" / "published"
    for line in table(Path(os.environ.get("MGLL_PUBLISHED_DIR", here))):
        print(line)  # noqa: T201 (what the command is for)
