"""Weights that nothing here reads by themselves: adapters and other formats, each named with the way out."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.texts import read_json

ADAPTER_CONFIG = "adapter_config.json"
"""In the folder of a PEFT adapter."""

_ORIGINAL = "take the safetensors or PyTorch weights of the same model"

FORMATS: Mapping[str, tuple[str, str]] = {
    ".gguf": ("GGUF (llama.cpp), mostly quantised", _ORIGINAL),
    ".msgpack": ("Flax", _ORIGINAL),
    ".h5": ("TensorFlow", _ORIGINAL),
    ".onnx": ("ONNX", _ORIGINAL),
    ".tflite": ("TensorFlow Lite", _ORIGINAL),
    ".engine": ("TensorRT, made for one device", _ORIGINAL),
    ".distcp": (
        "a sharded checkpoint of torch.distributed (FSDP)",
        "make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt",
    ),
}
"""Suffix of weight files of other programs -> what they are, and what to do."""

MAGIC: Mapping[bytes, str] = {b"GGUF": ".gguf", b"\x89HDF": ".h5"}
"""First bytes of some of them, whatever they are called."""


_MERGE = (
    "import sys; from peft import PeftModel; from transformers import {model}, {processor}; "
    "base, adapter, out = sys.argv[1:]; {processor}.from_pretrained(base).save_pretrained(out); "
    "PeftModel.from_pretrained({model}.from_pretrained(base), adapter).merge_and_unload().save_pretrained(out)"
)
"""Names are arguments and no part of the program: they are somebody's."""


def other_format(path: Path) -> str | None:
    """What a file of another program is, and what to do, by its first bytes or its name; None for what may be read.

    Of a folder, the first such file in it.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for file in files:
        suffix = next((name for magic, name in MAGIC.items() if _begins(file, magic)), file.suffix)
        if suffix in FORMATS:
            what, way_out = FORMATS[suffix]
            return f"{file} is {what}, which is not read; {way_out}"
    return None


def _begins(file: Path, magic: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic


def refuse_adapter(folder: Path, model: str, processor: str) -> None:
    """Refuse a folder with a PEFT adapter, with the command that merges it.

    Args:
        folder: The folder; what holds no adapter passes.
        model: The class of transformers that loads the base.
        processor: The one that loads its processor.

    Raises:
        UserError: it holds an adapter.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return
    base = read_json(file).get("base_model_name_or_path") or "BASE"
    command = shlex.join(["python", "-c", _MERGE.format(model=model, processor=processor)])
    names = shlex.join([str(base), str(folder), f"{folder.name}-merged"])
    raise UserError(
        f"{folder} holds a PEFT adapter ({ADAPTER_CONFIG}), not whole weights: merge it into its base model first, and "
        f"pass the merged folder: {command} {names}"
    )
