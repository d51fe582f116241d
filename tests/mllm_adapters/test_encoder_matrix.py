"""The matrix of vision encoders: architectures, their files, and the multimodal models that can have them.

``python -m tests.mllm_adapters.test_encoder_matrix`` writes it into docs/encoders.md.
"""

from pathlib import Path

from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.architectures.base import Architecture
from mllm_adapters.core.registry import families

DOCUMENT = Path(__file__).parents[2] / "docs" / "encoders.md"
BEGIN, END = "<!-- python -m tests.mllm_adapters.test_encoder_matrix -->\n", "\n<!-- end -->"
COLUMNS = (
    "encoder",
    "for example",
    "files that are read",
    "class in transformers",
    "image features (`--pooling`)",
    "hosts",
)


def hosts(architecture: Architecture) -> str:
    """Return the families that can have such a tower."""
    if architecture.not_in_hosts:
        return f"none: {architecture.not_in_hosts}"
    specs = [family.spec for family in families()]
    own = [spec.name for spec in specs if architecture.name in spec.encoders]
    if len(own) == len(specs):
        return "all"
    shaped = [spec.name for spec in specs if "llava" in spec.targets and spec.name not in own]
    return ", ".join([*own, *(f"{name} (`--layout llava`)" for name in shaped)])


def matrix() -> str:
    """Return the table for the documentation."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in ARCHITECTURES.values():
        usual, *others = row.poolings
        poolings = ", ".join([f"**{usual}**", *others])
        cells = (row.title, row.examples, row.reads, f"`{row.model_class}`", poolings, hosts(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_documentation_has_the_matrix() -> None:
    assert BEGIN + matrix() + END in DOCUMENT.read_text(encoding="utf-8")


def test_it_says_of_every_family_what_it_refuses() -> None:
    assert hosts(ARCHITECTURES["clip"]) == "all"
    assert "qwen-vl" not in hosts(ARCHITECTURES["dinov2"])
    assert "internvl (`--layout llava`)" in hosts(ARCHITECTURES["dinov2"])


def write() -> None:
    """Write the matrix into the documentation."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + matrix() + END + after, encoding="utf-8")


if __name__ == "__main__":
    write()
