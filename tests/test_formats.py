"""docs/formats.md and its JSON schemas say what the code reads and writes.

``python -m tests.test_formats`` writes both from the models.
"""

import json
import re
from collections.abc import Mapping
from inspect import getdoc
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from pydantic import BaseModel

from eval_mcq import build_benchmark
from eval_mcq.items.preset import Disease, Preset
from eval_mcq.items.schema import BenchHeader, MCQItem
from eval_mcq.records.answer import Answer
from eval_mcq.records.run_record import RunRecord
from mgll_encoder.common import trained_on
from mgll_encoder.data.fundus import FundusTable, build_fundus
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow
from mgll_encoder.data.phantom.dataset import write_phantom
from mgll_encoder.probing.zero_shot import LabelPrompts, Prompts
from mllm_adapters import plan_swap
from mllm_adapters.core.provenance import InputRecord, SwapRecord, TensorRecord
from mllm_adapters.data.llava_format import Conversation, Turn
from mllm_adapters.examples.untrained import write_example
from mllm_adapters.loading.delta import DeltaRecord
from tests.environments import ROOT

PAGE = ROOT / "docs" / "formats.md"
SCHEMAS = ROOT / "docs" / "schemas"
BEGIN, END = "<!-- python -m tests.test_formats: {} -->\n", "\n<!-- end -->"


class Shape(NamedTuple):
    """One kind of record: the model that reads and writes it, and which of the two the schema describes."""

    model: type[BaseModel]
    mode: Literal["validation", "serialization"]
    inner: tuple[type[BaseModel], ...] = ()


SHAPES: Mapping[str, Shape] = {
    "benchmark-header": Shape(BenchHeader, "validation"),
    "benchmark-question": Shape(MCQItem, "serialization"),
    "preset": Shape(Preset, "validation", (Disease,)),
    "manifest-header": Shape(ManifestHeader, "validation"),
    "manifest-row": Shape(ManifestRow, "validation"),
    "run": Shape(RunRecord, "serialization"),
    "answer": Shape(Answer, "serialization"),
    "swap-record": Shape(SwapRecord, "serialization", (TensorRecord, InputRecord)),
    "delta-record": Shape(DeltaRecord, "serialization"),
    "training-row": Shape(Conversation, "validation", (Turn,)),
    "trained-on": Shape(trained_on.Training, "serialization"),
    "prompts": Shape(Prompts, "validation", (LabelPrompts,)),
}


def schema(name: str) -> dict[str, Any]:
    """The JSON schema of a record."""
    shape = SHAPES[name]
    found = shape.model.model_json_schema(mode=shape.mode)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def schema_text(name: str) -> str:
    return json.dumps(schema(name), indent=2, ensure_ascii=False) + "\n"


def told(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model, and of those that it derives from, say of its fields."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        _, _, part = (getdoc(one) or "").partition("Attributes:\n")
        for field, text in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", part, re.MULTILINE):
            found[field] = " ".join(text.split())
    return found


def kind(part: Mapping[str, Any]) -> str:
    """A schema's type in words."""
    if "$ref" in part:
        return part["$ref"].rpartition("/")[2]
    if "const" in part:
        return f"`{json.dumps(part['const'])}`"
    if "enum" in part:
        return " or ".join(f"`{json.dumps(value)}`" for value in part["enum"])
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(kind(one) for one in part["anyOf"]))
    if part.get("type") == "array":
        inner = part.get("items") or part.get("prefixItems", [{}])[0]
        return f"list of {kind(inner)}" if inner else "list"
    if part.get("type") == "object":
        inner = part.get("additionalProperties")
        return f"object of {kind(inner)}" if isinstance(inner, dict) and inner else "object"
    return str(part.get("type", "any"))


def table(model: type[BaseModel], mode: Literal["validation", "serialization"]) -> str:
    """The fields of a record, for the page."""
    words = told(model)
    documented = {one.model for one in SHAPES.values()} & set(model.__mro__[1:])
    inherited = {name for one in documented for name in one.model_fields}
    alias = {info.alias or name: name for name, info in model.model_fields.items()}
    found = model.model_json_schema(mode=mode)
    required = {found_name for found_name, info in alias.items() if model.model_fields[info].is_required()}
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, part in found["properties"].items():
        if alias[name] in inherited:
            continue
        default = (
            "required" if name in required else f"`{json.dumps(part.get('default'), ensure_ascii=False)}`"
        )
        if name not in required and "default" not in part:
            default = "empty"
        meaning = words.get(alias[name], "").replace("``", "`").replace("|", "\\|")
        meaning = re.sub(r":(?:data|func|class|mod|meth):`([^`]+)`", r"`\1`", meaning)
        lines.append(f"| `{name}` | {kind(part)} | {default} | {meaning} |")
    return "\n".join(lines)


def part(name: str) -> str:
    """What the page says of a record."""
    shape = SHAPES[name]
    text = [table(shape.model, shape.mode)]
    for inner in shape.inner:
        text += [f"`{inner.__name__}`:", table(inner, shape.mode)]
    text.append(f"Schema: [{name}.json](schemas/{name}.json)")
    return BEGIN.format(name) + "\n" + "\n\n".join(text) + "\n" + END


@pytest.mark.parametrize("name", SHAPES)
def test_page_and_schema_are_those_of_the_model(name: str) -> None:
    renew = "run python -m tests.test_formats"
    assert part(name) in PAGE.read_text(encoding="utf-8"), renew
    assert (SCHEMAS / f"{name}.json").read_text(encoding="utf-8") == schema_text(name), renew


def test_every_field_has_a_meaning() -> None:
    for model in {one for shape in SHAPES.values() for one in (shape.model, *shape.inner)}:
        missing = set(model.model_fields) - set(told(model))
        assert not missing, (model.__name__, missing)


def test_the_page_names_each_record_once_and_nothing_else() -> None:
    named = re.findall(BEGIN.format(r"([\w-]+)").strip(), PAGE.read_text(encoding="utf-8"))
    assert sorted(named) == sorted(SHAPES)
    assert {file.stem for file in SCHEMAS.iterdir()} == set(SHAPES)


def test_the_schemas_describe_files_as_they_are_written(tmp_path: Path) -> None:
    """Files of a first swap and a first benchmark have the fields of the schemas, all required ones among them."""
    write_phantom(tmp_path / "phantom", 4, 64, 0, False)
    labels = tmp_path / "phantom" / "labels.csv"
    build_benchmark(labels, tmp_path / "phantom", tmp_path / "bench.jsonl", min_negatives=1)
    build_fundus(FundusTable(labels), tmp_path / "phantom", tmp_path / "manifest.jsonl")
    write_example(tmp_path / "example")
    plan_swap(tmp_path / "example" / "llava", tmp_path / "example" / "tower").write(tmp_path / "swapped")
    bench, manifest = (
        [json.loads(line) for line in (tmp_path / file).read_text().splitlines()[:2]]
        for file in ("bench.jsonl", "manifest.jsonl")
    )
    record = json.loads((tmp_path / "swapped" / "mgll_swap.json").read_text())
    written = {
        "benchmark-header": bench[0], "benchmark-question": bench[1], "manifest-header": manifest[0],
        "manifest-row": manifest[1], "swap-record": record,
    }  # fmt: skip
    for name, found in written.items():
        described = schema(name)
        assert set(found) <= set(described["properties"]), name
        assert set(described.get("required", ())) <= set(found), name
        assert fits(found, described, described.get("$defs", {})), name
        wrong = {**found, next(iter(described["properties"])): ["wrong"]}
        assert not fits(wrong, described, described.get("$defs", {})), name


def fits(value: Any, part: Mapping[str, Any], shared: Mapping[str, Any]) -> bool:
    """Whether a value has the types that a schema asks for (no lengths, no ranges)."""
    if "$ref" in part:
        return fits(value, shared[part["$ref"].rpartition("/")[2]], shared)
    if "anyOf" in part:
        return any(fits(value, one, shared) for one in part["anyOf"])
    if "const" in part:
        return value == part["const"]
    if "enum" in part:
        return value in part["enum"]
    types = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
        "null": type(None),
    }  # fmt: skip
    if "type" in part and not isinstance(value, types[part["type"]]):
        return False
    if part.get("type") == "array" and "items" in part:
        return all(fits(one, part["items"], shared) for one in value)
    if part.get("type") == "object":
        named, others = part.get("properties", {}), part.get("additionalProperties", {})
        inner = [(one, named.get(key, others)) for key, one in value.items()]
        return all(fits(one, asked, shared) for one, asked in inner if asked is not True)
    return True


def write() -> None:
    """Write the schemas, and what the page says of each record."""
    SCHEMAS.mkdir(exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    for name in SHAPES:
        (SCHEMAS / f"{name}.json").write_text(schema_text(name), encoding="utf-8")
        before, mark, rest = page.partition(BEGIN.format(name))
        assert mark, f"docs/formats.md has no place for {name}"
        page = before + part(name) + rest.partition(END)[2]
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write()
