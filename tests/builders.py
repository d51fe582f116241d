"""Tiny real models for tests: a CLIP tower, a byte-level tokenizer, a LLaVA with its processor."""

import io
import json
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import typer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mgll_encoder.common.spelling import Spelling
from mllm_adapters.data.chat_template import Example, render
from mllm_adapters.data.llava_format import Conversation

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer(*merged: str) -> PreTrainedTokenizerFast:
    """Every byte is a token (ids 4-259), and pairs of letters are; specials: <pad> 0, <s> 1, </s> 2, <image> 3."""
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in merged]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def tower_config(**changes: object) -> CLIPVisionConfig:
    """A CLIP tower of width 32, three blocks, 28 px in 4 patches, exact GELU."""
    settings = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14, "projection_dim": 16, "hidden_act": "gelu",
    }  # fmt: skip
    return CLIPVisionConfig(**{**settings, **changes})


def tiny_llava(folder: Path, seed: int = 0, merged: Sequence[str] = ()) -> Path:
    """Write an untrained LLaVA (transformers layout) with a complete processor; ``merged`` as in `byte_tokenizer`."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(*merged)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower_config(), text_config=text, image_token_id=3, image_seq_length=4,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    side = {"height": 28, "width": 28}
    image_processor = LlavaImageProcessor(size=side, crop_size=side, do_center_crop=False, do_pad=False)
    LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def rendered(conversation: Conversation, processor: Any) -> Example:
    """One conversation, rendered."""
    (example,) = render([conversation], processor)
    return example


def picture(folder: Path, name: str, color: tuple[int, int, int] = (200, 80, 40), size: int = 40) -> Path:
    """Write a uniformly colored PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    Image.new("RGB", (size, size), color).save(path)
    return path


def sparse_checkpoint(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, Sequence[int]], dtype: str = "F16"
) -> Path:
    """Write a full-size checkpoint whose tensors are a hole in a sparse file: real headers, no disk space."""
    folder.mkdir(parents=True, exist_ok=True)
    sparse_file(folder / "model.safetensors", {name: (dtype, shape) for name, shape in tensors.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Names of dtypes in a safetensors header."""


def sparse_file(file: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> Path:
    """Write a full-size weight file, tensor name -> (dtype, shape), whose values are a hole in a sparse file.

    A ``.bin`` file is torch.save's own, which leaves out the bytes of storages that are none
    (`torch.serialization.skip_data`).
    """
    if file.suffix == ".bin":
        from torch._subclasses.fake_tensor import FakeTensorMode  # as the documentation of skip_data has it

        with FakeTensorMode():
            state = {
                name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in tensors.items()
            }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, file)
        return file
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
    return file


def sparse_shards(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    weight_map: Mapping[str, str],
    total_size: int | None = None,
) -> Path:
    """Write a full-size sharded checkpoint with an index, also without values."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, tuple[str, Sequence[int]]]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, {})[name] = tensors[name]
    for shard, held in shards.items():
        sparse_file(folder / shard, held)
    index = (
        "pytorch_model.bin.index.json"
        if next(iter(shards)).endswith(".bin")
        else "model.safetensors.index.json"
    )
    metadata = {} if total_size is None else {"metadata": {"total_size": total_size}}
    (folder / index).write_text(json.dumps({**metadata, "weight_map": dict(weight_map)}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def invoke(main: Callable[[], None], *arguments: object) -> Outcome:
    """Run a command in this process, as if typed."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["command", *map(str, arguments)]
    ctrl_c = signal.getsignal(signal.SIGINT)
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    if signal.getsignal(signal.SIGINT) != ctrl_c:  # a command leaves the process as it is to end
        signal.signal(signal.SIGINT, ctrl_c)
    return Outcome(code, out.getvalue(), err.getvalue())


def options_of(module: str) -> Spelling:
    """How the command of a module spells arguments."""
    spelling = Spelling()
    spelling.learn(typer.main.get_command(import_module(module).app))
    return spelling


def refused(main: Callable[[], None], *arguments: object) -> str:
    """Run a command that must be refused: exit code 2 and one line, which is returned."""
    outcome = invoke(main, *arguments)
    assert outcome.code == 2, outcome
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    return errors[0].removeprefix("error: ")
