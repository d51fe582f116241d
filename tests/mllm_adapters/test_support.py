"""The support matrix says what plans of full-size checkpoints say, and docs/families.md and the README repeat it.

``python -m tests.mllm_adapters.test_support`` writes all three anew.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import UserError
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core import support_matrix as support
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.family_table import FAMILIES
from mllm_adapters.core.registry import family, open_checkpoint
from mllm_adapters.core.support_matrix import Size, Support
from mllm_adapters.swap.report import loads_with
from tests import builders
from tests.mllm_adapters import (
    janus_files,
    test_aya_vision,
    test_instructblip_full_size,
    test_llava_full_size,
    test_med_flamingo,
    test_mini_gemini,
    test_paligemma,
    test_qwen2_vl,
)
from tests.mllm_adapters.families import internvl, qwen_vl
from tests.mllm_adapters.families.full_size import published_tower

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- python -m tests.mllm_adapters.test_support -->\n", "\n<!-- end -->"
DOCUMENTS: Mapping[Path, tuple[str, ...]] = {
    ROOT / "docs" / "families.md": support.COLUMNS,
    ROOT / "README.md": ("family", "reads", "tokens before", "after (default)", "swapped, it loads with"),
}
"""Page -> the columns that it shows."""

BF16 = "BF16"


def mini_gemini(folder: Path) -> Path:
    """MGM-7B with its towers in the shards."""
    mgm = test_mini_gemini
    shapes = mgm.vicuna_7b() | mgm.mining() | mgm.convnext_large() | mgm.clip_large()
    return builders.sparse_checkpoint(folder, dict(mgm.MGM_7B), shapes, BF16)


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL-7B."""
    config = test_qwen2_vl.PUBLISHED["qwen2_5_vl"]
    shapes = test_qwen2_vl.PUBLISHED_SHAPES["qwen2_5_vl"](config)
    return builders.sparse_checkpoint(folder, {"model_type": "qwen2_5_vl", **config}, shapes, BF16)


def janus(folder: Path) -> Path:
    """Janus-Pro-7B."""
    sizes = janus_files.PRO_7B
    builders.sparse_checkpoint(folder, janus_files.config(sizes), janus_files.shapes(sizes))
    janus_files.write_pixels(folder, 384)
    return folder


PUBLISHED: Mapping[str, Callable[[Path], Path]] = {
    "llava": lambda folder: test_llava_full_size.original(folder, test_llava_full_size.LLAMA_7B),
    "llava-med": test_llava_full_size.medical,
    "qwen-vl": lambda folder: builders.sparse_checkpoint(
        folder, qwen_vl.CHAT_CONFIG, qwen_vl.published_tensors(qwen_vl.CHAT_CONFIG), BF16
    ),
    "qwen2-vl": qwen2_5_vl,
    "internvl": lambda folder: builders.sparse_checkpoint(
        folder, internvl.INTERNVL2_5_8B.config(), internvl.INTERNVL2_5_8B.tensors(), BF16
    ),
    "mini-gemini": mini_gemini,
    "instructblip": lambda folder: test_instructblip_full_size.published_instructblip(
        folder, test_instructblip_full_size.VICUNA
    ),
    "med-flamingo": test_med_flamingo.published,
    "janus-pro": janus,
    "aya-vision": lambda folder: builders.sparse_checkpoint(
        folder, test_aya_vision.PUBLISHED, test_aya_vision.published_tensors()
    ),
    "paligemma": lambda folder: builders.sparse_checkpoint(
        folder, test_paligemma.PUBLISHED, test_paligemma.published_tensors()
    ),
}
"""Family -> writer of the headers of its published checkpoint."""


def row(name: str, folder: Path) -> Support:
    """The row of the matrix that the family's plans give."""
    spec = family(name).spec
    checkpoint, found, _ = open_checkpoint(PUBLISHED[name](folder / name))
    assert found.spec.name == name
    tower = inspect_tower(published_tower(folder / "mgll"), activation="gelu")

    def plan(size: int | None) -> Plan:
        return found.plan(checkpoint, tower, size)

    def at(size: int) -> Size | None:
        try:
            return Size(image_size=size, tokens=plan(size).after.tokens)
        except UserError:
            return None

    usual = plan(None)
    return Support(
        family=name,
        title=spec.title,
        checkpoint=spec.hub_id,
        reads=spec.reads,
        before=Size(image_size=usual.before.image_size, tokens=usual.before.tokens),
        default=Size(image_size=usual.after.image_size, tokens=usual.after.tokens),
        at_224=at(224),
        at_336=at(336),
        connectors=usual.connectors,
        loads={target: loads_with(found.plan(checkpoint, tower, None, target)) for target in spec.targets},
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrix_is_what_the_plans_of_published_checkpoints_say(name: str, tmp_path: Path) -> None:
    stored = next(found for found in support.support() if found.family == name)
    assert row(name, tmp_path) == stored


def part(columns: tuple[str, ...]) -> str:
    """What a page shows of the matrix."""
    return (
        BEGIN + support.support_markdown(builders.options_of("mllm_adapters.cli.swap").spell, columns) + END
    )


def test_every_family_has_its_row() -> None:
    assert [found.family for found in support.support()] == list(FAMILIES)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_the_documents_show_the_rows(page: Path) -> None:
    assert part(DOCUMENTS[page]) in page.read_text(encoding="utf-8")


def test_the_command_prints_it() -> None:
    shown = builders.invoke(swap_encoder, "families")
    assert shown.code == 0
    assert all(name in shown.out for name in FAMILIES)
    as_json = builders.invoke(swap_encoder, "families", "--json")
    assert [found["family"] for found in json.loads(as_json.out)] == list(FAMILIES)
    spell = builders.options_of("mllm_adapters.cli.swap").spell
    assert builders.invoke(swap_encoder, "families", "--markdown").out.strip() == support.support_markdown(
        spell
    )


def write() -> None:
    """Write the matrix and what the documents show of it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder)).model_dump(mode="json") for name in FAMILIES]
    target = ROOT / "mllm_adapters" / "core" / support.FILE
    target.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for page, columns in DOCUMENTS.items():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(before + part(columns) + after, encoding="utf-8")


if __name__ == "__main__":
    write()
