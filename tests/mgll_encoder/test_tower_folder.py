"""A tower's folder: everything comes back, and stock transformers reads it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

from mgll_encoder import Tower, TowerSpec, build_model, image_transform, inspect_tower, load_tower, save_tower
from mgll_encoder.common.errors import MismatchError, OutputTakenError, UnsupportedCheckpointError, UserError
from mgll_encoder.common.files import sha256
from tests import builders
from tests.mgll_encoder import towers

PIXELS = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return towers.write(towers.state_of(towers.open_clip_model(quick_gelu=True)), tmp_path / "mgll-fundus.pt")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return save_tower(
        load_tower(source, activation="quick_gelu"), tmp_path / "mgll-fundus", provenance={"run": 7}
    )


def test_a_tower_comes_back_whole(source: Path, folder: Path) -> None:
    before, after = load_tower(source, activation="quick_gelu"), load_tower(folder)
    assert after.spec == before.spec
    assert after.header.layout == "mgll tower folder"
    assert (after.header.activation_source, after.header.preprocessing_source) == ("stored", "stored")
    assert after.header.warnings == ()
    assert torch.equal(after.projection, before.projection)
    old, new = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_stock_transformers_loads_the_folder_without_complaint(source: Path, folder: Path) -> None:
    for auto in (CLIPVisionModel, AutoModel):
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        assert isinstance(model, CLIPVisionModel)
        assert not any(report.values()), report
    with torch.no_grad():
        stock = model(PIXELS).pooler_output
        ours = load_tower(source, activation="quick_gelu").model(PIXELS).pooler_output
    torch.testing.assert_close(stock, ours, atol=1e-6, rtol=1e-6)


def test_keys_are_those_that_transformers_4_reads(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as stream:
        assert all(name.startswith("vision_model.") for name in stream.keys())  # noqa: SIM118
        assert stream.metadata() == {"format": "pt"}, "transformers 4 refuses files without it"
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["CLIPVisionModel"], "clip_vision_model")
    assert config["hidden_act"] == "quick_gelu"


def test_the_processor_in_the_folder_follows_the_contract(folder: Path, tmp_path: Path) -> None:
    image = Image.open(builders.picture(tmp_path, "eye.png")).resize((61, 47))
    stock = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(stock, image_transform(inspect_tower(folder).spec)(image))


def test_provenance_and_card_say_where_it_comes_from(source: Path, folder: Path) -> None:
    record = json.loads((folder / "mgll_tower.json").read_text())["provenance"]
    assert record["source"] == "mgll-fundus.pt"
    assert record["sha256"] == {"mgll-fundus.pt": sha256(source)}
    assert (record["layout"], record["activation_source"], record["run"]) == (
        "open_clip state dict",
        "option",
        7,
    )
    assert "quick_gelu" in (folder / "README.md").read_text()
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}


def test_a_model_trained_here_is_saved_with_its_contract(tmp_path: Path) -> None:
    spec = TowerSpec(
        width=32, depth=2, heads=4, mlp_width=64, patch_size=7, image_size=21, activation="gelu", resize="pad"
    )
    tower = Tower.from_model(towers.scramble(build_model(spec)), spec, projection=torch.randn(5, 32))
    back = load_tower(save_tower(tower, tmp_path / "tower"))
    assert back.spec == spec.model_copy(update={"projection_dim": 5})
    pixels = torch.randn(1, 3, 21, 21)
    with torch.no_grad():
        assert torch.equal(back.model(pixels).pooler_output, tower.model(pixels).pooler_output)


def test_a_taken_folder_is_left_alone_without_force(source: Path, folder: Path) -> None:
    tower = load_tower(source, activation="gelu")
    with pytest.raises(
        OutputTakenError, match="exists: choose another `out`, or replace it with `force=True`"
    ):
        save_tower(tower, folder)
    assert inspect_tower(folder).spec.activation == "quick_gelu"
    save_tower(tower, folder, force=True)
    assert inspect_tower(folder).spec.activation == "gelu"


def test_a_model_that_is_not_its_contract_is_not_written(tmp_path: Path) -> None:
    spec = TowerSpec(width=32, depth=2, heads=4, mlp_width=64, patch_size=7, image_size=21, activation="gelu")
    model = build_model(spec.model_copy(update={"activation": "quick_gelu"}))
    with pytest.raises(MismatchError, match="the model's hidden_act is quick_gelu: expected gelu"):
        save_tower(Tower.from_model(model, spec), tmp_path / "tower")
    assert list(tmp_path.iterdir()) == []


def test_the_stored_activation_cannot_be_contradicted(folder: Path) -> None:
    assert inspect_tower(folder, activation="quick_gelu").activation_source == "stored"
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"`activation=gelu` contradicts 'quick_gelu', stored in .*mgll_tower.json",
    ):
        inspect_tower(folder, activation="gelu")


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content["spec"] |= changes.pop("spec", {})
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "field 'version' is 2: expected 1"),
        ({"spec": {"width": 128}}, "field 'width' is 128, but the weights in .* have 64"),
        ({"spec": {"patch_size": 7}}, "field 'patch_size' is 7, but the weights in .* have 14"),
        ({"spec": {"mlp_width": 1}}, "field 'mlp_width' is 1, but the weights in .* have 256"),
        ({"spec": {"heads": 3}}, "width 64 cannot be divided among 3 attention heads"),
        (
            {"spec": {"activation": "gelu"}},
            "field 'activation' is gelu, but .*config.json has hidden_act 'quick_gelu'",
        ),
        ({"spec": {"resize": "stretch"}}, "field 'resize' is 'stretch'"),
        ({"spec": {"color": "green"}}, "field 'color' is 'green'"),
    ],
)
def test_a_tampered_contract_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit(folder / "mgll_tower.json", **changes)
    with pytest.raises(UserError, match=message):
        inspect_tower(folder)


def test_a_guess_is_remembered_after_conversion(source: Path, tmp_path: Path) -> None:
    save_tower(load_tower(source), tmp_path / "guessed")
    (said,) = inspect_tower(tmp_path / "guessed").warnings
    assert "gelu was only the default for mgll-fundus.pt" in said
    assert "convert again with `activation`" in said


def test_a_loaded_tower_does_not_hang_on_its_file(source: Path) -> None:
    tower = load_tower(source)
    before = {name: tensor.clone() for name, tensor in tower.model.state_dict().items()}
    with source.open("r+b") as stream:
        stream.write(bytes(source.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.model.state_dict().items())


def test_a_lost_projection_is_noticed(folder: Path) -> None:
    (folder / "visual_projection.safetensors").unlink()
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"lacks visual_projection.safetensors, which .*mgll_tower.json requires",
    ):
        load_tower(folder)


def test_no_path_of_the_machine_is_in_the_folder(source: Path, tmp_path: Path) -> None:
    made = {"settings": {"init": str(tmp_path / "private" / "clip.pt"), "deepspeed": "~/private/z.json"}}
    save_tower(load_tower(source, activation="quick_gelu"), tmp_path / "out", provenance=made)
    assert not [file for file in (tmp_path / "out").iterdir() if b"private" in file.read_bytes()]
    record = json.loads((tmp_path / "out" / "mgll_tower.json").read_text())["provenance"]["settings"]
    assert record == {"init": "clip.pt", "deepspeed": "z.json"}
