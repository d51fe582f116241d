"""LLaVA folders that hold no language model: a projector, or a LoRA adapter with its projector."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from mgll_encoder.common.errors import (
    BadDataError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
)
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from mllm_adapters.core.registry import open_checkpoint
from tests import builders
from tests.builders import invoke, refused
from tests.mllm_adapters.families.llava import expand
from tests.mllm_adapters.llava_checkpoints import (
    HOSTS,
    a_tower,
    convert,
    edit_config,
    golden_tensors,
    lora_folder,
    projector_only,
)

KINDS = {"projector": projector_only, "lora": lora_folder}


def golden_logits(golden: Path, host: str, model) -> tuple[Tensor, Tensor]:
    """Logits of a model and of the original code, about one image."""
    expected = load_file(golden / host / "expected.safetensors")
    tokens = expected["visual_tokens"].shape[1]
    ids = expand(expected["seq0.input_ids"][0], model.config.image_token_id, tokens)
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=expected["pixel_values"][:1]).logits
    return found[..., : expected["seq0.logits"].shape[-1]], expected["seq0.logits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_checkpoint_taken_apart_gives_the_original_logits(
    host: str, kind: str, golden: Path, tmp_path: Path
) -> None:
    """The base lies beside it, under the name that it calls it by; the folder around both is enough."""
    KINDS[kind](golden, host, tmp_path)
    model, processor = load_mllm(tmp_path, dtype=torch.float32)
    assert processor is None
    found, expected = golden_logits(golden, host, model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_without_the_adapter_it_would_be_another_model(golden: Path, tmp_path: Path) -> None:
    """Negative control: the base alone is far from the golden logits."""
    source = lora_folder(golden, "llava", tmp_path)
    adapter = torch.load(source / "adapter_model.bin")
    torch.save({k: v * ("lora_A" in k) for k, v in adapter.items()}, source / "adapter_model.bin")
    found, expected = golden_logits(golden, "llava", load_mllm(source, dtype=torch.float32)[0])
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("rslora", "safetensors"), [(False, True), (True, False)])
def test_lora_is_merged_as_peft_merges_it(
    rslora: bool, safetensors: bool, golden: Path, tmp_path: Path
) -> None:
    """Every linear layer of the language model, as LLaVA's training code chooses them."""
    source = lora_folder(golden, "llava", tmp_path)
    for file in source.glob("adapter*"):
        file.unlink()
    torch.manual_seed(0)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=linear, use_rslora=rslora, task_type="CAUSAL_LM")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "vicuna"), settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "peft")
    shutil.copy(tmp_path / "peft" / "adapter_config.json", source)
    edit_config(source, "adapter_config.json", base_model_name_or_path="vicuna")
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    if safetensors:
        shutil.copy(tmp_path / "peft" / "adapter_model.safetensors", source)
    else:
        torch.save(weights, source / "adapter_model.bin")
    model, _ = load_mllm(source, dtype=torch.float32)
    reference = wrapped.merge_and_unload().state_dict()
    moved = 0.0
    base = torch.load(tmp_path / "vicuna" / "pytorch_model.bin")
    for name, value in model.model.language_model.state_dict().items():
        expected = reference[f"model.{name}"]
        torch.testing.assert_close(value[: len(expected)], expected, atol=1e-6, rtol=0, msg=name)
        if name.endswith("gate_proj.weight"):
            moved = max(moved, float((value - base[f"model.{name}"]).abs().max()))
    assert moved > 0.1, "negative control: unmerged weights are far off"


def test_the_merged_folder_is_no_adapter(golden: Path, tmp_path: Path) -> None:
    """transformers would load the base and put the adapter on it, if adapter_config.json came along."""
    source = lora_folder(golden, "llava", tmp_path)
    plan = convert(source, tmp_path / "out")
    assert plan.layout == "lora"
    assert any("merged with LoRA (rank 3, scale 2)" in note for note in plan.notes)
    assert {step.dtype for step in plan.steps if "vision_tower" not in step.name} == {"float32"}
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found, expected = golden_logits(golden, "llava", model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_tower_that_are_elsewhere_are_given_as_parts(
    kind: str, golden: Path, tmp_path: Path
) -> None:
    """At the terminal, with the base's tokenizer; the tower takes part in a conversion only."""
    source = KINDS[kind](golden, "llava", tmp_path, base="lmsys/vicuna-7b-v1.5")
    base, tower = (tmp_path / "vicuna").rename(tmp_path / "elsewhere"), tmp_path / "clip"
    config = json.loads((source / "config.json").read_text())
    tower.symlink_to((golden / "llava" / config["mm_vision_tower"]).absolute())
    edit_config(source, mm_vision_tower="checkpoints/clip_336", unfreeze_mm_vision_tower=False)
    tokenizer = builders.byte_tokenizer()
    weights = torch.load(base / "pytorch_model.bin")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(weights):
        weights[name] = weights[name][torch.arange(len(tokenizer)) % len(weights[name])]
    torch.save(weights, base / "pytorch_model.bin")
    tokenizer.save_pretrained(base)
    lines = ["convert", "--mllm", source, "--out", tmp_path / "out", "--part", f"base={base}"]
    assert "pass --part vision-tower=PATH" in refused(main, *lines)
    outcome = invoke(main, *lines, "--part", f"vision-tower={tower}")
    assert outcome.code == 0, outcome.err
    assert "the language model is elsewhere" in outcome.err
    record = json.loads((tmp_path / "out" / "mgll_swap.json").read_text())
    assert record["plan"]["parts"] == {"base": base.name}
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")

    encoder = a_tower(tmp_path / "mgll", width=config["mm_hidden_size"])
    lines = ["--mllm", source, "--encoder", encoder, "--part", f"base={base}", "--out", tmp_path / "new"]
    outcome = invoke(main, *lines, "--part", f"vision-tower={tower}")
    assert outcome.code == 0, outcome.err
    load_mllm(tmp_path / "new")
    message = refused(main, *lines, "--force", "--part", f"vision-tower={tmp_path / 'nothing'}")
    assert "does not exist" in message


def test_the_output_is_never_the_base(golden: Path, tmp_path: Path) -> None:
    source = projector_only(golden, "llava", tmp_path)
    base = tmp_path / "vicuna"
    message = refused(main, "convert", "--mllm", source, "--part", f"base={base}", "--out", base, "--force")
    assert f"the input {base}: choose another --out" in message
    assert (base / "pytorch_model.bin").is_file()


def spoilt_adapter(source: Path, **changes: object) -> Path:
    return edit_config(source, "adapter_config.json", **changes)


def with_adapter(source: Path, change) -> Path:
    weights = torch.load(source / "adapter_model.bin")
    change(weights)
    torch.save(weights, source / "adapter_model.bin")
    return source


def rename_one(weights: dict[str, Tensor], old: str, new: str) -> None:
    name = next(name for name in weights if old in name)
    weights[name.replace(old, new)] = weights.pop(name)


LORA_FAULTS = {
    "dora": (lambda f: spoilt_adapter(f, use_dora=True), "adapter_config.json: use_dora is True"),
    "ranks": (lambda f: spoilt_adapter(f, rank_pattern={"q_proj": 8}), "rank_pattern is {'q_proj': 8}"),
    "pissa": (lambda f: spoilt_adapter(f, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "kind": (lambda f: spoilt_adapter(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "rank": (lambda f: spoilt_adapter(f, r=8), "which are not an update of rank 8"),
    "half": (
        lambda f: with_adapter(f, lambda w: w.pop(next(n for n in w if "lora_B" in n))),
        "the adapter has only one of two matrices for model.layers.0.",
    ),
    "depth": (
        lambda f: with_adapter(f, lambda w: [rename_one(w, "layers.0.", "layers.99.") for _ in range(2)]),
        "the adapter changes model.layers.99.",
    ),
    "head": (
        lambda f: with_adapter(f, lambda w: w.update({
            "base_model.model.lm_head.lora_A.weight": torch.zeros(3, 4),
            "base_model.model.lm_head.lora_B.weight": torch.zeros(4, 3),
        })),
        "the adapter changes lm_head.weight, which is not supported",
    ),
    "alien": (
        lambda f: with_adapter(f, lambda w: w.update({"base_model.model.prompt": torch.zeros(3)})),
        "tensor prompt is not part of a LLaVA checkpoint",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.bin").unlink() or f,
        "but not adapter_model.safetensors or adapter_model.bin: complete the download",
    ),
    "no projector": (lambda f: (f / "non_lora_trainables.bin").unlink() or f, "has no projector"),
    "merged": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "pytorch_model.bin") or f,
        "holds a whole model and a LoRA adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", LORA_FAULTS)
def test_an_adapter_that_cannot_be_merged_is_refused(fault: str, golden: Path, tmp_path: Path) -> None:
    spoil, message = LORA_FAULTS[fault]
    source = spoil(lora_folder(golden, "llava", tmp_path))
    assert message in refused(main, "convert", "--mllm", source, "--out", tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_base_a_folder_says_how_to_give_it(kind: str, golden: Path, tmp_path: Path) -> None:
    source = KINDS[kind](golden, "llava", tmp_path, base="lmsys/vicuna-7b-v1.5")
    message = refused(main, "convert", "--mllm", source, "--out", tmp_path / "out")
    assert "without its language model 'lmsys/vicuna-7b-v1.5', which is neither next to it" in message
    assert "--part base=PATH" in message


@pytest.mark.parametrize("name", ["", ".", None])
def test_a_folder_that_names_itself_or_nothing_as_its_base(
    name: str | None, golden: Path, tmp_path: Path
) -> None:
    source = edit_config(projector_only(golden, "llava", tmp_path), _name_or_path=name)
    with pytest.raises(NotFoundError, match=r"`parts\['base'\]=PATH`"):
        load_mllm(source)


def test_another_kind_of_language_model_is_no_base(golden: Path, tmp_path: Path) -> None:
    source = projector_only(golden, "llava", tmp_path)
    edit_config(tmp_path / "vicuna", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(
        MismatchError, match=r"expected a llama language model, vicuna; pass it with `parts\['base'\]"
    ):
        load_mllm(source)
    (tmp_path / "vicuna" / "config.json").unlink()
    with pytest.raises(BadDataError, match=r"expected a model folder with a config\.json"):
        load_mllm(source)


def test_a_base_for_a_whole_checkpoint_is_a_mistake(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"holds a whole model: `parts\['base'\]` is for"):
        load_mllm(golden / "llava" / "checkpoint", parts={"base": tmp_path})


def test_a_llava_is_a_base_too(golden: Path, tmp_path: Path) -> None:
    """LoRA on a LLaVA: its projector gives way to the folder's own."""
    source = lora_folder(golden, "llava", tmp_path)
    config = json.loads((source / "config.json").read_text())
    edit_config(tmp_path / "vicuna", **config)
    weights = torch.load(tmp_path / "vicuna" / "pytorch_model.bin")
    other = {
        k: v + 1 for k, v in golden_tensors(golden / "llava" / "checkpoint").items() if "mm_projector" in k
    }
    torch.save(weights | other, tmp_path / "vicuna" / "pytorch_model.bin")
    checkpoint, family, _ = open_checkpoint(source)
    assert {d.name for d in family.plan(checkpoint).dropped} >= {f"base/{name}" for name in other}
    found, expected = golden_logits(golden, "llava", load_mllm(source, dtype=torch.float32)[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_trained_tensors_are_found_under_shorter_names_too(prefix: str, golden: Path, tmp_path: Path) -> None:
    """LLaVA's loader takes off base_model. and model. where they are there."""
    source = lora_folder(golden, "llava", tmp_path)
    weights = torch.load(source / "non_lora_trainables.bin")
    renamed = {prefix + name.removeprefix("base_model.model."): value for name, value in weights.items()}
    torch.save(renamed, source / "non_lora_trainables.bin")
    found, expected = golden_logits(golden, "llava", load_mllm(source, dtype=torch.float32)[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
