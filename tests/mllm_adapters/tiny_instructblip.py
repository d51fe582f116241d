"""Tiny InstructBLIPs in the transformers layout, and what tests do with them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from mllm_adapters.api import plan_swap
from mllm_adapters.core.contract import Plan

QUESTION = "Which disease does this image show?"


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and digits as words: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789?.'"]
    vocab = {word: i for i, word in enumerate([*words, *(f"##{w}" for w in words[4:])])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def text_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Every byte is a token; special tokens as in the published folders: Vicuna's begins with </s>, T5's ends so."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["[PAD]", "<unk>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    single = "</s> $A" if kind == "llama" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 2)])
    bos = {"bos_token": "</s>"} if kind == "llama" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="<unk>", eos_token="</s>", padding_side="left", **bos
    )  # fmt: skip


def tiny_instructblip(folder: Path, kind: str = "llama", placeholder: int | None = None) -> Path:
    """A stock checkpoint with the files of a published one; without ``placeholder`` as published in 2023."""
    torch.manual_seed(1)
    tokenizer = text_tokenizer(kind)
    rows = len(tokenizer) + (0 if kind == "llama" else 13)  # T5 has spare rows
    text: Any = (
        LlamaConfig(
            vocab_size=rows, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=2, eos_token_id=2, pad_token_id=0, max_position_embeddings=512,
        )
        if kind == "llama"
        else T5Config(
            vocab_size=rows, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 28, "patch_size": 7, "initializer_range": 0.2,
        },
        qformer_config={
            "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
            "vocab_size": 90, "max_position_embeddings": 24, "cross_attention_frequency": 2,
        },
        text_config=text, num_query_tokens=5, image_token_index=placeholder, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    if placeholder is None:
        written.pop("image_token_index", None)
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    BlipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def swap(source: Path, tower: Path, out: Path | None = None, parts: dict[str, Path] | None = None) -> Plan:
    plan = plan_swap(source, tower, parts=parts)
    if out is not None:
        plan.write(out)
    return plan.plan
