"""Somebody puts an MGLL tower into a LLaVA."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mgll_encoder import Tower, TowerSpec, load_tower, save_tower
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from mllm_adapters import load_mllm
from mllm_adapters.apply import apply_plan
from mllm_adapters.contract import Plan
from mllm_adapters.registry import open_checkpoint
from tests import builders
from tests.mllm_adapters.test_golden_llava import expand

HOSTS = ["llava", "llava_med"]
SENTENCE = "USER ASSISTANT Which disease does this image show Glaucoma Myopia retina the a"


def swap(source: Path, tower: Path, out: Path, image_size: int | None = None) -> Plan:
    from mgll_encoder import inspect_tower

    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint, inspect_tower(tower), image_size)
    apply_plan(plan, family, checkpoint, out)
    return plan


def a_tower(folder: Path, width: int = 32, image_size: int = 28, seed: int = 5, **rule: object) -> Path:
    """A tower folder as `mgll-encoder` writes it: ImageNet normalisation and squash unless said otherwise."""
    torch.manual_seed(seed)
    config = builders.tower_config(hidden_size=width, image_size=image_size)
    spec = TowerSpec(
        width=width, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=image_size, activation="gelu",
        **rule,
    )  # fmt: skip
    return save_tower(Tower.from_model(CLIPVisionModel(config), spec), folder)


def normalised(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """[n, 3, H, W] on a 0-1 scale -> normalised."""
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture(scope="module", params=HOSTS)
def swapped(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("swap") / "swapped"
    source = golden / request.param / "checkpoint"
    encoder = next((golden / "mgll_official").glob("*.pth"))
    plan = swap(source, encoder, out)
    return SimpleNamespace(plan=plan, out=out, source=source, encoder=encoder, family=golden / request.param)


def test_stock_transformers_loads_the_result_without_this_project(swapped: SimpleNamespace) -> None:
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model, report = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "c = model.config\n"
        "ids = torch.tensor([[1, 5] + [c.image_token_index] * c.image_seq_length + [7, 9]])\n"
        "side = c.vision_config.image_size\n"
        "look = lambda x: model(input_ids=ids, pixel_values=x).logits\n"
        "torch.manual_seed(0)\n"
        "moved = (look(torch.randn(1, 3, side, side)) - look(torch.zeros(1, 3, side, side))).abs().max().item()\n"
        "ours = [m for m in sys.modules if m.split('.')[0] in ('mllm_adapters', 'mgll_encoder')]\n"
        "keys = {k: len(report[k]) for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')}\n"
        "print(json.dumps([keys, moved, ours]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(swapped.out)], cwd="/", capture_output=True, text=True, check=True
    )
    keys, moved, ours = json.loads(run.stdout.splitlines()[-1])
    assert keys == {"missing_keys": 0, "unexpected_keys": 0, "mismatched_keys": 0}
    assert moved > 1e-3
    assert ours == []


def by_hand(swapped: SimpleNamespace, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """MGLL features -> projector -> LM, composed of separately loaded parts."""
    config = json.loads((swapped.out / "config.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(swapped.out.glob("*.safetensors")):
        weights |= load_file(file)
    weights = {name: value.float() for name, value in weights.items()}
    after = swapped.plan.after
    tower = load_tower(swapped.encoder).model
    output = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    hidden = output.hidden_states[after.feature_layer][:, 0 if after.class_token else 1 :]
    part = {k.removeprefix("multi_modal_projector."): v for k, v in weights.items()}
    inner = torch.nn.functional.gelu(hidden @ part["linear_1.weight"].T + part["linear_1.bias"])
    visual = inner @ part["linear_2.weight"].T + part["linear_2.bias"]

    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    text = dict(config["text_config"])
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[text.pop("model_type")](**text)).eval()
    prefix = "language_model."
    if text["tie_word_embeddings"]:
        weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}model.embed_tokens.weight"]
    lm.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    embeddings = lm.get_input_embeddings()(ids)
    embeddings[ids == swapped.plan.image_token_id] = visual.reshape(-1, visual.shape[-1])
    return lm(inputs_embeds=embeddings).logits


def test_the_swapped_model_is_mgll_features_then_projector_then_language_model(
    swapped: SimpleNamespace,
) -> None:
    after = swapped.plan.after
    torch.manual_seed(0)
    picture = torch.rand(1, 3, after.image_size, after.image_size)
    ids = torch.tensor([[1, 5] + [swapped.plan.image_token_id] * after.tokens + [7, 9]])
    model, _ = load_mllm(swapped.out, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=normalised(picture, after.mean, after.std)).logits
        expected = by_hand(swapped, normalised(picture, IMAGENET_MEAN, IMAGENET_STD), ids)
        unfolded = by_hand(swapped, normalised(picture, after.mean, after.std), ids)
    # A host in float16 stores the tower in float16, after folding; the tower by hand was never rounded.
    tolerance = 1e-4 if swapped.plan.config["dtype"] == "float32" else 1e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert (found - unfolded).abs().max() > 5 * tolerance, "the normalisation must have been folded"


def test_the_plan_says_what_changes(swapped: SimpleNamespace) -> None:
    plan = swapped.plan
    assert plan.swapped
    assert plan.processor is None  # the golden folders hold no tokenizer
    assert plan.after.tokens == plan.before.tokens
    config = json.loads((swapped.source / "config.json").read_text())
    own = json.loads((swapped.family / config["mm_vision_tower"] / "config.json").read_text())
    assert (plan.before.activation, plan.after.activation) == (own["vision_config"]["hidden_act"], "gelu")
    assert plan.before.resize == ("pad" if config["image_aspect_ratio"] == "pad" else "crop")
    assert plan.after.resize == "squash"
    assert any(f"<image> = {plan.image_token_id}" in note for note in plan.notes)
    written = {}
    for file in swapped.out.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            written |= {k: tuple(weights.get_slice(k).get_shape()) for k in weights.keys()}  # noqa: SIM118
    assert written == {step.name: step.shape for step in plan.steps}


def test_untouched_tensors_are_bit_equal_and_new_rows_are_the_mean(swapped: SimpleNamespace) -> None:
    checkpoint, _, _ = open_checkpoint(swapped.source)
    found, _ = load_mllm(swapped.out)
    rows = found.get_input_embeddings().weight
    original = checkpoint.read("model.embed_tokens.weight")
    assert torch.equal(rows[: original.shape[0]], original)
    assert rows.shape[0] % 64 == 0
    torch.testing.assert_close(rows[original.shape[0]], original.double().mean(0).to(original.dtype))
    name = "layers.0.mlp.down_proj.weight"
    assert torch.equal(found.model.language_model.get_parameter(name), checkpoint.read(f"model.{name}"))


def the_tower_inside(source: Path, outside: Path, folder: Path) -> Path:
    """A trained tower in the shards, as a folder with the configuration of the one that it comes from."""
    checkpoint, _, _ = open_checkpoint(source)
    prefix = "model.vision_tower.vision_tower."
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    if not names:
        return outside
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (folder / file).write_text((outside / file).read_text())
    state = {name.removeprefix(prefix): checkpoint.read(name).contiguous() for name in names}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("host", HOSTS)
def test_putting_the_hosts_own_tower_in_changes_nothing(host: str, golden: Path, tmp_path: Path) -> None:
    """The strictest control there is: the logits stay those of the original code."""
    source = golden / host / "checkpoint"
    config = json.loads((source / "config.json").read_text())
    tower = golden / host / config["mm_vision_tower"]
    if host == "llava" and config["unfreeze_mm_vision_tower"]:
        tower = the_tower_inside(source, tower, tmp_path / "inside")
    plan = swap(source, tower, tmp_path / "same")
    assert plan.readers == {"multi_modal_projector.linear_1": f"kept ({plan.after.width} wide)"}
    model, _ = load_mllm(tmp_path / "same", dtype=torch.float32)
    expected = load_file(golden / host / "expected.safetensors")
    ids = expand(expected["seq0.input_ids"][0], plan.image_token_id, plan.after.tokens)
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=expected["pixel_values"][:1]).logits
    torch.testing.assert_close(
        found[..., : expected["seq0.logits"].shape[-1]], expected["seq0.logits"], atol=1e-4, rtol=0
    )


# --- the transformers layout -------------------------------------------------------------------------------


def test_a_llava_in_the_transformers_layout_keeps_tokens_and_processor(
    tiny_llava: Path, tmp_path: Path
) -> None:
    tower = a_tower(tmp_path / "tower", image_size=56)
    plan = swap(tiny_llava, tower, tmp_path / "out")
    assert (plan.before.tokens, plan.after.tokens) == (4, 4)
    assert any("resampled from 4x4 to 2x2" in note for note in plan.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]}],
        add_generation_prompt=True,
    )
    picture = Image.new("RGB", (60, 30), (10, 200, 30))
    batch = processor(text=[text], images=[picture], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == 4
    assert torch.isfinite(model(**batch).logits).all()

    squashed = torch.tensor([10, 200, 30]).view(3, 1, 1).expand(3, 28, 28) / 255
    expected = normalised(squashed[None], CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=0)


def test_another_image_size_changes_the_number_of_tokens_everywhere(tiny_llava: Path, tmp_path: Path) -> None:
    plan = swap(tiny_llava, a_tower(tmp_path / "tower"), tmp_path / "out", image_size=42)
    assert plan.after.tokens == 9
    model, processor = load_mllm(tmp_path / "out")
    assert model.config.image_seq_length == 9
    assert model.config.vision_config.image_size == 42
    batch = processor(text=["<image>?"], images=[Image.new("RGB", (9, 9))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == 9
    assert batch["pixel_values"].shape[-2:] == (42, 42)
    model(**batch)


def test_shards_without_a_tower_tensor_are_hard_linked(tiny_llava: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    model, processor = load_mllm(tiny_llava)
    model.save_pretrained(source, max_shard_size="40KB")
    processor.save_pretrained(source)
    plan = swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    inodes = {file.stat().st_ino for file in source.glob("*.safetensors")}
    linked = [file for file in (tmp_path / "out").glob("*.safetensors") if file.stat().st_ino in inodes]
    assert linked
    again, _ = load_mllm(tmp_path / "out")
    for name, value in model.named_parameters():
        if "vision_tower" not in name:
            assert torch.equal(again.get_parameter(name), value), name
    held = load_tower(tmp_path / "tower").model
    projection = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(again.model.vision_tower.get_parameter(projection), held.get_parameter(projection))
    assert plan.swapped


def test_a_swap_can_be_swapped_again(tiny_llava: Path, tmp_path: Path) -> None:
    swap(tiny_llava, a_tower(tmp_path / "one", seed=1), tmp_path / "first")
    swap(tmp_path / "first", a_tower(tmp_path / "two", seed=2), tmp_path / "second")
    swap(tiny_llava, tmp_path / "two", tmp_path / "direct")
    again, direct = load_mllm(tmp_path / "second")[0], load_mllm(tmp_path / "direct")[0]
    for name, value in direct.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name


# --- the original layout, with a tokenizer -----------------------------------------------------------------


def original_llava(
    golden: Path, host: str, folder: Path, *, sharded: bool = True, drop_projector: bool = False
) -> Path:
    """A golden checkpoint completed with a tokenizer, as the published folders are."""
    source = golden / host / "checkpoint"
    checkpoint, _, _ = open_checkpoint(source)
    state = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    if drop_projector:
        state = {k: v for k, v in state.items() if "mm_projector" not in k}
    folder.mkdir(parents=True)
    tokenizer = builders.byte_tokenizer()
    size = len(tokenizer)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(state):
        state[name] = state[name][torch.arange(size) % state[name].shape[0]]
    config = dict(checkpoint.config, vocab_size=size, mm_vision_tower="towers/clip")
    (folder / "config.json").write_text(json.dumps(config))
    tower = golden / host / checkpoint.config["mm_vision_tower"]
    (folder / "towers").mkdir()
    (folder / "towers" / "clip").symlink_to(tower.absolute())
    if sharded:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("host", "prompt"),
    [
        (
            "llava",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nWhich disease? ASSISTANT: B</s>"
            "USER: Sure? ASSISTANT:",
        ),
        ("llava_med", "[INST] <image>\nWhich disease? [/INST] B</s>[INST] Sure? [/INST]"),
    ],
)
def test_conversion_brings_processor_and_the_familys_prompt(
    host: str, prompt: str, golden: Path, tmp_path: Path
) -> None:
    source = original_llava(golden, host, tmp_path / "original")
    checkpoint, family, layout = open_checkpoint(source)
    assert layout == "original"
    apply_plan(family.plan(checkpoint), family, checkpoint, tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "B"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == prompt
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = processor(text=[prompt], images=[Image.new("RGB", (60, 30))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == model.config.image_seq_length
    direct, own = load_mllm(source)
    assert own is not None
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, direct(**batch).logits, atol=1e-5, rtol=0)
    again, family_again, layout_again = open_checkpoint(tmp_path / "converted")
    assert (family_again.spec.name, layout_again) == (family.spec.name, "transformers")
    assert again.config["model_type"] == "llava"


def test_a_projector_in_its_own_file_is_found(golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original", drop_projector=True)
    with pytest.raises(UserError, match=r"no projector, neither in its shards nor as mm_projector\.bin"):
        load_mllm(source)
    original, _, _ = open_checkpoint(golden / "llava" / "checkpoint")
    state = {name: original.read(name) for name in original.tensors if "mm_projector" in name}
    torch.save(state, source / "mm_projector.bin")
    model, _ = load_mllm(source)
    expected = state["model.mm_projector.2.weight"]
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, expected)


def test_the_language_model_is_the_original_one(golden: Path, tmp_path: Path) -> None:
    """Rope base and grouped heads survive: text-only logits equal those of the plain language model."""
    source = original_llava(golden, "llava", tmp_path / "original", sharded=False)
    model, _ = load_mllm(source, dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    rows = model.get_input_embeddings().num_embeddings
    settings = {name: config[name] for name in same}
    lm = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope, vocab_size=rows)).eval()
    state = load_file(source / "model.safetensors")
    state = {k: v for k, v in state.items() if "mm_projector" not in k and "vision_tower" not in k}
    state["model.embed_tokens.weight"] = model.get_input_embeddings().weight.detach()
    state["lm_head.weight"] = model.lm_head.weight.detach()
    lm.load_state_dict(state)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, lm(input_ids=ids).logits)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_a_trained_tower_in_the_shards_counts_where_the_original_code_reads_it(
    host: str, trained: bool, golden: Path, tmp_path: Path
) -> None:
    """LLaVA takes it if told that it was trained; LLaVA-Med always reads the tower that it names."""
    source = original_llava(golden, host, tmp_path / "original", sharded=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "unfreeze_mm_vision_tower": trained}))
    named = load_tower(source / "towers" / "clip").model.state_dict()
    weights = load_file(source / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.vision_model.{k}": v + 1 for k, v in named.items()}
    save_file({**weights, **inside}, source / "model.safetensors", metadata={"format": "pt"})
    found = load_mllm(source, dtype=torch.float32)[0].model.vision_tower.embeddings.class_embedding
    shift = 1 if trained and host == "llava" else 0
    torch.testing.assert_close(found, named["embeddings.class_embedding"] + shift)


def test_weights_say_how_large_the_vocabulary_is(golden: Path, tmp_path: Path) -> None:
    """Fine-tunes with added tokens often keep the old vocab_size in their config.json."""
    source = original_llava(golden, "llava", tmp_path / "original")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    model, processor = load_mllm(source)
    assert model.config.text_config.vocab_size == len(builders.byte_tokenizer())
    assert model.config.image_token_index == processor.image_token_id


def test_dtype_is_the_language_models_not_that_of_the_first_tensor(golden: Path, tmp_path: Path) -> None:
    source = original_llava(golden, "llava", tmp_path / "original", sharded=False)
    weights = {k: v.half() for k, v in load_file(source / "model.safetensors").items()}
    first = min(weights, key=lambda name: "embed_tokens" in name)
    save_file({**weights, first: weights[first].float()}, source / "model.safetensors")
    assert open_checkpoint(source)[1].plan(open_checkpoint(source)[0]).config["dtype"] == "float16"


def test_a_float16_tower_is_fitted_in_the_hosts_precision(tiny_llava: Path, tmp_path: Path) -> None:
    """Folding rounds to the host's float32, not to the tower's float16."""
    tower = a_tower(tmp_path / "tower")
    weights = {name: value.half() for name, value in load_file(tower / "model.safetensors").items()}
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    swap(tiny_llava, tower, tmp_path / "out")
    found = load_mllm(tmp_path / "out")[0].model.vision_tower.embeddings.patch_embedding.weight.detach()
    scale = torch.tensor(CLIP_STD).double() / torch.tensor(IMAGENET_STD).double()
    (name,) = (name for name in weights if name.endswith("patch_embedding.weight"))
    expected = weights[name].double() * scale[None, :, None, None]
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-6)


def test_published_processor_files_of_old_are_read(tiny_llava: Path, tmp_path: Path) -> None:
    """llava-hf: flat preprocessor_config.json, chat_template.json, a processor_config.json without image processor."""
    source = Path(shutil.copytree(tiny_llava, tmp_path / "old"))
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    settings = {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
    }  # fmt: skip
    (source / "processor_config.json").write_text(json.dumps(settings))
    (source / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28})
    )
    plan = swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    assert (plan.before.resize, plan.after.resize) == ("crop", "squash")
    assert load_mllm(tmp_path / "out")[1].chat_template == template
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").unlink()
    plan = swap(source, tmp_path / "tower", tmp_path / "assumed")
    assert any("has no image processor" in note for note in plan.notes)
    assert load_mllm(tmp_path / "assumed")[1].chat_template == template


def test_without_a_tokenizer_the_preprocessing_travels_all_the_same(
    swapped: SimpleNamespace, tmp_path: Path
) -> None:
    settings = json.loads((swapped.out / "preprocessor_config.json").read_text())
    assert settings["size"] == {
        "height": swapped.plan.after.image_size,
        "width": swapped.plan.after.image_size,
    }
    assert settings["do_center_crop"] is False
    plan = swap(swapped.out, swapped.encoder, tmp_path / "again")
    assert plan.before == swapped.plan.after


def test_the_result_of_a_read_only_source_can_be_written(tiny_llava: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    for file in source.iterdir():
        file.chmod(0o444)
    swap(source, a_tower(tmp_path / "tower"), tmp_path / "out")
    assert all(f.stat().st_mode & 0o200 for f in (tmp_path / "out").glob("*.json"))


def test_the_model_card_says_what_the_checkpoint_is_made_of(swapped: SimpleNamespace) -> None:
    card = (swapped.out / "README.md").read_text()
    assert f"`{swapped.encoder.name}`" in card
    assert "multi_modal_projector.linear_1" in card
    assert f"| activation | {swapped.plan.before.activation} | gelu |" in card
    assert str(swapped.source.absolute().parent) not in card, "a card is published: no paths of this machine"


# --- killed ------------------------------------------------------------------------------------------------


def test_a_killed_swap_leaves_nothing_that_loads(golden: Path, tmp_path: Path) -> None:
    """Fork children that kill themselves after so many tensors; nothing may stand under the output's name."""
    script = f"""
import os, signal, sys
from pathlib import Path
from mgll_encoder import inspect_tower
from mllm_adapters.apply import apply_plan
from mllm_adapters.registry import open_checkpoint
import torch
torch.set_num_threads(1)
checkpoint, family, _ = open_checkpoint(Path({str(golden / "llava" / "checkpoint")!r}))
(encoder,) = Path({str(golden / "mgll_official")!r}).glob("*.pth")
plan = family.plan(checkpoint, inspect_tower(encoder))
out = Path({str(tmp_path / "out")!r})
for moment in [0, 1, 5, 20, 40, len(plan.steps) - 2, len(plan.steps) - 1]:
    child = os.fork()
    if child == 0:
        count = 0
        def progress(_):
            global count
            count += 1
            if count > moment:
                os.kill(os.getpid(), signal.SIGKILL)
        apply_plan(plan, family, checkpoint, out, progress=progress)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
    assert not out.exists(), moment
    assert not list(out.parent.rglob("config.json")), "what a kill leaves behind is no checkpoint"
apply_plan(plan, family, checkpoint, out)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    load_mllm(tmp_path / "out")


# --- the tokenizer that LLaVA-1.5 was published with: a SentencePiece model and nothing else ----------------


def sentencepiece_tokenizer(folder: Path, tokenizer_class: str = "LlamaTokenizer") -> None:
    """A small model trained with LLaMA's settings, and a tokenizer_config.json as vicuna has it."""
    words = SENTENCE.split(" ")
    text = folder / "corpus.txt"
    text.write_text("\n".join(" ".join(words[i % 7 : i % 7 + 6]) for i in range(300)))
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=310, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    text.unlink()
    settings = {
        "tokenizer_class": tokenizer_class, "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_sentencepiece(
    golden: Path, host: str, folder: Path, tokenizer_class: str = "LlamaTokenizer"
) -> Path:
    source = original_llava(golden, host, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    sentencepiece_tokenizer(source, tokenizer_class)
    return source


@pytest.mark.parametrize("host", HOSTS)
def test_text_is_cut_as_the_sentencepiece_model_cuts_it(host: str, golden: Path, tmp_path: Path) -> None:
    source = with_sentencepiece(golden, host, tmp_path / "original")
    reference = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint)
    apply_plan(plan, family, checkpoint, tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    text = "USER: Which disease?\nA. Glaucoma ASSISTANT:"
    assert processor.tokenizer(text).input_ids == [1, *reference.encode(text)]
    image = processor(text=["USER: <image>\nWhich"], images=[Image.new("RGB", (9, 9))])["input_ids"][0]
    assert image.count(processor.image_token_id) == plan.after.tokens


def test_a_tokenizer_that_would_be_misread_is_refused(golden: Path, tmp_path: Path) -> None:
    """Under a foreign class the first word loses its space, silently; transformers' AutoTokenizer does so."""
    source = with_sentencepiece(golden, "llava", tmp_path / "original", tokenizer_class="")
    with pytest.raises(UserError, match="in another way than its SentencePiece model"):
        load_mllm(source)
