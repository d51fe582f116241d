import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from eval_mcq.cli.main import main as eval_mcq
from mgll_encoder.common.errors import InvalidArgumentError, UserError
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.stages import LoraSettings, apply_stage, describe, is_adapter, lora_targets
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import Collator, ConversationDataset, prepare_examples
from mllm_adapters.loading.load import load_mllm
from mllm_adapters.loading.quantization import nf4
from mllm_adapters.swap.apply import apply_plan
from mllm_adapters.training.lora import write_adapter
from tests import builders
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters import complete
from tests.mllm_adapters.retraining import color_rows, loud_llava, turns, write_json

RANK = 4

FUSED = ("instructblip", "qwen2-vl", "qwen2_5-vl", "qwen3-vl")
"""Towers whose queries, keys and values are one layer; of these qwen2_5-vl has a gated MLP."""

QUICK = ("llava-hf", "instructblip", "qwen-vl", "qwen3-vl")

ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in complete.BUILDERS
    if name not in ("instructblip-t5", "med-flamingo", "aya-vision")  # the last two: swapped first, see below
]


@pytest.fixture(scope="module")
def place(tiny_llava, tmp_path_factory):
    """A model, data with and without images, a bench."""
    folder = tmp_path_factory.mktemp("place")
    rows = [*color_rows(folder / "images"), {"id": "t", "conversations": turns("Hello", "Hi")}]
    return SimpleNamespace(
        model=loud_llava(tiny_llava, folder / "llava"),
        data=write_json(folder / "train.json", rows),
        images=folder / "images",
        bench=small_bench(folder / "bench", 3),
    )


def tune(place, *more):
    return builders.invoke(
        finetune_lora, "--model", place.model, "--data", place.data, "--images", place.images, "--max-steps", 4,
        "--batch-size", 2, "--learning-rate", 1e-2, "--logging-steps", 1, "--workers", 0, "--report-to", "none",
        "--rank", RANK, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    """What the command leaves behind. Do not write into it."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    outcome = tune(place, "--out", out, "--merge")
    assert outcome.code == 0, outcome.err
    return SimpleNamespace(out=out, merged=out.with_name("out-merged"), shown=outcome.out)


def batch_of(place, processor):
    corpus = read_corpus(place.data, place.images)
    examples, _ = prepare_examples(corpus, processor, 2048, False)
    dataset = ConversationDataset(examples[:2], place.images, processor)
    return Collator(0)([dataset[0], dataset[1]])


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", ROWS)
def test_adapters_of_every_family_are_counted_and_load_with_peft_and_with_ours(
    name, place, request, tmp_path
):
    source = complete.BUILDERS[name](tmp_path / "host", lambda: request.getfixturevalue("golden"))
    checkpoint, family, layout = open_checkpoint(source)
    if layout != "transformers":
        source = apply_plan(family.plan(checkpoint), family, checkpoint, tmp_path / "hf")
    model, processor = load_mllm(source, dtype=torch.float32)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    stage = apply_stage(model, "lora-vision", LoraSettings(RANK))
    assert {key: adapters(stage.adapted, shapes, key) for key in ("language", "tower")} == {
        "language": RANK * language_widths(model), "tower": RANK * tower_widths(name, family, shapes),
    }  # fmt: skip
    untouched, _ = load_mllm(source, dtype=torch.float32)
    assert not set(apply_stage(untouched, "lora").adapted) & set(lora_targets(untouched, "tower"))

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = batch_of(place, processor)
    wanted = logits(model, batch)
    trained = {key: model.get_parameter(key) for key in stage.names}
    folder = write_adapter(source, tmp_path / "adapter", model, trained, stage.adapted, LoraSettings(RANK))
    plain = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    assert (logits(plain, batch) - wanted).abs().max() > 0.01
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(folder)), batch), wanted)
    merged, _ = load_mllm(folder, dtype=torch.float32)
    assert type(merged) is type(untouched)
    torch.testing.assert_close(logits(merged, batch), wanted, atol=1e-5, rtol=1e-5)


def adapters(adapted, shapes, part):
    """Parameters of the adapters inside the language model, or outside of it."""
    inside = [name for name in adapted if ("language_model" in name) == (part == "language")]
    return RANK * sum(sum(shapes[f"{name}.weight"]) for name in inside)


def language_widths(model):
    """Sum of in + out over the layers of a Llama-like language model, by its configuration."""
    c = model.config.get_text_config()
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * head, c.num_key_value_heads * head
    attention = 2 * (c.hidden_size + queries) + 2 * (c.hidden_size + keys)
    return c.num_hidden_layers * (attention + 3 * (c.hidden_size + c.intermediate_size))


def tower_widths(name, family, shapes):
    """Likewise of the tower, by the shape of the first layer of its MLPs."""
    mlps = re.compile(r"\.\d+\.(mlp\.)?(fc1|linear_fc1|gate_proj)\.weight$")
    inside = re.compile(family.spec.tower)
    first = [shape for key, shape in shapes.items() if inside.search(key) and mlps.search(key)]
    mlp, width = first[0]
    attention = 4 * width + 2 * width if name in FUSED else 4 * 2 * width
    return len(first) * (attention + (3 if name == "qwen2_5-vl" else 2) * (width + mlp))


def test_the_command_writes_an_adapter_in_pefts_layout_with_the_projector_in_it(place, tuned):
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "loss.png",
        "recipe.yaml",
    } <= {file.name for file in tuned.out.iterdir()}
    stored = load_file(tuned.out / "adapter_model.safetensors")
    assert "base_model.model.model.multi_modal_projector.linear_1.weight" in stored
    assert not any("vision_tower" in key or "lm_head" in key for key in stored)
    record = json.loads((tuned.out / "training.json").read_text())
    assert (record["command"], record["stage"], record["rank"]) == ("finetune-lora", "lora", RANK)
    assert "layers.{0-1}.self_attn.q_proj" in tuned.shown
    assert "Rows: 9 of 9" in tuned.shown


def test_the_merged_checkpoint_equals_the_model_with_its_adapters_on(place, tuned):
    base = AutoModelForImageTextToText.from_pretrained(place.model)
    _, processor = load_mllm(place.model)
    batch = batch_of(place, processor)
    before = logits(base, batch)
    wanted = logits(PeftModel.from_pretrained(base, str(tuned.out)), batch)
    for folder in (tuned.merged, tuned.out):
        found = logits(load_mllm(folder)[0], batch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - before).abs().max() > 0.01
    assert {file.name for file in place.model.iterdir()} <= {file.name for file in tuned.merged.iterdir()}


def test_an_adapter_folder_is_asked_like_any_model(place, tuned, tmp_path):
    asked = builders.invoke(
        eval_mcq, "run", "--model", tuned.out, "--bench", place.bench, "--out", tmp_path / "run"
    )
    assert asked.code == 0, asked.err
    first = json.loads((tmp_path / "run" / "run.json").read_text())["model_sha256"]
    other = shutil.copytree(tuned.out, tmp_path / "other")
    weights = other / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    asked = builders.refused(
        eval_mcq, "run", "--model", other, "--bench", place.bench, "--out", tmp_path / "run"
    )
    assert first[:12] in asked


def test_an_interrupted_run_goes_on(place, tuned, tmp_path):
    out = tmp_path / "out"
    assert tune(place, "--out", out, "--save-steps", 2).code == 0
    shutil.rmtree(out)
    shutil.rmtree(tmp_path / "out.training" / "checkpoint-4")
    outcome = tune(place, "--out", out, "--save-steps", 2, "--resume")
    assert outcome.code == 0, outcome.err
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (out, tuned.out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_full_stage_writes_a_checkpoint_with_another_tower_and_language_model(place, tmp_path):
    outcome = builders.invoke(
        finetune_lora, "--model", place.model, "--data", place.data, "--images", place.images, "--stage", "full",
        "--max-steps", 2, "--batch-size", 2, "--workers", 0, "--report-to", "none", "--out", tmp_path / "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    before, after = (load_file(folder / "model.safetensors") for folder in (place.model, tmp_path / "out"))
    changed = {key.split(".layers")[0] for key in before if not torch.equal(before[key], after[key])}
    assert any("vision_tower" in key for key in changed)
    assert any("language_model" in key for key in changed)


def test_qlora_quantises_the_language_models_layers_alone_trains_and_merges(place, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the extra 'train'")
    from bitsandbytes.nn import Linear4bit

    config = json.loads((place.model / "config.json").read_text())
    model, _ = load_mllm(
        place.model, dtype=torch.float32, quantization=nf4(config, place.model, torch.float32)
    )
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, kind in kinds.items() if kind is Linear4bit}
    assert quantized == set(lora_targets(model, "language_model"))
    assert {kind for name, kind in kinds.items() if name not in quantized} == {nn.Linear}
    whole, _ = load_mllm(place.model)
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert apply_stage(model, "projector").total == total
    with pytest.raises(InvalidArgumentError, match=r"'full' trains model\.language_model.* frozen in 4-bit"):
        apply_stage(model, "full")
    assert not any(is_adapter(name) for name, _ in model.named_parameters())

    monkeypatch.setenv("MGLL_CACHE_DIR", str(tmp_path / "cache"))
    losses = {}
    for name, more in (("out", ["--merge"]), ("uncached", ["--no-feature-cache"])):
        outcome = tune(place, "--out", tmp_path / name, "--qlora", "--max-steps", 12, *more)
        assert outcome.code == 0, outcome.err
        assert (tmp_path / "cache" / "vision").is_dir()
        record = json.loads((tmp_path / name / "training.json").read_text())
        losses[name] = [loss for _, loss in record["losses"]]
    assert losses["out"][-1] < 0.8 * losses["out"][0]
    assert losses["out"] == pytest.approx(losses["uncached"], abs=1e-5)
    merged = json.loads((tmp_path / "out-merged" / "config.json").read_text())
    assert "quantization_config" not in merged
    assert (
        load_file(tmp_path / "out-merged" / "model.safetensors").keys()
        == load_file(place.model / "model.safetensors").keys()
    )
    load_mllm(tmp_path / "out-merged")


def test_names_are_shown_with_their_numbers_as_ranges():
    assert describe(["a.0.q", "a.1.q", "a.0.k", "a.1.k", "b"]) == ["a.{0-1}.q", "a.{0-1}.k", "b"]


def no_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": "/not/there"})


def nameless(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": None})


def another_method(folder):
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    old = json.loads((folder / "adapter_config.json").read_text())
    write_json(
        folder / "adapter_config.json", {**config, "base_model_name_or_path": old["base_model_name_or_path"]}
    )


def no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (no_base, "its base model /not/there does not exist"),
        (nameless, "does not name its base model"),
        (another_method, "peft_type is .*IA3"),
        (no_weights, r"has no adapter_model\.safetensors"),
    ],
)
def test_adapters_that_cannot_be_loaded_say_why(tuned, tmp_path, spoil, complaint):
    folder = shutil.copytree(tuned.out, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(UserError, match=complaint):
        load_mllm(folder)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--stage", "projector"), "--rank has no effect: stage 'projector' has no adapters"),
        (("--stage", "full"), "--rank has no effect: stage 'full' has no adapters"),
        (("--qlora", "stage=full"), "has no effect|has no adapters"),
        (("--lora-dropout", 1.5), "--lora-dropout is 1.5"),
        (("--recipe", "nowhere.yaml"), "recipe nowhere.yaml does not exist"),
        (("sead=1",), "did you mean 'seed'"),
        (("--deepspeed", "nowhere.json"), "nowhere.json does not exist"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(place, tmp_path, options, complaint):
    outcome = tune(place, "--out", tmp_path / "out", *options)
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2
    assert len(errors) == 1
    assert re.search(complaint, errors[0])
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_trained_further_and_says_what_to_do(place, tuned, tmp_path):
    complaint = builders.refused(
        finetune_lora, "--model", tuned.out, "--data", place.data, "--images", place.images, "--out", tmp_path / "o",
    )  # fmt: skip
    assert "is an adapter: train from its base, or merge it first" in complaint


def test_the_projector_stage_has_a_command_of_its_own(place):
    complaint = builders.refused(
        finetune_lora, "--model", place.model, "--data", place.data, "--images", place.images, "stage=projector",
    )  # fmt: skip
    assert "unknown stage for finetune-lora 'projector'" in complaint
