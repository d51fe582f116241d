"""Bad towers are refused in one line that says what was found, what was expected and what to do; exit code 2."""

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgll_encoder import inspect_tower, load_tower
from mgll_encoder.cli import main
from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError, UserError
from mgll_encoder.weights.weight_file import open_weights
from tests import builders
from tests.mgll_encoder import towers


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


def state() -> dict[str, torch.Tensor]:
    return towers.state_of(towers.open_clip_model())


def missing(folder: Path) -> Path:
    return folder / "nowhere.pt"


def empty(folder: Path) -> Path:
    (folder / "tower.pt").touch()
    return folder / "tower.pt"


def text_file(folder: Path) -> Path:
    (folder / "tower.pt").write_text("weights: see the other folder\n")
    return folder / "tower.pt"


def image(folder: Path) -> Path:
    return builders.picture(folder, "tower.png")


def other_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "tower.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return folder / "tower.pt"


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def truncated_safetensors(folder: Path) -> Path:
    save_file(state(), folder / "tower.safetensors")
    return cut(folder / "tower.safetensors", 0.9)


def truncated_header(folder: Path) -> Path:
    save_file(state(), folder / "tower.safetensors")
    return cut(folder / "tower.safetensors", 0.001)


def truncated_pt(folder: Path) -> Path:
    return cut(towers.write(state(), folder / "tower.pt"), 0.9)


def truncated_legacy(folder: Path) -> Path:
    torch.save(state(), folder / "tower.bin", _use_new_zipfile_serialization=False)
    return cut(folder / "tower.bin", 0.9)


def malicious_pt(folder: Path) -> Path:
    torch.save({"model": state(), "args": Bomb(folder / "boom")}, folder / "tower.pt")
    return folder / "tower.pt"


def malicious_pickle(folder: Path) -> Path:
    (folder / "tower.pt").write_bytes(pickle.dumps(Bomb(folder / "boom"), protocol=2))
    return folder / "tower.pt"


def malicious_legacy(folder: Path) -> Path:
    torch.save({"args": Bomb(folder / "boom")}, folder / "tower.pt", _use_new_zipfile_serialization=False)
    return folder / "tower.pt"


def torchscript(folder: Path) -> Path:
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(folder / "ViT-L-14.pt", "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
    return folder / "ViT-L-14.pt"


def a_list(folder: Path) -> Path:
    torch.save([torch.zeros(2)], folder / "tower.pt")
    return folder / "tower.pt"


def nothing_inside(folder: Path) -> Path:
    torch.save({"epoch": 3, "model": {}}, folder / "tower.pt")
    return folder / "tower.pt"


def language_model(folder: Path) -> Path:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(4, 2),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(4, 2),
    }
    return towers.write(tensors, folder / "tower.pt")


def resnet(folder: Path) -> Path:
    names = ("visual.conv1.weight", "visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding")
    return towers.write({name: torch.zeros(2) for name in names}, folder / "tower.pt")


def siglip_timm(folder: Path) -> Path:
    names = (
        "visual.trunk.patch_embed.proj.weight", "visual.trunk.blocks.0.norm1.weight", "visual.trunk.attn_pool.latent",
        "text.logit_scale",
    )  # fmt: skip
    return towers.write({name: torch.zeros(2) for name in names}, folder / "tower.pt")


def eva_transformers(folder: Path) -> Path:
    tensors = towers.state_of(towers.vision_model())
    tensors["embeddings.patch_embedding.bias"] = torch.zeros(32)
    return towers.write(tensors, folder / "tower.pt")


def no_class_token(folder: Path) -> Path:
    tensors = state()
    del tensors["visual.class_embedding"]
    return towers.write(tensors, folder / "tower.pt")


def no_first_layer(folder: Path) -> Path:
    tensors = {k: v for k, v in state().items() if not k.startswith("visual.transformer.resblocks.0.")}
    return towers.write(tensors, folder / "tower.pt")


def adapter(folder: Path) -> Path:
    tensors = state() | {"visual.transformer.resblocks.0.attn.out_proj.lora_A.weight": torch.zeros(2, 64)}
    return towers.write(tensors, folder / "tower.pt")


def visual_only_layer_scale(folder: Path) -> Path:
    visual = towers.state_of(towers.open_clip_model().visual)
    return towers.write(visual | {"transformer.resblocks.0.ls_1.gamma": torch.zeros(64)}, folder / "tower.pt")


def two_towers(folder: Path) -> Path:
    tensors = state()
    teacher = {f"teacher.{name}": tensor.clone() for name, tensor in tensors.items()}
    return towers.write(tensors | teacher, folder / "tower.pt")


def wrong_shape(folder: Path) -> Path:
    tensors = state()
    tensors["visual.transformer.resblocks.1.ln_2.weight"] = torch.ones(32)
    return towers.write(tensors, folder / "tower.pt")


def quantized(folder: Path) -> Path:
    tensors = state()
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].to(torch.int8)
    return towers.write(tensors, folder / "tower.pt")


def odd_positions(folder: Path) -> Path:
    tensors = state()
    tensors["visual.positional_embedding"] = torch.zeros(9, 64)
    return towers.write(tensors, folder / "tower.pt")


def hf(folder: Path, **changes: object) -> Path:
    """A transformers folder whose config has been edited."""
    towers.vision_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unknown_activation(folder: Path) -> Path:
    return hf(folder, hidden_act="gelu_pytorch_tanh")


def other_width(folder: Path) -> Path:
    return hf(folder, hidden_size=64)


def other_patch(folder: Path) -> Path:
    return hf(folder, patch_size=7)


def other_image_size(folder: Path) -> Path:
    return hf(folder, image_size=56)


def other_depth(folder: Path) -> Path:
    return hf(folder, num_hidden_layers=24)


def whole_mllm(folder: Path) -> Path:
    return hf(folder, model_type="llava")


def no_json(folder: Path) -> Path:
    hf(folder)
    (folder / "config.json").write_text("{")
    return folder


def wrong_type(folder: Path) -> Path:
    return hf(folder, hidden_size="wide")


def no_weights(folder: Path) -> Path:
    hf(folder)
    (folder / "model.safetensors").unlink()
    return folder


def lost_shard(folder: Path) -> Path:
    model = towers.vision_model()
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model-00002-of-00007.safetensors").unlink()
    return folder


def shard_elsewhere(folder: Path) -> Path:
    index = {"weight_map": {"embeddings.class_embedding": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def mixed_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 1, "b": "c"}}))
    return folder


def preprocessor(folder: Path, **fields: object) -> Path:
    hf(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28} | fields))
    return folder


def no_normalization(folder: Path) -> Path:
    return preprocessor(folder, do_normalize=False)


def oblong_pixels(folder: Path) -> Path:
    return preprocessor(folder, size={"height": 28, "width": 42}, do_center_crop=False)


def odd_size(folder: Path) -> Path:
    return preprocessor(folder, size=None, crop_size=None)


def gray_mean(folder: Path) -> Path:
    return preprocessor(folder, image_mean=[0.5])


CASES: dict[Callable[[Path], Path], str] = {
    missing: "{path} does not exist: check the path of the tower",
    empty: "{path} is empty (0 bytes): copy or download it again",
    text_file: "{path} is not a checkpoint: expected safetensors or a file written by torch.save",
    image: "{path} is not a checkpoint: expected safetensors or a file written by torch.save",
    other_zip: "{path} is a zip file, not a checkpoint: expected a file written by torch.save",
    truncated_safetensors: "{path} is truncated or damaged: ",
    truncated_header: "{path} is truncated or damaged: ",
    truncated_pt: "{path} is truncated or damaged: copy or download it again",
    truncated_legacy: "{path} is damaged or not a checkpoint (",
    malicious_pt: "{path} would create objects other than tensors on loading (posix.system); refused, nothing was "
    "run: expected tensors, numbers, text and argparse.Namespace only",
    malicious_pickle: "{path} would create objects other than tensors on loading (",
    malicious_legacy: "{path} would create objects other than tensors on loading (",
    torchscript: "{path} is damaged or not a checkpoint (no module in it has a tensor): copy or download it again",
    a_list: "{path} contains no weights (found a list): expected a dict of tensors, or one under 'model', "
    "'state_dict', 'model_state_dict', 'module'",
    nothing_inside: "{path} contains no weights (found a dict with epoch, model): expected a dict of tensors, or one "
    "under 'model', 'state_dict', 'model_state_dict', 'module'",
    language_model: "{path}: no supported vision tower among 2 tensors, this looks like a language model: "
    "expected a CLIP ViT, DINOv2, DINOv2 with registers, SigLIP or ViT with keys such as 'visual.conv1.weight' or "
    "'vision_model.embeddings.patch_embedding.weight'",
    resnet: "{path}: no supported vision tower among 3 tensors, this looks like a ResNet: expected a CLIP ViT",
    siglip_timm: "{path}: the vision tower lacks 'visual.trunk.attn_pool.kv.bias', 'visual.trunk.attn_pool.kv.weight' "
    "and 25 more: expected every tensor of a SigLIP; save the whole tower again",
    eva_transformers: "{path}: the vision tower has 'embeddings.class_embedding', 'pre_layrnorm.weight' and 1 more, "
    "which a SigLIP does not have: expected a plain SigLIP (transformers or timm)",
    no_class_token: "{path}: the vision tower lacks 'visual.class_embedding': expected every tensor of a CLIP ViT "
    "with a class token; save the whole tower again",
    no_first_layer: "{path}: the vision tower lacks 'visual.transformer.resblocks.0.attn.in_proj_bias', "
    "'visual.transformer.resblocks.0.attn.in_proj_weight' and 10 more: expected every tensor",
    adapter: "{path}: the vision tower has 'visual.transformer.resblocks.0.attn.out_proj.lora_A.weight', which a CLIP "
    "ViT does not have: expected a plain CLIP ViT (open_clip or transformers); merge adapters into the weights first",
    visual_only_layer_scale: "{path}: the vision tower has 'transformer.resblocks.0.ls_1.gamma', which a CLIP ViT "
    "does not have: expected a plain CLIP ViT",
    two_towers: "{path}: found 2 vision towers, at 'teacher.visual.', 'visual.': expected one; save it alone",
    wrong_shape: "{path}: tensor 'encoder.layers.1.layer_norm2.weight' has shape [32]: expected [64] in a tower of "
    "width 64 and patch 14",
    quantized: "{path}: tensor 'embeddings.patch_embedding.weight' is torch.int8: expected floats, not "
    "quantized weights",
    odd_positions: "{path}: the position table has 9 rows: expected a class token and a square grid",
    unknown_activation: "{path}/config.json: field 'hidden_act' is 'gelu_pytorch_tanh': expected gelu or quick_gelu; "
    "a tower with another activation is not supported",
    other_width: "{path}/config.json: field 'hidden_size' is 64, but the weights in {path} have 32: expected the "
    "config of these weights; take both from the same folder",
    other_patch: "{path}/config.json: field 'patch_size' is 7, but the weights in {path} have 14: expected",
    other_image_size: "{path}/config.json: field 'image_size' is 56, but the weights in {path} have 28: expected",
    other_depth: "{path}/config.json: field 'num_hidden_layers' is 24, but the weights in {path} have 3: expected",
    whole_mllm: "{path}/config.json: field 'model_type' is 'llava': expected 'clip_vision_model', 'clip', 'dinov2', "
    "'dinov2_with_registers', 'siglip_vision_model', 'siglip' or 'vit', the folder of a vision tower (a whole "
    "MLLM belongs to ",
    no_json: "{path}/config.json is not JSON: ",
    wrong_type: "{path}/config.json is not a valid config of a CLIP ViT: ",
    no_weights: "folder {path} contains no weights (found: config.json): expected one of model.safetensors.index.json",
    lost_shard: "{path}/model.safetensors.index.json names the shard 'model-00002-of-00007.safetensors', which is not "
    "in {path}: complete the download",
    mixed_index: "{path}/model.safetensors.index.json: field 'weight_map' is missing or empty: expected tensor names",
    no_normalization: "{path}/preprocessor_config.json: field 'do_normalize' is false: expected true, a tower needs "
    "all three steps",
    oblong_pixels: "{path}/preprocessor_config.json: size {{'height': 28, 'width': 42}} with crop 28 does not "
    "give a square image: expected a square",
    odd_size: "{path}/preprocessor_config.json: size None with crop None does not give a square image: "
    "expected a square",
    gray_mean: "{path}/preprocessor_config.json: field 'mean.1' is [0.5]: Field required",
    shard_elsewhere: "{path}/model.safetensors.index.json names the shard '../secret.safetensors', which is not in "
    "{path}: complete the download",
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_bad_towers_are_refused_in_one_line(
    tmp_path: Path,
    make: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make(tmp_path)
    expected = CASES[make].format(path=path)
    with pytest.raises(UserError) as caught:
        inspect_tower(path)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)

    monkeypatch.setattr(sys, "argv", ["mgll-encoder", "convert", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {expected}")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "boom").exists(), "the payload was run"


def test_the_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(malicious_pickle(tmp_path).read_bytes())
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    tensors = state()
    tensors["visual.transformer.resblocks.1.mlp.c_fc.bias"][3] = value
    path = towers.write(tensors, tmp_path / "tower.pt")
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"tensor 'encoder.layers.1.mlp.fc1.bias' contains NaN or infinite values",
    ):
        load_tower(path)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    content = {"model": state(), "optimizer": {"exp_avg": torch.zeros(2**27, dtype=torch.uint8)}}
    torch.save(content, tmp_path / "tower.pt")
    before = resident_bytes()
    checkpoint = open_weights(tmp_path / "tower.pt")
    assert resident_bytes() - before < 2**26
    assert checkpoint.wrapper == {"model", "optimizer"}
    assert all(header.device.type == "meta" for header in checkpoint.headers.values())
    name = "visual.class_embedding"
    torch.testing.assert_close(checkpoint.read([name])[name], content["model"][name])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    model = towers.vision_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = open_weights(tmp_path)
    assert len(checkpoint.files) == len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors = checkpoint.read(checkpoint.headers)
    expected = {name: t for file in checkpoint.files for name, t in load_file(file).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def tied_and_turned() -> dict[str, torch.Tensor]:
    """Tensors as they occur in files: contiguous, views of a storage, transposed, various dtypes, empty."""
    whole = torch.arange(5000.0)
    return {
        "whole": whole, "part": whole[100:300], "turned": torch.arange(6000.0).reshape(60, 100).T,
        "half": torch.full((7, 3), 2.5, dtype=torch.bfloat16), "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3), "none": torch.empty(0, 4),
    }  # fmt: skip


def as_safetensors(path: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in tied_and_turned().items()}, path)


def as_zip(path: Path) -> None:
    torch.save(tied_and_turned(), path)


def as_pickle(path: Path) -> None:
    torch.save(tied_and_turned(), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [as_safetensors, as_zip, as_pickle])
def test_tensors_are_read_from_where_they_lie(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "x.bin")
    opened = open_weights(tmp_path / "x.bin")
    for name, value in tied_and_turned().items():
        found = opened.read([name])[name]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found, value)


LARGER_THAN_ANY_MEMORY = {"weight": ("BF16", (2**42,))}
"""8 TB, all of it a hole."""


def test_the_headers_of_a_safetensors_file_need_no_memory(tmp_path: Path) -> None:
    file = builders.sparse_file(tmp_path / "x.safetensors", LARGER_THAN_ANY_MEMORY)
    assert open_weights(file).headers["weight"].shape == (2**42,)


def test_a_torch_file_that_cannot_be_mapped_is_not_called_damaged(tmp_path: Path) -> None:
    file = builders.sparse_file(tmp_path / "x.bin", LARGER_THAN_ANY_MEMORY)
    with pytest.raises(BadDataError, match=r"x\.bin \(8796\.1 GB\) is larger than the memory"):
        open_weights(file)


@pytest.mark.parametrize("write", [as_safetensors, as_zip])
def test_a_file_that_is_cut_short_after_it_was_opened_is_told(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    """With a memory map, the process would be killed by SIGBUS."""
    path = tmp_path / "x.bin"
    write(path)
    opened = open_weights(path)
    opened.read(["whole"])
    os.truncate(path, 4096)
    for name in ("whole", "turned"):
        with pytest.raises(BadDataError, match=r"x\.bin was truncated while it was read"):
            opened.read([name])
