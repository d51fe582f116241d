"""What a written checkpoint says of itself: names, hashes, licences, and no path of this machine."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.weights.spans import spans
from mllm_adapters import alignment_of, load_mllm, plan_swap
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.checkpoints.fingerprint import sampled
from mllm_adapters.cli.swap import main
from mllm_adapters.core.provenance import read_record
from mllm_adapters.core.streaming import raw_bytes
from mllm_adapters.swap.replace_tensors import replace_tensors
from tests.builders import invoke, refused
from tests.mllm_adapters import complete
from tests.mllm_adapters.llava_checkpoints import a_tower


def test_everything_that_was_read_and_written_is_known_by_its_hash(tiny_llava: Path, tmp_path: Path) -> None:
    tower, out = a_tower(tmp_path / "mgll"), tmp_path / "out"
    assert invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out).code == 0
    record = read_record(out)
    source, encoder = record.inputs.source, record.inputs.tower
    assert encoder is not None

    def digest(file: Path) -> str:
        return sha256(file.read_bytes()).hexdigest()

    assert source.files["config.json"].sha256 == digest(tiny_llava / "config.json")
    assert source.files["model.safetensors"] == sampled(tiny_llava / "model.safetensors")
    assert encoder.files["model.safetensors"].sha256 == digest(tower / "model.safetensors")
    assert encoder.files["mgll_tower.json"].sha256 == digest(tower / "mgll_tower.json")
    unrecorded = {"README.md", "mgll_swap.json"}
    assert set(record.files) == {file.name for file in out.iterdir()} - unrecorded
    for name, file in record.files.items():
        assert file.size == (out / name).stat().st_size
        assert name.endswith(".safetensors") or file.sha256 == digest(out / name)
    written = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    towers = [tensor for tensor in record.tensors if tensor.operation == "tower"]
    assert len(towers) == 55
    for tensor in towers:
        assert tensor.sha256 == sha256(raw_bytes(written[tensor.name])).hexdigest()
    assert record.plan["connectors"] == {"multi_modal_projector.linear_1": {"fate": "kept", "width": 32}}
    assert record.plan["before"]["resize"] == "squash"
    assert record.tower_spec is not None
    assert (record.tower_spec.mean, record.plan["after"]["mean"]) != (None, None)


@pytest.mark.parametrize("name", ["llava-hf", "llava", "med-flamingo"])
def test_no_path_of_this_machine_is_published(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether paths are given absolute or relative, with parts inside or beside."""
    private = tmp_path / "private" / "dr_jones"
    private.mkdir(parents=True)
    host = complete.BUILDERS[name](private / "host", lambda: request.getfixturevalue("golden"))
    tower = complete.encoder(private / "towers" / "mgll")
    (private / "work").mkdir()
    monkeypatch.chdir(private / "work")
    ways = {"absolute": (host, tower), "relative": ("../host", Path("../towers/mgll"))}
    for way, (given, encoder) in ways.items():
        out = tmp_path / way
        outcome = invoke(main, "--mllm", given, "--encoder", encoder, "--out", out)
        assert outcome.code == 0, outcome.err
        for file in out.iterdir():
            assert b"dr_jones" not in file.read_bytes(), file.name
        for file in (out / "README.md", out / "mgll_swap.json"):
            assert "../" not in file.read_text()
        assert read_record(out).inputs.source.name == "host"


def test_the_card_is_one_that_the_hub_reads(tiny_llava: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    front = (
        "---\nlicense: other\nlicense_name: llama2\nlicense_link: https://example.org/terms\n---\n# A model\n"
    )
    (source / "README.md").write_text(front)
    (source / "LICENSE").write_text("Terms")
    tower, out = a_tower(tmp_path / "mgll"), tmp_path / "out"
    (tower / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert invoke(main, "--mllm", source, "--encoder", tower, "--out", out).code == 0
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "llama2")
    assert data["license_link"] == "https://example.org/terms"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert {"medical", "vision-tower-swap"} <= set(data["tags"])
    assert "base_model" not in data, "a folder is no id on the hub"
    assert "`source`: `llama2` (https://example.org/terms); terms in its file `LICENSE`" in card.text
    assert "`mgll`: `cc-by-nc-4.0`" in card.text
    assert "Not a medical device" in card.text
    assert (out / "LICENSE").read_text() == "Terms"
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert invoke(main, "--mllm", source, "--encoder", tower, "--out", out, "--force").code == 0
    assert "its folder does not name one" in ModelCard.load(out / "README.md").text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_tower_can_have_a_dtype_of_its_own(dtype: str, tiny_llava: Path, tmp_path: Path) -> None:
    tower, out = a_tower(tmp_path / "mgll"), tmp_path / "out"
    outcome = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--precision", dtype)
    assert outcome.code == 0, outcome.err
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    expected = {"float16": "F16", "float32": "F32"}[dtype]
    assert {kind for name, kind in found.items() if "vision_tower" in name} == {expected}
    assert {kind for name, kind in found.items() if "vision_tower" not in name} == {"F32"}
    assert (f"the tower is written in {dtype} (--precision)" in outcome.err) == (dtype == "float16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        span.length for file in out.glob("*.safetensors") for span in spans(file).values()
    )
    load_mllm(out)
    message = refused(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--precision", "float8")
    assert "'--precision': 'float8' is not one of 'auto', 'float32'" in message


def test_what_a_sample_tells(tmp_path: Path) -> None:
    """Length, header and the ends of tensors; not the middle of a long one."""
    file = tmp_path / "x.safetensors"
    state = {"a": torch.arange(10_000.0), "b": torch.ones(3)}
    save_file(state, file)
    known = sampled(file)
    for changed in ({**state, "b": torch.zeros(3)}, {**state, "a": state["a"] + 1}, {"a": state["a"]}):
        save_file(changed, file)
        assert sampled(file) != known
    middle = state["a"].clone()
    middle[5_000] = 7
    save_file({**state, "a": middle}, file)
    assert sampled(file) == known


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        (("tensors", 0, "dtype"), "float17", "'float17' is not a torch dtype"),
        (("tensors", 0, "shape"), [-1], "greater than or equal to 0"),
        (("plan", "before", "mean"), [0.5], "field 'plan.before.mean.1': Field required"),
    ],
)
def test_an_edited_record_is_named(
    tiny_llava: Path, tmp_path: Path, place: tuple[str | int, ...], value: object, found: str
) -> None:
    tower, out = a_tower(tmp_path / "mgll"), tmp_path / "out"
    assert invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out).code == 0
    record = json.loads((out / "mgll_swap.json").read_text())
    *way, last = place
    node = record
    for key in way:
        node = node[key]
    node[last] = value
    (out / "mgll_swap.json").write_text(json.dumps(record))
    assert found in refused(main, "restore", out, "--mllm", tiny_llava, "--out", tmp_path / "back")


def test_a_tensor_that_is_not_there_is_named(tiny_llava: Path) -> None:
    with pytest.raises(BadDataError, match="has no tensor nobody"):
        Checkpoint(tiny_llava).read("nobody")


def test_a_record_of_another_format_is_refused_before_anything_is_written(
    tiny_llava: Path, tmp_path: Path
) -> None:
    out = plan_swap(tiny_llava, a_tower(tmp_path / "mgll")).write(tmp_path / "out")
    record = json.loads((out / "mgll_swap.json").read_text())
    (out / "mgll_swap.json").write_text(json.dumps({**record, "format": 2}))
    for uses in (read_record, alignment_of, lambda folder: replace_tensors(folder, tmp_path / "trained", {})):
        with pytest.raises(
            BadDataError, match=r"mgll_swap\.json: field 'format' is 2, expected 3: swap again"
        ):
            uses(out)
    assert not (tmp_path / "trained").exists()
