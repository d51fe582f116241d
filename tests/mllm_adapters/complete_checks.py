"""Changes to the complete checkpoints of `complete`, for the contract test: another dtype, tied embeddings."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

Tensors = dict[str, Any]

EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "shared.weight")
HEADS = ("lm_head.weight", "language_model.output.weight")

QUESTION = "Which disease does this image show?"


def prompt(processor: Any) -> str:
    """`QUESTION` about a picture, as the processor writes it."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def asked(processor: Any) -> Mapping[str, torch.Tensor]:
    """What a model gets of it."""
    picture = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    return processor(text=[prompt(processor)], images=[picture], return_tensors="pt")


def in_dtype(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint and its parts in another dtype."""

    def cast(tensors: Tensors) -> Tensors:
        return {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tensors.items()
        }

    name = str(dtype).removeprefix("torch.")
    kinds = {"dtype", "torch_dtype"}
    return _changed(
        source, folder, cast, lambda c: {k: name if k in kinds and v else v for k, v in c.items()}
    )


def tied(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose head is its embedding, and so is not in its files."""

    def tie(config: dict[str, Any]) -> dict[str, Any]:
        return (
            {**config, "tie_word_embeddings": True}
            if "vocab_size" in config or "text_config" in config
            else config
        )

    return _changed(source, folder, lambda t: {k: v for k, v in t.items() if not k.endswith(HEADS)}, tie)


def embedding(folder: Path) -> torch.Tensor:
    """The token embedding of a checkpoint, wherever it lies."""
    found = [v for f in _weights(folder) for k, v in _read(f).items() if k.endswith(EMBEDDINGS)]
    return max(found, key=len)


def _changed(
    source: Path,
    folder: Path,
    tensors: Callable[[Tensors], Tensors],
    config: Callable[[dict[str, Any]], dict[str, Any]],
) -> Path:
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    for file in _weights(folder):
        if file.suffix == ".safetensors":
            changed = tensors(load_file(file))
            save_file({k: v.contiguous() for k, v in changed.items()}, file, metadata={"format": "pt"})
        else:
            torch.save(_deep(torch.load(file, weights_only=True), tensors), file)
    for file in folder.rglob("*.index.json"):
        index = json.loads(file.read_text())
        held = {k for f in _weights(file.parent) for k in _read(f)}
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k in held}
        file.write_text(json.dumps(index))
    for file in folder.rglob("config.json"):
        file.write_text(json.dumps(_deep(json.loads(file.read_text()), config)))
    return folder


def _deep(settings: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    return (
        change({k: _deep(v, change) for k, v in settings.items()}) if isinstance(settings, dict) else settings
    )


def _weights(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.suffix in (".safetensors", ".bin", ".pt", ".pth")]


def _read(file: Path) -> Tensors:
    return (
        load_file(file) if file.suffix == ".safetensors" else dict(_flat(torch.load(file, weights_only=True)))
    )


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, which may wrap them."""
    for name, value in state.items():
        yield from _flat(value) if isinstance(value, Mapping) else [(name, value)]
