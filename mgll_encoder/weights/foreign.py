"""Weights that cannot be read: adapters and foreign formats, each with advice on what to do."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.common.texts import read_json

ADAPTER_CONFIG = "adapter_config.json"
"""File in the folder of a PEFT adapter."""

_ORIGINAL = "use the safetensors or PyTorch weights of the same model"

FORMATS: Mapping[str, tuple[str, str]] = {
    ".gguf": ("GGUF (llama.cpp), mostly quantised", _ORIGINAL),
    ".msgpack": ("Flax", _ORIGINAL),
    ".h5": ("TensorFlow", _ORIGINAL),
    ".onnx": ("ONNX", _ORIGINAL),
    ".tflite": ("TensorFlow Lite", _ORIGINAL),
    ".engine": ("TensorRT, built for one device", _ORIGINAL),
    ".distcp": (
        "a sharded checkpoint of torch.distributed (FSDP)",
        "merge it into one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt",
    ),
}
"""Suffix of foreign weight files -> their format, and what to do."""

MAGIC: Mapping[bytes, str] = {b"GGUF": ".gguf", b"\x89HDF": ".h5"}
"""First bytes of some of them -> suffix, whatever the file is called."""


_MERGE = (
    "import sys; from peft import PeftModel; from transformers import {model}, {processor}; "
    "base, adapter, out = sys.argv[1:]; {processor}.from_pretrained(base).save_pretrained(out); "
    "PeftModel.from_pretrained({model}.from_pretrained(base), adapter).merge_and_unload().save_pretrained(out)"
)
"""Names are passed as arguments, not formatted into the code: they are untrusted."""


def other_format(path: Path) -> str | None:
    """Describe a foreign weight file and what to do, from its first bytes or its name; None if it may be readable.

    For a folder, the first such file in it.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for file in files:
        suffix = next((name for magic, name in MAGIC.items() if _begins(file, magic)), file.suffix)
        if suffix in FORMATS:
            what, advice = FORMATS[suffix]
            return f"{file} is {what}, which is not supported; {advice}"
    return None


def _begins(file: Path, magic: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic


def refuse_adapter(folder: Path, model: str, processor: str) -> None:
    """Refuse a folder with a PEFT adapter, with the command that merges it.

    Args:
        folder: The folder.
        model: The transformers class that loads the base model.
        processor: The class that loads its processor.

    Raises:
        UserError: the folder contains an adapter.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return
    base = read_json(file).get("base_model_name_or_path") or "BASE"
    command = shlex.join(["python", "-c", _MERGE.format(model=model, processor=processor)])
    names = shlex.join([str(base), str(folder), f"{folder.name}-merged"])
    raise UnsupportedCheckpointError(
        f"{folder} contains a PEFT adapter ({ADAPTER_CONFIG}), not full weights: merge it into its base model, "
        f"and pass the merged folder: {command} {names}"
    )
