"""swap-encoder at the terminal: the good path, and every wrong one in one line."""

import json
import resource
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_adapters.cli.swap import main
from mllm_adapters.core.hub_resolve import resolve
from tests.builders import invoke, refused
from tests.mllm_adapters.llava_checkpoints import a_tower, original_llava


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return a_tower(tmp_path / "mgll-tiny")


def test_a_swap_prints_its_plan_and_the_next_command(
    tiny_llava: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke(main, "--mllm", tiny_llava, "--encoder", tower)
    assert outcome.code == 0, outcome.err
    assert "per image" in outcome.out
    following = "Next: retrain-projector --model tiny-llava-mgll-tiny --data train.json --images images/"
    assert following in outcome.out.splitlines()
    assert (tmp_path / "tiny-llava-mgll-tiny" / "config.json").is_file()
    record = json.loads((tmp_path / "tiny-llava-mgll-tiny" / "mgll_swap.json").read_text())
    assert record["plan"]["after"]["tokens"] == 4


def test_the_next_command_can_be_typed_where_a_path_has_a_space(
    tiny_llava: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--delta-only", "--out", "my delta")
    assert written.code == 0, written.err
    (line,) = (line for line in written.out.splitlines() if line.startswith("Next: "))
    done = invoke(main, *shlex.split(line)[2:])
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("Next: ")


def test_dry_run_writes_nothing_and_json_is_json(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["family"] == "llava"
    assert {step["operation"] for step in plan["steps"]} == {"keep", "tower"}
    assert not out.exists()


def test_an_existing_output_is_only_replaced_on_demand(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    assert "exists" in refused(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out)
    assert (out / "precious").read_text() == "kept"
    assert invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", out, "--force").code == 0
    assert not (out / "precious").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("where", ["mllm", "mllm/../mllm", "link", "", "tower"])
def test_force_never_replaces_an_input(where: str, tiny_llava: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    source, tower = copied(tiny_llava, inputs / "mllm"), a_tower(inputs / "tower")
    (inputs / "link").symlink_to(source)
    before = contents(inputs)
    message = refused(main, "--mllm", source, "--encoder", tower, "--out", inputs / where, "--force")
    assert f" the input {tower if where == 'tower' else source}: choose another --out" in message
    assert contents(inputs) == before


def test_an_output_inside_the_source_leaves_the_source_alone(
    tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    source = copied(tiny_llava, tmp_path / "source")
    before = contents(source)
    outcome = invoke(main, "--mllm", source, "--encoder", tower, "--out", source / "swapped")
    assert outcome.code == 0, outcome.err
    assert contents(source).items() >= before.items()


def test_an_output_that_cannot_be_written_is_one_line(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert f"{tmp_path / 'file'} is a file, expected a folder" in refused(
        main, "--mllm", tiny_llava, "--encoder", tower, "--out", out
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the same OSError, in the midst of writing."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        message = refused(main, "--mllm", tiny_llava, "--encoder", tower, "--out", tmp_path / "full" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "cannot be written" in message
    assert list((tmp_path / "full").iterdir()) == []


def test_with_json_a_swap_prints_nothing_else_on_stdout(
    tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    outcome = invoke(main, "--mllm", tiny_llava, "--encoder", tower, "--out", tmp_path / "out", "--json")
    assert json.loads(outcome.out)["swapped"]
    assert "Next: retrain-projector" in outcome.err


def test_paths_may_hold_brackets(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    source, out = copied(tiny_llava, tmp_path / "s[red]"), tmp_path / "o[bold]"
    outcome = invoke(main, "--mllm", source, "--encoder", tower, "--out", out)
    assert f"Written: {out}" in outcome.out
    assert "s[red]" in outcome.out.replace("\n", "").replace(" ", "")


def test_help_shows_an_example() -> None:
    outcome = invoke(main, "--help")
    assert outcome.code == 0
    assert "swap-encoder --mllm llava-med --encoder mgll-fundus.pt" in outcome.out


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def edited(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def truncated(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def without_index_shard(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    return folder


def with_tensor_twice(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    save_file(weights, folder / "one.safetensors")
    save_file({"extra": torch.zeros(1), **dict([weights.popitem()])}, folder / "two.safetensors")
    names = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
    index = {"weight_map": {**names, "extra": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    return folder


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def without(folder: Path, part: str) -> Path:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if part in name]:
            del weights[name]

    return with_weights(folder, drop)


def with_bytes(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


def with_index(folder: Path, weight_map: object) -> Path:
    (file,) = folder.glob("*.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()
    return folder


def quantized_tower(weights: dict[str, torch.Tensor]) -> None:
    weights.update({name: value.to(torch.int8) for name, value in weights.items() if "vision" in name})


def within(folder: Path, part: str, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    return edited(folder, **{part: {**config[part], **changes}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edited(f, model_type="llama"), "no known family has model_type 'llama'"),
        (lambda f: edited(f, vision_feature_layer=[-2, -3]), "vision_feature_layer is [-2, -3]: Input should be"),
        (truncated, "truncated or damaged"),
        (without_index_shard, "shard model-00001-of-00002.safetensors is missing"),
        (with_tensor_twice, "is in both one.safetensors and two.safetensors"),
        (lambda f: within(f, "vision_config", hidden_size=48), "describes a tower of 2x2 patches and width 48"),
        (lambda f: (f / "config.json").write_text("{") and f, "config.json is not JSON"),
        (lambda f: (f / "config.json").unlink() or f, "is not a checkpoint folder"),
        (lambda f: (f / "model.safetensors").unlink() or f, "holds a config.json but no weights"),
        (lambda f: without(f, "layers.1.mlp.up_proj"), "1 missing tensors, first model.language_model.layers.1"),
        (lambda f: with_weights(f, lambda w: w.update(foo=torch.ones(2))), "1 unexpected tensors, first foo"),
        (lambda f: without(f, "linear_1"), "linear_1.weight is missing: is this the language model only?"),
        (lambda f: within(f, "text_config", hidden_size=64), "mismatched tensors, first lm_head.weight of shape ["),
        (lambda f: with_index(f, {"a": 5}), "field 'weight_map' is missing or damaged"),
        (lambda f: with_index(f, {"a": "../x.safetensors"}), "shard ../x.safetensors is missing"),
        (lambda f: with_bytes(f, "config.json", b"\xff\xfe{}"), "config.json is not UTF-8 text"),
        (lambda f: with_bytes(f, "tokenizer.json", b'{"version": "1.0"}'), "the files of its tokenizer are damaged"),
        (lambda f: edited(f, dtype="float99"), "dtype is 'float99': Input should be 'float32'"),
        (lambda f: edited(f, quantization_config={"bits": 4}), "quantization_config says unknown method: quantized"),
        (lambda f: edited(f, vision_config=None), "vision_config is None: Input should be a valid dictionary"),
        (lambda f: edited(f, text_config={"model_type": "foo"}), "transformers cannot use this configuration"),
        (lambda f: within(f, "vision_config", patch_size=0), "field 'patch_size' is 0"),
        (lambda f: within(f, "vision_config", hidden_act="gelu_new"), "field 'activation' is 'gelu_new'"),
        (lambda f: edited(f, image_token_index=9, image_token_id=9), "gives <image> the id 3, expected 9"),
        (lambda f: edited(f, vision_feature_layer=5), "reads hidden layer 5, but this tower has only 3 blocks"),
        (lambda f: with_weights(f, quantized_tower), "the host's weights are int8"),
    ],
)  # fmt: skip
def test_a_spoilt_checkpoint_is_refused_in_one_line(
    spoil, message: str, tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    source = spoil(copied(tiny_llava, tmp_path / "spoilt"))
    out = tmp_path / "out"
    assert message in refused(main, "--mllm", source, "--encoder", tower, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "config.json says that the projector is linear, but"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-OneVision cut an image into views (anyres)"),
        ({"mm_use_im_start_end": True}, "its tokenizer does not have them within the"),
        ({"mm_vision_tower": None}, "names no vision tower: set mm_vision_tower to the one"),
        ({"mm_vision_select_layer": "x"}, "mm_vision_select_layer is 'x': Input should be a valid integer"),
        ({"num_hidden_layers": "two"}, "Field 'num_hidden_layers' expected int"),
        ({"num_hidden_layers": 99}, "do not belong together; take the config.json"),
        ({"intermediate_size": 7}, "mismatched tensors"),
        (
            {"hidden_act": "junk"},
            "cannot be read: 'junk' is missing from it, or is not known to transformers",
        ),
        ({"architectures": "LlavaLlamaForCausalLM"}, "field 'architectures' is 'LlavaLlamaForCausalLM'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "but the host's tower has width 1024"),
        (
            {"mm_vision_tower": "google/siglip"},
            "mm_vision_tower is 'google/siglip': checkpoints with a siglip tower are not supported",
        ),
        (
            {"mm_vision_tower": "me/my-tower"},
            "its vision tower 'me/my-tower' is not in the checkpoint",
        ),
    ],
)
def test_an_unsupported_variant_is_refused_by_field(
    changes: dict[str, object], message: str, golden: Path, tower: Path, tmp_path: Path
) -> None:
    source = edited(original_llava(golden, "llava", tmp_path / "original"), **changes)
    assert message in refused(main, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")


def test_a_tensor_that_is_no_part_of_llava_is_refused(golden: Path, tower: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original", safetensors=True)
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "model.resampler.query": torch.zeros(2)}, source / "model.safetensors")
    message = refused(main, "--mllm", source, "--encoder", tower, "--out", tmp_path / "out")
    assert "tensor model.resampler.query is not part of a LLaVA checkpoint" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mllm", "lava-med"], "did you mean 'llava-med'?"),
        (["--mllm", "/no/such/folder"], "checkpoint folder /no/such/folder does not exist"),
        (["--encoder", "/no/such.pt"], "/no/such.pt does not exist"),
        (["--image-size", "0"], "Invalid value for '--image-size'"),
        (["--image-size", "5"], "--image-size 5 is not a multiple of the tower's patch size 14: try 14"),
        (["--image-size", "30"], "--image-size 30 is not a multiple of the tower's patch size 14: try 28"),
        (["--activation", "relu"], "unknown activation 'relu'"),
        (["--activation", "quick_gelu"], "--activation quick_gelu contradicts 'gelu'"),
        (["--imagesize", "28"], "no such option"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    arguments: list[str], message: str, tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    given = {"--mllm": str(tiny_llava), "--encoder": str(tower), "--out": str(tmp_path / "out")}
    given[arguments[0]] = arguments[1]
    line = refused(main, *[word for pair in given.items() for word in pair])
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "said"), [("--mllm", "checkpoint folder example/lava"), ("--encoder", "example/lava")]
)
def test_a_mistyped_folder_is_a_path_not_a_hub_id(
    option: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--mllm example/lava` spoke of the Hugging Face cache after eight seconds of looking for the hub."""
    (tmp_path / "example" / "llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    given = {"--mllm": "example/llava", "--encoder": "example/llava", option: "example/lava"}
    line = refused(main, *[word for pair in given.items() for word in pair])
    assert line == f"{said} does not exist: did you mean 'example/llava'?"


def test_forgetting_the_encoder_says_what_to_type() -> None:
    assert "--encoder is missing" in refused(main, "--mllm", "llava-med")


def test_a_converted_checkpoint_needs_no_conversion(tiny_llava: Path, tmp_path: Path) -> None:
    message = refused(main, "convert", "--mllm", tiny_llava, "--out", tmp_path / "out")
    assert "already in the transformers layout" in message


def test_a_family_name_is_found_in_the_hub_cache(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's layout: blobs, and snapshots that link to them."""
    repo = tmp_path / "hub" / "models--microsoft--llava-med-v1.5-mistral-7b"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for file in tiny_llava.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve("llava-med") == snapshot
    outcome = invoke(
        main, "--mllm", "llava-med", "--encoder", a_tower(tmp_path / "t"), "--out", tmp_path / "o"
    )
    assert outcome.code == 0, outcome.err


def test_offline_a_family_name_says_how_to_pass_a_folder(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    message = refused(main, "--mllm", "llava-med", "--encoder", tower, "--out", tmp_path / "out")
    assert "'microsoft/llava-med-v1.5-mistral-7b' is not a local file or folder" in message
    assert "pass the folder of a downloaded checkpoint" in message
