"""Finding the parts of a checkpoint that lie outside its folder."""

from pathlib import Path

UNUSED = (
    "*.msgpack", "*.h5", "*.ot", "*.onnx", "*.tflite", "*.gguf", "consolidated*", "onnx/*", "openvino*",
    "optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin", "global_step*/*", "checkpoint-*/*", "runs/*",
)  # fmt: skip
"""Files of published models that nothing here reads: weights of other frameworks, states of trainings."""

DUPLICATES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""The same weights once more, where there are safetensors."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def cached(hub_id: str) -> Path | None:
    """The folder of a hub id in the Hugging Face cache, if all that is read of it has been downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for skipped in ((*UNUSED, *DUPLICATES), UNUSED):
        try:
            folder = Path(snapshot_download(hub_id, local_files_only=True, ignore_patterns=list(skipped)))
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        if any(file.suffix in _WEIGHTS for file in folder.rglob("*")):
            return folder
    return None


def find_part(name: str, checkpoint: Path) -> Path | None:
    """Where a part named in a config.json lies on this machine, or None.

    Looked for, in this order: as an absolute path or relative to the checkpoint folder, relative to its parent, in
    the Hugging Face cache. Nothing is downloaded.
    """
    for candidate in (checkpoint / name, checkpoint.absolute().parent / name):
        if candidate.exists():
            return candidate
    return cached(name)
