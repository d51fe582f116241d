"""Writes trained adapters: in PEFT's layout including the projector, or merged."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from mgll_encoder.weights.foreign import ADAPTER_CONFIG
from mllm_adapters.core.stages import LoraSettings, is_adapter, lora_config, outermost_modules
from mllm_adapters.loading.adapters import ADAPTER, ADAPTER_WEIGHTS, PREFIX, base_name
from mllm_adapters.swap.writer import Written, write_checkpoint


def write_adapter(
    base: Path,
    out: Path,
    model: nn.Module,
    trained: Mapping[str, Tensor],
    adapted: Sequence[str],
    settings: LoraSettings,
    *,
    force: bool = False,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a folder that ``PeftModel.from_pretrained(base, out)`` and `load_mllm` read.

    The projector goes into PEFT's file under the names of ``modules_to_save``; a parameter without a module
    (the query tokens of a Q-Former) goes there under its own name, which PEFT puts in place as well.

    Args:
        base: Checkpoint folder that the adapter belongs to.
        out: Folder to write.
        model: The model that was trained.
        trained: Trained parameters, by name.
        adapted: The layers that have an adapter.
        settings: Settings of the adapters.
        force: Replace ``out`` if it exists.
        extra_files: Additional files, name -> contents.

    Raises:
        UserError: ``out`` exists, is or contains ``base``, or cannot be written.
    """
    saved = _saved_modules(model)
    config = lora_config(adapted, settings, inference_mode=True).to_dict()
    config |= {
        "target_modules": sorted(adapted),
        "modules_to_save": [name for name, _ in saved],
        "base_model_name_or_path": base_name(base, out),
    }
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    # PEFT also needs the buffers of these modules (position tables).
    buffers = {f"{name}.{key}": value for name, module in saved for key, value in module.state_dict().items()}
    tensors = {
        PREFIX + name.replace(ADAPTER, "."): value.detach().cpu().contiguous()
        for name, value in {**buffers, **trained}.items()
    }

    def weights(folder: Path) -> Written:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        return Written()

    return write_checkpoint(
        out,
        config=(json.dumps(plain, indent=2) + "\n").encode(),
        config_name=ADAPTER_CONFIG,
        weights=weights,
        files=extra_files,
        force=force,
        inputs=[base],
    )


def merged(
    trained: Mapping[str, Tensor],
    settings: LoraSettings,
    adapted: Iterable[str],
    read: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """Compute the changed parameters of a full checkpoint: the projector's, and layers with merged adapters.

    Args:
        trained: Trained parameters, by name.
        settings: Settings of the adapters.
        adapted: The layers that have an adapter.
        read: Reads an unquantized parameter of the base model.

    Returns:
        Parameter name in the base model -> value in float32.
    """
    values = {name: value.float() for name, value in trained.items() if not is_adapter(name)}
    for layer in adapted:
        down, up = (trained[f"{layer}.lora_{part}{ADAPTER}weight"].float() for part in "AB")
        base = read(f"{layer}.weight").float()
        values[f"{layer}.weight"] = base + settings.alpha / settings.rank * up @ down
    return values


def _saved_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the projector's modules that have a forward pass, without containers."""
    names = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[str, nn.Module]] = []
    queue = outermost_modules(model, "projector")
    while queue:
        module = queue.pop(0)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            queue = [*module.children(), *queue]
        elif any(True for _ in module.parameters()):
            found.append((names[id(module)], module))
    return found
