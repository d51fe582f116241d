"""InternVL checkpoint folders for tests: golden ones edited, or completed with a tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import pre_tokenizers

from mllm_adapters.api import plan_conversion, plan_swap
from mllm_adapters.core.contract import Plan, Target
from mllm_adapters.core.registry import open_checkpoint

QUESTION = "Which disease does this image show?"

ALPHABET = "".join(map(chr, range(32, 127)))


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def swap(
    source: Path, out: Path, tower: Path | None, target: Target = "own", size: int | None = None
) -> Plan:
    plan = plan_swap(source, tower, image_size=size, layout=target) if tower else plan_conversion(source)
    plan.write(out)
    return plan.plan


ADDED = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def sentencepiece(folder: Path, pieces: list[str], dummy_prefix: bool) -> int:
    """Train a SentencePiece model; how many pieces it has."""
    SentencePieceTrainer.train(
        sentence_iterator=iter([ALPHABET, QUESTION, "user assistant USER ASSISTANT Glaucoma Myopia system the"]),
        model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=False, add_dummy_prefix=dummy_prefix, user_defined_symbols=pieces,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return int(SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size())


def token_settings(ids: dict[str, int], **more: object) -> str:
    decoder = {
        str(i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                 "single_word": False}
        for token, i in ids.items()
    }  # fmt: skip
    return json.dumps({"added_tokens_decoder": decoder, **more})


def internlm2_files(folder: Path) -> dict[str, int]:
    """Its markers take the ids of unused pieces of the model, the others come after it; its class is remote code."""
    unused = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
    size = sentencepiece(folder, unused, dummy_prefix=False)
    reader = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {token: reader.piece_to_id(piece) for token, piece in zip(ADDED[:2], reversed(unused), strict=True)}
    ids |= {token: size + i for i, token in enumerate(ADDED[2:])}
    remote = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    more = {
        "additional_special_tokens": ADDED,
        "add_bos_token": True,
        "add_eos_token": False,
        "sp_model_kwargs": None,
    }
    settings = token_settings(ids, tokenizer_class="InternLM2Tokenizer", auto_map=remote, **ends, **more)
    (folder / "tokenizer_config.json").write_text(settings)
    (folder / "added_tokens.json").write_text(json.dumps({k: i for k, i in ids.items() if i >= size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({**ends, "additional_special_tokens": ADDED}))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('never run')\n")
    return ids


def qwen2_files(folder: Path) -> dict[str, int]:
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(alphabet))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ids = {token: len(alphabet) + i for i, token in enumerate(["<|endoftext|>", *ADDED])}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    settings = token_settings(ids, tokenizer_class="Qwen2Tokenizer", add_bos_token=False, **ends)
    (folder / "tokenizer_config.json").write_text(settings)
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    return ids


def llama_files(folder: Path) -> dict[str, int]:
    size = sentencepiece(folder, [], dummy_prefix=True)
    ids = {token: size + i for i, token in enumerate(ADDED)}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        token_settings(ids, tokenizer_class="LlamaTokenizer", **ends)
    )
    return ids


FLAVOURS = {
    "internlm2": ("internvl_internlm2", internlm2_files, "internlm2-chat"),
    "qwen2": ("internvl_qwen2", qwen2_files, "internvl2_5"),
    "llama": ("internvl", llama_files, "vicuna_v1.1"),
}


def talking(golden: Path, flavour: str, folder: Path, **changes: object) -> Path:
    """A golden checkpoint completed with a tokenizer, in one file, as small published ones are."""
    name, write, template = FLAVOURS[flavour]
    checkpoint, _, _ = open_checkpoint(golden / name / "checkpoint")
    state = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    folder.mkdir(parents=True)
    rows = max(write(folder).values()) + 3  # published embeddings are longer than their tokenizers
    for name in state:
        if name.endswith(
            ("embed_tokens.weight", "tok_embeddings.weight", "lm_head.weight", "language_model.output.weight")
        ):
            state[name] = state[name][torch.arange(rows) % state[name].shape[0]].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    usual = {"ps_version": "v2", "pad2square": False, "dynamic_image_size": True, "use_thumbnail": True}
    config = {**checkpoint.config, **usual, "template": template, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
