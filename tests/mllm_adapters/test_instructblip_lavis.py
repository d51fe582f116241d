"""InstructBLIP as LAVIS has it: files side by side, and no config.json."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mgll_encoder.common.errors import MismatchError, NotFoundError, UserError
from mllm_adapters import load_mllm
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.registry import open_checkpoint
from tests import builders
from tests.mllm_adapters.llava_checkpoints import sentencepiece_tokenizer
from tests.mllm_adapters.tiny_instructblip import (
    QUESTION,
    bert_tokenizer,
    tiny_instructblip,
)


def lavis_folder(golden: Path, folder: Path, leave_out: tuple[str, ...] = ()) -> Path:
    """The golden checkpoint in the three places of the published one, however it is laid out; some left out."""
    checkpoint, family, _ = open_checkpoint(golden / "instructblip_lavis", heads(golden))
    language = Checkpoint(family.plan(checkpoint).parts["language-model"])
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    words = {n: state.pop(n) for n in list(state) if n.startswith("llm_model.")}
    words = words or {f"llm_model.{name}": language.read(name) for name in language.tensors}
    trained = re.compile(r"query_tokens|ln_vision\.|Qformer\.|llm_proj\.")
    tower = {n: state.pop(n) for n in list(state) if not trained.match(n)}
    (folder / "vicuna-7b").mkdir(parents=True)
    shutil.copyfile(language.folder / "config.json", folder / "vicuna-7b" / "config.json")
    files = (
        (state, "instruct_blip_vicuna7b_trimmed.pth"),
        (tower, "eva_vit_g.pth"),
        (words, "vicuna-7b/pytorch_model.bin"),
    )
    for tensors, name in files:
        bare = {n.removeprefix("visual_encoder.").removeprefix("llm_model."): v for n, v in tensors.items()}
        torch.save({"model": bare} if tensors is state else bare, folder / name)
    for name in leave_out:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return folder


def heads(golden: Path) -> dict[str, Path]:
    """The option that says how many heads the golden towers have."""
    return {"config": golden / "instructblip" / "checkpoint"}


def test_heads_that_no_weight_file_tells_are_asked_for(golden: Path, tmp_path: Path) -> None:
    error = builders.refused(
        swap_encoder,
        "convert",
        "--mllm",
        golden / "instructblip_lavis",
        "--out",
        tmp_path / "out",
        "--dry-run",
    )
    assert "--part config=PATH" in error


def test_heads_of_another_model_are_refused(golden: Path, tmp_path: Path) -> None:
    checkpoint, family, _ = open_checkpoint(
        golden / "instructblip_lavis", {"config": tiny_instructblip(tmp_path / "other")}
    )
    with pytest.raises(
        MismatchError, match=r"`parts\['config'\]`: its .* describes a width of .* do not belong together"
    ):
        family.plan(checkpoint)


@pytest.mark.parametrize(
    ("missing", "part"), [("eva_vit_g.pth", "vision-tower"), ("vicuna-7b", "language-model")]
)
def test_a_part_that_lies_elsewhere_is_asked_for_and_taken(
    missing: str, part: str, golden: Path, tmp_path: Path
) -> None:
    folder = lavis_folder(golden, tmp_path / "lavis" / "inner", (missing,))
    checkpoint, family, _ = open_checkpoint(folder, heads(golden))
    with pytest.raises(NotFoundError, match=rf"`parts\['{part}'\]=PATH`"):
        family.plan(checkpoint)
    given = heads(golden) | {part: lavis_folder(golden, tmp_path / "whole") / missing}
    model, _ = load_mllm(folder, dtype=torch.float32, parts=given)
    whole, _ = load_mllm(golden / "instructblip_lavis", dtype=torch.float32, parts=heads(golden))
    for (name, found), expected in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_a_file_that_is_beside_the_folder_is_found(golden: Path, tmp_path: Path) -> None:
    folder = lavis_folder(golden, tmp_path / "lavis" / "inner", ("eva_vit_g.pth",))
    shutil.copyfile(
        lavis_folder(golden, tmp_path / "whole") / "eva_vit_g.pth", folder.parent / "eva_vit_g.pth"
    )
    load_mllm(folder, dtype=torch.float32, parts=heads(golden))


def test_a_language_model_of_another_size_is_refused(golden: Path, tmp_path: Path) -> None:
    folder = lavis_folder(golden, tmp_path / "lavis")
    config = json.loads((folder / "vicuna-7b" / "config.json").read_text())
    (folder / "vicuna-7b" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    checkpoint, family, _ = open_checkpoint(folder, heads(golden))
    with pytest.raises(
        NotFoundError, match=r"vicuna-7b is a llama of width 64.*`parts\['language-model'\]=PATH`"
    ):
        family.plan(checkpoint)


def resaved(folder: Path, **changes: Any) -> Path:
    """The Q-Former's file with tensors renamed (new name) or taken out (None), by their beginning."""
    file = next(folder.glob("instruct_blip*.pth"))
    state = torch.load(file, weights_only=True)["model"]
    for beginning, new in changes.items():
        for name in [n for n in state if n.startswith(beginning.replace("__", "."))]:
            value = state.pop(name)
            if new is not None:
                state[new + name.removeprefix(beginning.replace("__", "."))] = value
    torch.save({"model": state}, file)
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"Qformer__bert__embeddings__word_embeddings": None},
            "BLIP-2, whose Q-Former does not read the instruction",
        ),
        ({"llm_proj": "opt_proj"}, "BLIP-2"),
        ({"llm_proj": None}, r"Q-Former without projection.*`parts\['qformer'\]=PATH`"),
        ({"query_tokens": None}, "query_tokens is missing: is it complete"),
        ({"ln_vision": None}, "vision_model.post_layernorm.weight is missing"),
        ({"Qformer__bert__encoder__layer__0__crossattention": None}, "has cross-attention in layers"),
        (
            {"ln_vision": "visual_encoder.transformer.ln"},
            "visual_encoder.transformer.ln.weight is not part of|transformers calls",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_lavis_files_that_are_no_complete_instructblip_are_refused(
    changes: dict[str, Any], complaint: str, golden: Path, tmp_path: Path
) -> None:
    folder = resaved(lavis_folder(golden, tmp_path / "lavis"), **changes)
    checkpoint, family, _ = open_checkpoint(folder, heads(golden))
    with pytest.raises(UserError, match=complaint):
        family.plan(checkpoint)


def test_what_follows_the_towers_blocks_is_left_out(golden: Path, tmp_path: Path) -> None:
    folder = lavis_folder(golden, tmp_path / "lavis")
    state = torch.load(folder / "eva_vit_g.pth", weights_only=True)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    more = {
        n.replace("blocks.0.", f"blocks.{depth}."): v for n, v in state.items() if n.startswith("blocks.0.")
    }
    torch.save(
        {**state, **more, "norm.weight": torch.ones(3), "head.bias": torch.ones(3)}, folder / "eva_vit_g.pth"
    )
    model, _ = load_mllm(folder, dtype=torch.float32, parts=heads(golden))
    assert model.config.vision_config.num_hidden_layers == depth, "as many as the given config.json says"


def test_lavis_tokenizers_are_prepared_as_lavis_prepares_them(golden: Path, tmp_path: Path) -> None:
    folder = lavis_folder(golden, tmp_path / "lavis")
    sentencepiece_tokenizer(folder / "vicuna-7b")
    checkpoint, family, _ = open_checkpoint(folder, heads(golden))
    with pytest.raises(NotFoundError, match=r"none for the Q-Former.*`parts\['qformer-tokenizer'\]=PATH`"):
        family.plan(checkpoint)
    bert_tokenizer().save_pretrained(folder / "bert-base-uncased")
    model, processor = load_mllm(folder, dtype=torch.float32, parts=heads(golden))
    tokens = processor.tokenizer
    assert (tokens.bos_token, tokens.eos_token, tokens.pad_token) == ("</s>", "</s>", "[PAD]")
    assert tokens(QUESTION).input_ids[0] == 2, "</s> begins a text"
    batch = processor(images=Image.new("RGB", (40, 30)), text=QUESTION, return_tensors="pt")
    per_image = model.config.num_query_tokens
    assert batch["input_ids"][0, :per_image].tolist() == [model.config.image_token_id] * per_image
    assert batch["input_ids"][0, per_image] == 2
    batch["qformer_input_ids"] %= model.config.qformer_config.vocab_size
    assert torch.isfinite(model(**batch).logits).all()


def test_a_file_that_holds_tower_and_language_model_too_is_the_same_model(
    golden: Path, tmp_path: Path
) -> None:
    folder = lavis_folder(golden, tmp_path / "lavis")
    file = next(folder.glob("instruct_blip*.pth"))
    state = torch.load(file, weights_only=True)["model"]
    tower = torch.load(folder / "eva_vit_g.pth", weights_only=True)
    language = torch.load(folder / "vicuna-7b" / "pytorch_model.bin", weights_only=True)
    state |= {f"visual_encoder.{name}": value for name, value in tower.items()}
    state |= {f"llm_model.{name}": value for name, value in language.items()}
    torch.save({"model": state, "epoch": 3}, file)
    (folder / "eva_vit_g.pth").unlink()
    (folder / "vicuna-7b" / "pytorch_model.bin").unlink()
    model, _ = load_mllm(folder, dtype=torch.float32, parts=heads(golden))
    whole, _ = load_mllm(golden / "instructblip_lavis", dtype=torch.float32, parts=heads(golden))
    for (name, found), expected in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def as_lavis(stock: Path, kind: str, out: Path) -> Path:
    """A checkpoint in the transformers layout as LAVIS' three pieces, its language model in safetensors."""
    state = load_file(stock / "model.safetensors")
    name = {"llama": "vicuna-13b", "t5": "flan-t5-xl"}[kind]
    main, eva, language = {}, {}, {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "language_model":
            language[rest] = value
        elif "post_layernorm" in key:
            main[f"ln_vision.{rest.rpartition('.')[2]}"] = value
        elif key.endswith("qkv.bias"):
            block = f"blocks.{rest.split('.')[2]}.attn"
            eva[f"{block}.q_bias"], _, eva[f"{block}.v_bias"] = value.chunk(3)
        elif part == "vision_model":
            for new, old in EVA_NAMES.items():
                rest = rest.replace(new, old)
            eva[rest] = value
        else:
            for new, old in MAIN_NAMES[kind].items():
                key = key.replace(new, old)
            main[key] = value
    (out / name).mkdir(parents=True)
    torch.save({"model": main}, out / "checkpoint_best.pth")
    torch.save(eva, out / "eva_vit_g.pth")
    save_file(language, out / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((stock / "config.json").read_text())["text_config"]
    (out / name / "config.json").write_text(json.dumps(config))
    return out


EVA_NAMES = {
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm": "norm",
    "self_attn.projection": "attn.proj", "self_attn.qkv": "attn.qkv",
}  # fmt: skip
MAIN_NAMES = {
    kind: {
        "qformer.embeddings.layernorm": "Qformer.bert.embeddings.LayerNorm", "attention.attention": "attention.self",
        "qformer.": "Qformer.bert.", "language_projection": f"{prefix}_proj",
    }
    for kind, prefix in (("llama", "llm"), ("t5", "t5"))
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_another_model_gives_the_same_in_either_layout(kind: str, tmp_path: Path) -> None:
    stock = tiny_instructblip(tmp_path / "stock", kind)
    folder = as_lavis(stock, kind, tmp_path / "lavis")
    expected, _ = load_mllm(stock, dtype=torch.float32)
    model, _ = load_mllm(folder, dtype=torch.float32, parts={"config": stock})
    ids = torch.tensor([[2, 50, 60, 70]])
    given = {
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        "qformer_input_ids": torch.tensor([[2, 9, 10, 3]]),
    }
    if kind == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 40, 41]])
    answers = []
    for each in (model, expected):
        images = ids.new_full((1, 5), each.config.image_token_id)
        answers.append(each(input_ids=torch.cat([images, ids], dim=1), **given).logits[..., :259])
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)
