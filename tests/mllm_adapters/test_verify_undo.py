"""After a swap: is it still what was written, and can it be taken back? For every family."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgll_encoder import inspect_tower, load_tower
from mgll_encoder.weights.spans import spans
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from mllm_adapters.core.family_table import FAMILIES
from mllm_adapters.core.provenance import read_record
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import outermost_modules
from mllm_adapters.swap.apply import apply_plan
from mllm_adapters.swap.replace_tensors import replace_tensors
from mllm_adapters.swap.verify import Verification
from tests.builders import invoke, refused
from tests.mllm_adapters import complete

QUICK = ("llava-hf", "internvl-internlm2", "qwen-vl")
"""Rows of the default run: shards that are linked, tensors that are cut, an original layout that is converted."""

ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in complete.BUILDERS]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    found, expected = weights(one), weights(other)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
        for name in found
    )


def sides(folder: Path) -> dict[str, bytes]:
    """Everything but the weights and what says how they came about."""
    told = ("README.md", "mgll_swap.json", "model.safetensors.index.json")
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name not in told}


def swapped(name: str, folder: Path, golden: Callable[[], Path]) -> SimpleNamespace:
    source = complete.BUILDERS[name](folder / "host", golden)
    encoder, out = complete.encoder(folder / "mgll"), folder / "swapped"
    outcome = invoke(main, "--mllm", source, "--encoder", encoder, "--out", out)
    assert outcome.code == 0, outcome.err
    return SimpleNamespace(source=source, encoder=encoder, out=out, folder=folder)


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("rows")
    return swapped(request.param, folder, lambda: request.getfixturevalue("golden"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return swapped(
        "llava-hf", tmp_path_factory.mktemp("llava"), lambda: pytest.fail("needs no golden folder")
    )


def test_every_family_has_a_row() -> None:
    assert set(FAMILIES) <= set(complete.BUILDERS)


def test_what_was_written_verifies(row: SimpleNamespace) -> None:
    outcome = invoke(main, "verify", row.out, "--json")
    assert outcome.code == 0, outcome.err
    checks = {check["name"]: check for check in json.loads(outcome.out)}
    assert list(checks) == ["files", "tensors", "tower", "plan", "loading", "image"]
    assert all(check["passed"] is True for check in checks.values()), checks
    assert "recomputed from mgll (the file recorded at the swap)" in checks["tower"]["detail"]


def test_restoring_gives_the_original_bit_by_bit(row: SimpleNamespace, tmp_path: Path) -> None:
    outcome = invoke(main, "restore", row.out, "--mllm", row.source, "--out", tmp_path / "back")
    assert outcome.code == 0, outcome.err
    assert "Writing (" in outcome.err
    checkpoint, family, layout = open_checkpoint(row.source)
    if layout == "transformers":
        expected = checkpoint.folder
        assert sides(tmp_path / "back") == sides(expected)
    else:
        expected = apply_plan(family.plan(checkpoint), family, checkpoint, tmp_path / "converted")
        assert sides(tmp_path / "back") == sides(expected)
        assert list(Verification(tmp_path / "back").checks(quick=True))[3].passed
    assert not same_weights(tmp_path / "back", row.out)
    if expected.joinpath("pytorch_model.bin.index.json").is_file():  # of InstructBLIP's, in .bin
        found = weights(tmp_path / "back")
        assert all(torch.equal(checkpoint.read(name), found[name]) for name in checkpoint.tensors)
    else:
        assert same_weights(tmp_path / "back", expected)


@torch.no_grad()
def test_the_tower_comes_out_as_an_ordinary_one(row: SimpleNamespace, tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    outcome = invoke(main, "restore", row.out, "--to-encoder", "--out", tower)
    assert outcome.code == 0, outcome.err
    after = read_record(row.out).plan_with({}).after
    spec = inspect_tower(tower).spec
    assert (spec.mean, spec.std, spec.resize, spec.activation) == (
        after.mean, after.std, after.resize, after.activation,
    )  # fmt: skip
    model, _ = load_mllm(row.out, dtype=torch.float32)
    inside = next(
        m for m in outermost_modules(model, "tower") for m in m.modules() if hasattr(m, "embeddings")
    )
    pixels = torch.randn(1, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    found = load_tower(tower).model(pixels, output_hidden_states=True).hidden_states
    expected = inside(pixels, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    again = swapped_again(row, tower, tmp_path / "again")
    assert same_weights(again, row.out), "what is fitted already is not fitted twice"


def swapped_again(row: SimpleNamespace, tower: Path, out: Path) -> Path:
    outcome = invoke(main, "--mllm", row.source, "--encoder", tower, "--out", out)
    assert outcome.code == 0, outcome.err
    return out


def edited_bytes(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.unlink()  # it may be a hard link
    file.write_bytes(data)


def flip(folder: Path, part: str) -> str:
    """Change one bit in the middle of a tensor; its name is returned."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, span in spans(file).items():
            if part in name:
                edited_bytes(file, span.start + span.length // 2)
                return name
    raise AssertionError(part)


def reprocessed(folder: Path) -> str:
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.48145466", "0.485"))
    return file.name


def recast(folder: Path) -> str:
    """A tensor in another dtype."""
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    name = next(name for name in state if "linear_1.bias" in name)
    file.unlink()
    save_file({**state, name: state[name].half()}, file, metadata={"format": "pt"})
    return f"{name} is float16 [48], planned was float32 [48]"


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda folder: flip(folder, "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"), "tower"),
        (lambda folder: flip(folder, "layers.0.mlp.up_proj.weight"), "plan"),
        (lambda folder: flip(folder, "linear_2.weight"), "plan"),
        (reprocessed, "files"),
        (recast, "tensors"),
        (
            lambda folder: (folder / "config.json").write_text("{}") and "config.json has been changed",
            "files",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink() or "tokenizer.json is missing", "files"),
    ],
)
def test_what_was_changed_since_is_named(
    change: Callable[[Path], str], check: str, llava: SimpleNamespace, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(llava.out, llava.folder / tmp_path.name))  # beside its source and encoder
    assert all(found.passed for found in Verification(copy).checks(quick=True) if found.name != "image")
    named = change(copy)
    checks = {found.name: found for found in Verification(copy).checks(quick=True)}
    assert checks[check].passed is False
    assert named in checks[check].detail
    message = refused(main, "verify", copy, "--quick")
    assert message.startswith(f"{copy}: ")
    assert check in message


def test_without_encoder_and_source_the_hashes_speak_and_it_says_what_was_not_checked(
    llava: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(llava.out, tmp_path / "published"))
    outcome = invoke(main, "verify", copy, "--quick", "--json")
    assert outcome.code == 0, outcome.err
    checks = {check["name"]: check for check in json.loads(outcome.out)}
    assert (
        "mgll was not found, so they were not recomputed from it: pass --encoder" in checks["tower"]["detail"]
    )
    assert "by samples of their files only: host was not found, pass --mllm" in checks["plan"]["detail"]
    assert checks["image"]["passed"] is None
    name = flip(copy, "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight")
    assert f"{name} has been changed" in refused(main, "verify", copy, "--quick")


def test_another_encoder_is_told_apart(llava: SimpleNamespace, tmp_path: Path) -> None:
    other = load_tower(llava.encoder)
    other.model.embeddings.class_embedding.data += 1
    from mgll_encoder import save_tower

    save_tower(other, tmp_path / "other")
    message = refused(main, "verify", llava.out, "--encoder", tmp_path / "other", "--quick")
    assert (
        "tower (vision_tower.vision_model.embeddings.class_embedding differs from the encoder other)"
        in message
    )


def test_a_model_that_does_not_look_fails(llava: SimpleNamespace, tmp_path: Path) -> None:
    name = "multi_modal_projector.linear_2.weight"
    blind = {n: torch.zeros_like(v) for n, v in weights(llava.out).items() if n == name}
    replace_tensors(llava.out, tmp_path / "blind", blind)
    checks = {check.name: check for check in Verification(tmp_path / "blind").checks()}
    assert checks["image"].passed is False
    assert "the output does not depend on it" in checks["image"].detail


def test_training_since_is_recorded_and_what_it_taught_the_language_model_is_kept(
    llava: SimpleNamespace, tmp_path: Path
) -> None:
    state = weights(llava.out)
    names = ("multi_modal_projector.linear_1.weight", "language_model.model.layers.0.mlp.up_proj.weight")
    names = tuple(next(n for n in state if n.endswith(end.rpartition("model.")[2])) for end in names)
    replace_tensors(llava.out, tmp_path / "trained", {name: state[name] + 1 for name in names})
    checks = {
        c.name: c for c in Verification(tmp_path / "trained", llava.encoder, llava.source).checks(quick=True)
    }
    assert all(checks[name].passed for name in ("files", "tensors", "tower", "plan", "loading"))
    assert "2 trained after the swap" in checks["plan"].detail
    outcome = invoke(
        main, "restore", tmp_path / "trained", "--mllm", llava.source, "--out", tmp_path / "back"
    )
    assert outcome.code == 0, outcome.err
    back, source = weights(tmp_path / "back"), weights(llava.source)
    projector, language_model = names
    assert torch.equal(back[projector], source[projector]), "connectors are the original's"
    assert torch.equal(back[language_model], source[language_model] + 1)


def test_undoing_what_was_not_done_is_refused(
    llava: SimpleNamespace, tiny_llava: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    assert "has no mgll_swap.json" in refused(main, "restore", tiny_llava, "--to-encoder", *out)
    assert "has no mgll_swap.json" in refused(main, "verify", tiny_llava)
    assert "pass either --mllm" in refused(main, "restore", llava.out, *out)
    assert "--part and --copy go with" in refused(main, "restore", llava.out, "--to-encoder", "--copy", *out)
    other = Path(shutil.copytree(llava.source, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    message = refused(main, "restore", llava.out, "--mllm", other, *out)
    assert "is not the original of" in message
    assert "other hashes" in message
    damaged = Path(shutil.copytree(llava.out, tmp_path / "damaged"))
    (damaged / "mgll_swap.json").write_text('{"format": 1}')
    assert "field 'format' is 1, expected 3: swap again" in refused(main, "verify", damaged)
    assert not (tmp_path / "out").exists()
