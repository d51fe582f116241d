"""Somebody keeps ten experiments on one base, and stores of each only what is its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from eval_mcq.backends.fingerprint import model_fingerprint
from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.weights.spans import spans
from mllm_adapters import load_mllm
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main
from mllm_adapters.core.provenance import read_record
from mllm_adapters.core.streaming import nbytes
from mllm_adapters.loading.delta import DELTA_WEIGHTS, read_delta
from mllm_adapters.swap.replace_tensors import replace_tensors
from mllm_adapters.swap.verify import _logits
from tests import builders
from tests.builders import invoke, refused
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters import complete
from tests.mllm_adapters.llava_checkpoints import a_tower
from tests.mllm_adapters.retraining import color_rows, write_json

QUICK = ("llava", "instructblip", "med-flamingo")
"""Rows of the default run: a .bin layout that is converted, connectors that begin anew, loose weights and a part."""

ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in complete.BUILDERS]

CONNECTOR = "multi_modal_projector.linear_1.weight"


def done(*arguments: object) -> str:
    outcome = invoke(main, *arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def contents(folder: Path) -> dict[str, object]:
    """Every file below a folder by its bytes; JSON by what it says."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {
        n: json.loads(f.read_bytes()) if n.endswith(".json") else f.read_bytes() for n, f in files.items()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@torch.no_grad()
def answers_alike(one: tuple, other: tuple) -> bool:
    """Bit-equal parameters and logits, one dtype, one way of generating."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    (model, processor), (reference, expected) = one, other
    for parameter in (*model.parameters(), *reference.parameters()):
        parameter.data = parameter.data.clone()  # the last bit of a product depends on how memory is aligned
    state, right = model.state_dict(), reference.state_dict()
    return (
        state.keys() == right.keys()
        and all(state[name].dtype == right[name].dtype for name in right)
        and all(torch.equal(state[name], right[name]) for name in right)
        and model.generation_config == reference.generation_config
        and torch.equal(_logits(model, processor, image), _logits(reference, expected, image))
    )


def experiment(name: str, folder: Path, golden: Callable[[], Path]) -> SimpleNamespace:
    """A base, an encoder of another width, and the swap as a whole and as a delta; the encoder lies elsewhere then."""
    base = complete.BUILDERS[name](folder / "host", golden)
    encoder = a_tower(folder / "mgll", width=48)
    options = ("--mllm", base, "--encoder", encoder)
    done(*options, "--out", folder / "whole")
    done(*options, "--out", folder / "delta", "--delta-only")
    done(*options, "--out", folder / "referring", "--delta-only", "--reference-tower")
    return SimpleNamespace(
        folder=folder, base=base, encoder=encoder, whole=folder / "whole", delta=folder / "delta"
    )


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("rows")
    return experiment(request.param, folder, lambda: request.getfixturevalue("golden"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("llava")
    return experiment("llava-hf", folder, lambda: pytest.fail("needs no golden folder"))


def test_a_delta_with_its_base_answers_as_the_whole_checkpoint(row: SimpleNamespace) -> None:
    whole = load_mllm(row.whole)
    assert answers_alike(load_mllm(row.base, delta=row.delta), whole)
    assert answers_alike(load_mllm(row.folder / "referring"), whole), "base and encoder are found beside it"


def test_a_delta_holds_tower_and_connectors_and_no_more(row: SimpleNamespace) -> None:
    record = read_record(row.whole)
    own = {t.name: nbytes(t) for t in record.tensors if not t.kind.from_base}
    assert weights(row.delta).keys() == own.keys()
    assert (row.delta / DELTA_WEIGHTS).stat().st_size <= sum(own.values()) + 300 * len(own)
    connectors = {t.name for t in record.tensors if t.name in own and t.operation != "tower"}
    assert connectors, "the width changed"
    assert weights(row.folder / "referring").keys() == connectors
    assert size(row.delta) < size(row.whole)


def test_composing_gives_what_the_swap_would_have_written(row: SimpleNamespace, tmp_path: Path) -> None:
    done("compose", "--mllm", row.base, "--delta", row.delta, "--out", tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(row.whole)
    referring = row.folder / "referring"
    options = ("--mllm", row.base, "--delta", referring, "--out", tmp_path / "again")
    done("compose", *options, "--encoder", row.encoder)
    assert contents(tmp_path / "again") == contents(row.whole)


def test_a_delta_taken_out_of_the_whole_is_the_delta(row: SimpleNamespace, tmp_path: Path) -> None:
    done("extract", row.whole, "--mllm", row.base, "--out", tmp_path / "delta")
    assert weights(tmp_path / "delta").keys() == weights(row.delta).keys()
    done("compose", "--mllm", row.base, "--delta", tmp_path / "delta", "--out", tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(row.whole)


def test_untouched_shards_of_a_composed_checkpoint_are_linked(llava: SimpleNamespace, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava.base)
    base = llava.folder / "sharded" / "host"
    shutil.copytree(llava.base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(base, max_shard_size="40KB")
    delta, out = base.parent / "delta", base.parent / "whole"
    done("--mllm", base, "--encoder", llava.encoder, "--delta-only", "--out", delta)
    done("compose", "--delta", delta, "--out", out)
    inodes = {file.stat().st_ino for file in base.glob("*.safetensors")}
    linked = [file for file in out.glob("*.safetensors") if file.stat().st_ino in inodes]
    assert linked
    done("compose", "--delta", delta, "--out", tmp_path / "copied", "--copy")
    assert not any(file.stat().st_ino in inodes for file in (tmp_path / "copied").iterdir())
    assert weights(out).keys() == weights(tmp_path / "copied").keys()
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(llava.whole).items())


def test_a_delta_does_not_pass_for_a_checkpoint(llava: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(llava.delta)
    said = (
        f"{llava.delta} is a delta (it holds mgll_delta.json), not a whole checkpoint: `swap-encoder compose"
    )
    images, data = tmp_path / "images", tmp_path / "train.json"
    write_json(data, color_rows(images, 2))
    for message in (
        refused(main, "--mllm", llava.delta, "--encoder", llava.encoder, "--out", tmp_path / "out"),
        refused(main, "verify", llava.delta),
        refused(main, "restore", llava.delta, "--to-encoder", "--out", tmp_path / "out"),
        refused(main, "extract", llava.delta, "--mllm", llava.base, "--out", tmp_path / "out"),
        refused(retrain_projector, "--model", llava.delta, "--data", data, "--images", images),
    ):
        assert message.startswith(said)
    card = (llava.delta / "README.md").read_text()
    assert "A delta, not a whole checkpoint" in card
    assert "library_name: mgll-mllm" in card
    for file in llava.delta.iterdir():
        assert str(llava.folder).encode() not in file.read_bytes(), (
            "it is published: no paths of this machine"
        )


def answers(file: Path) -> list[dict[str, Any]]:
    """The rows of a run, without the fingerprint of the run in each."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "run"} for row in rows]


def test_letters_are_scored_of_a_delta_and_the_base_is_part_of_its_fingerprint(
    llava: SimpleNamespace, tmp_path: Path
) -> None:
    bench = small_bench(tmp_path / "bench", 3)
    for model in (llava.delta, llava.whole):
        out = tmp_path / model.name
        outcome = invoke(eval_mcq, "run", "--model", model, "--bench", bench, "--out", out)
        assert outcome.code == 0, outcome.err
    found, expected = (answers(tmp_path / name / "answers.jsonl") for name in ("delta", "whole"))
    assert found == expected
    copy = Path(shutil.copytree(llava.delta, tmp_path / "copy"))
    assert model_fingerprint(copy) == model_fingerprint(llava.delta)
    record = json.loads((copy / "mgll_delta.json").read_text())
    record["inputs"]["source"]["files"]["config.json"]["sha256"] = "0" * 64
    (copy / "mgll_delta.json").write_text(json.dumps(record))
    assert model_fingerprint(copy) != model_fingerprint(llava.delta)


def test_a_retraining_fits_into_a_delta_too(llava: SimpleNamespace, tmp_path: Path) -> None:
    images, data = tmp_path / "images", tmp_path / "train.json"
    write_json(data, color_rows(images, 4))
    trained = llava.folder / "trained"
    outcome = invoke(
        retrain_projector, "--model", llava.whole, "--out", trained, "--data", data, "--images", images,
        "--max-steps", 2, "--batch-size", 2, "--workers", 0, "--report-to", "none",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert not torch.equal(weights(trained)[CONNECTOR], weights(llava.whole)[CONNECTOR])
    small = llava.folder / "small"
    done("extract", trained, "--mllm", llava.base, "--out", small, "--reference-tower")
    names = {name for name in weights(trained) if "multi_modal_projector" in name}
    assert weights(small).keys() == names, (
        "the tower is named, the projector kept: also what was kept by the swap"
    )
    assert "training.json" in read_delta(small).files
    assert answers_alike(load_mllm(small), load_mllm(trained))
    done("compose", "--delta", small, "--out", llava.folder / "composed")
    assert answers_alike(load_mllm(llava.folder / "composed"), load_mllm(trained))
    checks = json.loads(done("verify", llava.folder / "composed", "--quick", "--json"))
    assert all(check["passed"] for check in checks if check["name"] != "image"), checks


def with_tensor(source: Path, out: Path, part: str) -> tuple[Path, str]:
    """A checkpoint with one tensor changed by a tool that records nothing, and that tensor's name."""
    name = next(name for name in weights(source) if part in name)
    replace_tensors(source, out, {name: weights(source)[name] + 1})
    (out / "mgll_swap.json").write_text((source / "mgll_swap.json").read_text())
    return out, name


def test_what_another_tool_did_to_connectors_is_taken_along_and_to_the_language_model_refused(
    llava: SimpleNamespace, tmp_path: Path
) -> None:
    tuned, _ = with_tensor(llava.whole, tmp_path / "tuned", "linear_2.weight")
    done("extract", tuned, "--mllm", llava.base, "--out", tmp_path / "delta")
    assert answers_alike(load_mllm(llava.base, delta=tmp_path / "delta"), load_mllm(tuned))
    wild, name = with_tensor(llava.whole, tmp_path / "wild", "layers.1.mlp.up_proj.weight")
    message = refused(main, "extract", wild, "--mllm", llava.base, "--out", tmp_path / "no")
    assert f"1 tensors differ from {llava.base}" in message
    assert f"first {name}: this cannot be a delta" in message
    assert not (tmp_path / "no").exists()


def test_another_base_is_refused_with_what_was_found_and_expected(
    llava: SimpleNamespace, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(llava.base, tmp_path / "other"))
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    name = next(name for name in spans(file) if name.endswith("layers.1.mlp.up_proj.weight"))
    data[spans(file)[name].start] ^= 1
    file.write_bytes(data)
    options = ("--delta", llava.delta, "--out", tmp_path / "out")
    message = refused(main, "compose", "--mllm", other, *options)
    assert message.startswith(
        f"{other} is not the checkpoint that {llava.delta} was made from (host): its model.saf"
    )
    assert "has the hash" in message
    message = refused(main, "extract", llava.whole, "--mllm", other, "--out", tmp_path / "out")
    assert f"{other} is not the checkpoint that {llava.whole} was made from (host)" in message
    (other / "config.json").write_text("{}")
    shutil.copyfile(llava.base / "config.json", other / "config.json")
    with (other / "config.json").open("a") as stream:
        stream.write("\n")
    message = refused(main, "compose", "--mllm", other, *options)
    bytes_ = (llava.base / "config.json").stat().st_size
    assert f"its config.json has {bytes_ + 1} bytes, expected {bytes_}" in message
    alone = Path(shutil.copytree(llava.delta, tmp_path / "alone"))
    message = refused(eval_mcq, "run", "--model", alone, "--bench", small_bench(tmp_path / "bench", 1))
    assert "its base host is not next to it, in the working directory" in message
    assert "swap-encoder compose --mllm, or load_mllm(BASE, delta=...)" in message


def test_another_encoder_is_refused(llava: SimpleNamespace, tmp_path: Path) -> None:
    other = a_tower(tmp_path / "other", width=48, seed=6)
    options = ("compose", "--mllm", llava.base, "--out", tmp_path / "out", "--encoder", other)
    message = refused(main, *options, "--delta", llava.folder / "referring")
    assert message.startswith(
        f"{other} is not the encoder that {llava.folder / 'referring'} was made with (mgll): its"
    )
    assert "contains its tower: leave the encoder out" in refused(main, *options, "--delta", llava.delta)
    alone = Path(shutil.copytree(llava.folder / "referring", tmp_path / "alone"))
    message = refused(main, "compose", "--mllm", llava.base, "--delta", alone, "--out", tmp_path / "out")
    assert "its encoder mgll is not next to it" in message
    assert "--encoder" in message


def flipped(folder: Path) -> str:
    file = folder / DELTA_WEIGHTS
    data = bytearray(file.read_bytes())
    data[spans(file)[CONNECTOR].start + 40] ^= 1
    file.write_bytes(data)
    return f"{CONNECTOR} has been changed"


def truncated(folder: Path) -> str:
    file = folder / DELTA_WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    return DELTA_WEIGHTS


def exchanged(folder: Path) -> str:
    shutil.copyfile(folder.parent / "referring" / DELTA_WEIGHTS, folder / DELTA_WEIGHTS)
    return "is absent, expected"


def edited(folder: Path) -> str:
    with (folder / "config.json").open("a") as stream:
        stream.write("\n")
    return "config.json has been changed"


def incomplete(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json is missing: complete the download"


def garbled(folder: Path) -> str:
    (folder / "mgll_delta.json").write_text('{"format": 3}')
    return "mgll_delta.json: field 'versions'"


def reaching_out(folder: Path) -> str:
    record = json.loads((folder / "mgll_delta.json").read_text())
    record["files"]["../../elsewhere.json"] = record["files"]["config.json"]
    (folder / "mgll_delta.json").write_text(json.dumps(record))
    return "field 'files' names ../../elsewhere.json, which is outside the folder"


@pytest.mark.parametrize("damage", [flipped, truncated, exchanged, edited, incomplete, garbled, reaching_out])
def test_a_damaged_delta_is_one_line(
    damage: Callable[[Path], str], llava: SimpleNamespace, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(llava.delta, llava.folder / f"copy-{damage.__name__}"))
    said = damage(copy)
    message = refused(main, "compose", "--mllm", llava.base, "--delta", copy, "--out", tmp_path / "out")
    assert said in message
    assert list(tmp_path.iterdir()) == []


def test_options_and_outputs_that_cannot_be(llava: SimpleNamespace, tmp_path: Path) -> None:
    swap = ("--mllm", llava.base, "--encoder", llava.encoder, "--out", tmp_path / "out")
    assert "--reference-tower requires --delta-only" in refused(main, *swap, "--reference-tower")
    assert "--copy cannot be combined with --delta-only" in refused(main, *swap, "--delta-only", "--copy")
    (taken := tmp_path / "taken").mkdir()
    for command in (
        ("--mllm", llava.base, "--encoder", llava.encoder, "--delta-only"),
        ("compose", "--delta", llava.delta),
        ("extract", llava.whole, "--mllm", llava.base),
    ):
        assert "exists: choose another --out" in refused(main, *command, "--out", taken)
    message = refused(main, "compose", "--delta", llava.delta, "--out", llava.delta, "--force")
    assert "is the input" in message
    plain = builders.tiny_llava(tmp_path / "plain")
    assert "is not a delta" in refused(main, "compose", "--delta", plain, "--out", tmp_path / "out")
    assert "has no mgll_swap.json" in refused(main, "extract", plain, "--mllm", plain)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_delta_will_hold(llava: SimpleNamespace, tmp_path: Path) -> None:
    options = ("--mllm", llava.base, "--encoder", llava.encoder, "--out", tmp_path / "out", "--delta-only")
    shown = done(*options, "--dry-run")
    assert "made from the base" in shown
    assert not (tmp_path / "out").exists()


def test_of_a_referring_delta_nothing_of_the_width_is_stored(llava: SimpleNamespace, tmp_path: Path) -> None:
    """Where the connectors are kept, there is no tensor at all, and the folder still loads."""
    encoder = a_tower(llava.folder / "same-width")
    options = ("--mllm", llava.base, "--encoder", encoder, "--precision", "float32")
    out = llava.folder / "tiny"
    done(*options, "--out", out, "--delta-only", "--reference-tower")
    assert weights(out) == {}
    done(*options, "--out", tmp_path / "whole")
    assert answers_alike(load_mllm(out), load_mllm(tmp_path / "whole"))
