"""Estimates the memory of a training per device, before weights are loaded.

The model is built on the ``meta`` device, set up as its stage says, and its language model is run there, to
count the tensors that autograd keeps instead of using a rule of thumb.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mllm_adapters.core.configs import build_config
from mllm_adapters.core.stages import LoraSettings, apply_stage, components, lora_targets
from mllm_adapters.training.recipe import Recipe, RunOptions

ANSWER_TOKENS = 64
"""Tokens with a loss in an example; the output head is computed for these only."""

LOGIT_BYTES = 10
"""Per logit: its value in 16 bits, in 32 bits for the loss, and the gradient."""

MOMENTS = 8
"""AdamW's two moments per trained parameter, in 32 bits."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight in NF4 with double quantization: 4 bits, and per block of 64 a scale in 8 bits, per 256 such one in 32
(Dettmers et al. 2023, section 3)."""

ATTENTION = "mgll_counted"
"""Name under which the counting attention is registered in transformers."""

VIT_BYTES = 34
"""Activations of a transformer block per token and unit of width in 16 bits, the attention's probabilities not kept
(Korthikanti et al. 2022, section 4.1)."""


@dataclass(frozen=True)
class Setting:
    """Where and how a training runs.

    Attributes:
        batch_size: Examples per device and forward pass.
        length: Tokens per example, image tokens included.
        devices: Number of devices.
        zero: DeepSpeed's ZeRO stage (0, 2 or 3); None without DeepSpeed.
        offload: Whether ZeRO-3 keeps weights and optimizer in the host's memory.
        precision: Of the forward pass.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
    """

    batch_size: int
    length: int
    devices: int = 1
    zero: int | None = None
    offload: bool = False
    precision: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.zero not in (None, 0, 2, 3):
            raise UnsupportedCheckpointError(f"ZeRO stage {self.zero} is not estimated: 0, 2 and 3 are")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device, without the CUDA context, buffers of collectives, and fragmentation.

    Attributes:
        weights: Of the model.
        gradients: Of the trained parameters.
        optimizer: AdamW's moments, and 32-bit copies of the weights under DeepSpeed.
        activations: What autograd keeps for the backward pass.
        logits: Of the answers.
        host: Bytes in the host's memory instead, per device.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """Return the total on the device."""
        everything: float = sum(getattr(self, entry.name) for entry in fields(self))
        return everything - self.host


PLACES: Mapping[str, Mapping[str, Any]] = {
    "1 device": {},
    "8 devices, ZeRO-2": {"devices": 8, "zero": 2},
    "8 devices, ZeRO-3": {"devices": 8, "zero": 3},
    "8 devices, ZeRO-3 offload": {"devices": 8, "zero": 3, "offload": True},
}
"""Target machines of recipes -> fields of `Setting`."""


def estimates(settings: Mapping[str, Any], recipe: Recipe, options: RunOptions) -> dict[str, MemoryEstimate]:
    """Estimate a recipe's memory on every target machine, with all examples at their maximum length.

    Args:
        settings: The config.json of a checkpoint in the transformers layout.
        recipe: Settings that affect the result.
        options: Settings that do not.

    Raises:
        UserError: see `estimate`.
    """
    found = {}
    for name, changes in PLACES.items():
        if recipe.qlora and changes.get("zero") == 3:
            continue  # 4-bit weights cannot be sharded
        setting = Setting(
            recipe.batch_size,
            recipe.max_length,
            precision=torch.float32 if recipe.precision == "float32" else torch.bfloat16,
            gradient_checkpointing=options.gradient_checkpointing,
            **changes,
        )
        found[name] = estimate(settings, recipe.stage, setting, lora=recipe.lora, qlora=recipe.qlora)
    return found


def estimate(
    settings: Mapping[str, Any],
    stage: str,
    setting: Setting,
    *,
    lora: LoraSettings | None = None,
    qlora: bool = False,
    where: str = "config.json",
) -> MemoryEstimate:
    """Estimate the memory of a training.

    Args:
        settings: The config.json of a checkpoint in the transformers layout.
        stage: A key of `STAGES`.
        setting: Devices, batch size and precision.
        lora: Settings of the adapters.
        qlora: Whether the language model is kept in 4 bits.
        where: Name of the configuration in error messages.

    Raises:
        UserError: the configuration is invalid, or the stage does not fit the model.
    """
    model = _on_meta(settings, setting.precision, where)
    quantized = {f"{name}.weight" for name in lora_targets(model, "language_model")} if qlora else set()
    in_4_bits = sum(model.get_parameter(name).numel() for name in quantized)
    apply_stage(model, stage, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) - in_4_bits
    size = setting.precision.itemsize
    shared = setting.devices if setting.zero in (2, 3) else 1
    everywhere = setting.devices if setting.zero == 3 else 1
    # Without DeepSpeed trained weights are in 32 bits; with it they have a 32-bit copy.
    own = 4 if setting.zero is None else size
    weights = (frozen * size + trained * own + in_4_bits * NF4_BYTES) / everywhere
    optimizer = trained * (MOMENTS + (0 if setting.zero is None else 4)) / shared
    host = weights + optimizer if setting.offload else 0.0
    vocabulary = model.config.get_text_config().vocab_size
    return MemoryEstimate(
        weights=0.0 if setting.offload else weights,
        gradients=trained * own / shared,
        optimizer=0.0 if setting.offload else optimizer,
        activations=_activations(model, setting),
        logits=float(setting.batch_size * min(ANSWER_TOKENS, setting.length) * vocabulary * LOGIT_BYTES),
        host=host,
    )


def kept_for_backward(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Count the bytes of activations that autograd keeps after a forward pass, without weights."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*args, **kwargs)
    del output
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


class _FusedAttention(torch.autograd.Function):
    """Keeps the tensors of a fused attention kernel: queries, keys, values, output, and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32)
        )
        return output


def _counted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Replace transformers' attention on the ``meta`` device, which would keep all probabilities."""
    del module, attention_mask, options
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _on_meta(settings: Mapping[str, Any], precision: torch.dtype, where: str) -> Any:
    from accelerate import init_empty_weights
    from transformers import AttentionInterface
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    AttentionInterface.register(ATTENTION, _counted_attention)
    config = build_config(settings, where)
    config._attn_implementation = ATTENTION
    text = config.get_text_config()
    if rope := getattr(text, "rope_parameters", None):
        # Some kinds read the positions' values, which meta tensors do not have; all kinds keep the same
        # tensors.
        text.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with init_empty_weights():
        return kind(config).to(precision)


def _activations(model: Any, setting: Setting) -> float:
    parts = components(model)
    decoder = model.get_decoder().to(setting.precision)
    width = model.config.get_text_config().hidden_size
    shape = (setting.batch_size, setting.length, width)
    embeddings = torch.empty(shape, dtype=setting.precision, device="meta", requires_grad=True)
    kept = float(kept_for_backward(decoder.train(), inputs_embeds=embeddings, use_cache=False))
    if setting.gradient_checkpointing:
        layers = model.config.get_text_config().num_hidden_layers
        boundaries = layers * embeddings.nbytes
        kept = boundaries + kept / layers  # of the layer that is being recomputed
    tower_trains = any(
        parameter.requires_grad for name, parameter in model.named_parameters() if parts[name] == "tower"
    )
    return kept + (_tower_activations(model.config.vision_config, setting) if tower_trains else 0.0)


def _tower_activations(vision: Any, setting: Setting) -> float:
    """Estimate the tower's activations for one image per example."""
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    per_block = VIT_BYTES * setting.precision.itemsize / 2 * tokens * vision.hidden_size
    blocks = 1 if setting.gradient_checkpointing else vision.num_hidden_layers
    total: float = setting.batch_size * per_block * blocks
    return total
