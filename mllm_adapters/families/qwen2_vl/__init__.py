"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in the transformers layout, with old or new key prefixes.

Vision contract, merger and positions after transformers 5.23 (models/qwen2_vl, models/qwen2_5_vl, models/qwen3_vl).

A swap keeps everything except the tower and the first half of the merger: the language model with its M-RoPE
positions, the 2 x 2 merging of patches, and the merger's second layer, whose input width is kept (the stock
classes tie it to the tower's). The layout llava is not supported: a LLaVA has one-dimensional positions and
merges no patches, so it would not be this model with another vision encoder. It would have four times as
many visual tokens, a randomly initialized projector, and visual tokens at positions that never occurred in
training.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import BadDataError, MismatchError
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, PixelRule, checked
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import build_config, read_fields
from mllm_adapters.core.contract import FAMILY_KEY, Dropped, FamilySpec, Plan, VisionContract
from mllm_adapters.core.planning import copied
from mllm_adapters.core.processing import (
    check_placeholder,
    host_pixels,
    image_settings,
    processor_fate,
    text_side,
)
from mllm_adapters.families import read_template
from mllm_adapters.families.base import PlannedFamily
from mllm_adapters.families.host import Host, PlanRequest, Swap

USUAL_GRID = 32
"""Patches along one side, for comparing host and result, and for the result: Qwen's towers support any number.
32 are 448 px at a patch size of 14: 256 visual tokens."""

TAKEN_OVER = ("spatial_merge_size", "temporal_patch_size", "tokens_per_second")
"""Fields of ``vision_config`` that are kept in the result."""

NEW_LAYER = -2
"""Hidden layer at which a new tower is read, as in LLaVA: patches before the last block."""

DEEPSTACK = re.compile(r"\bdeepstack_merger_list\.(\d+)\.")

NOTHING_TO_READ = "reads features of Qwen's own tower between its blocks, which the new one does not have"
"""Why deepstack is dropped."""

IMAGE_PLACEHOLDER = "<|image_pad|>"

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Generation:
    """The differences between the generations of the model.

    Attributes:
        model: Prefix of the result's class names.
        width: Field of ``vision_config`` with the width of the tower's features.
        norm: Normalisation in the merger.
        first: First linear layer of the merger.
        second: Second one.
        mean: Mean of the published image processor.
        std: Its standard deviation.
        template: Chat template for checkpoints without one.
    """

    model: str
    width: str = "hidden_size"
    norm: str = "ln_q"
    first: str = "mlp.0"
    second: str = "mlp.2"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    template: str = "qwen2_vl.jinja"


GENERATIONS: Mapping[str, Generation] = {
    "qwen2_vl": Generation("MgllQwen2VL", width="embed_dim"),
    "qwen2_5_vl": Generation("MgllQwen2_5_VL"),
    "qwen3_vl": Generation(
        "MgllQwen3VL",
        norm="norm",
        first="linear_fc1",
        second="linear_fc2",
        mean=HALF,
        std=HALF,
        template="qwen3_vl.jinja",
    ),
}
"""model_type of the stock class -> its generation."""

OWN = "mgll_"
"""Prefix of a swapped checkpoint's model_type."""


class Fields(BaseModel):
    """The used fields of config.json, in addition to those that transformers parses."""

    vision_config: dict[str, Any]


class Qwen2VL(PlannedFamily):
    """Qwen's vision-language models since the second."""

    spec = FamilySpec(
        name="qwen2-vl",
        title="Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
        hub_id="Qwen/Qwen2.5-VL-7B-Instruct",
        reads=("Qwen2-VL, Qwen2.5-VL, Qwen3-VL in the transformers layout",),
        tower=r"\bvisual\.(?!merger\.|deepstack_merger_list\.)",
        projector=r"\bvisual\.(merger|deepstack_merger_list)\.",
        language_model=r"\blanguage_model\.|\blm_head\.",
        not_llava="a LLaVA has neither M-RoPE positions nor 2 x 2 merging, so this model cannot be written as one",
    )

    def layout(self, config: Mapping[str, Any]) -> str | None:
        """Return ``transformers`` or None; swapped checkpoints have our own model_type."""
        known = str(config.get("model_type")).removeprefix(OWN) in GENERATIONS and "vision_config" in config
        return "transformers" if known else None

    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:  # noqa: ARG002 (one layout, one target)
        """See `PlannedFamily.host`."""
        config, where = checkpoint.config, f"{checkpoint.folder}/config.json"
        read_fields(Fields, config, where)
        stock = str(config["model_type"]).removeprefix(OWN)
        generation = GENERATIONS[stock]
        settings = build_config(config, where)
        merger = f"{_visual_prefix(checkpoint, generation)}merger."
        before, notes = _contract(checkpoint, settings, generation)
        _check_merger(checkpoint, merger, generation, before)
        deepstack = [name for name in checkpoint.tensors if DEEPSTACK.search(name)]
        vision = settings.vision_config.to_dict()
        return Host(
            layout="transformers",
            before=before,
            steps=[copied(header) for name, header in checkpoint.tensors.items() if name not in deepstack],
            prefix=f"{merger.removesuffix('merger.')}vision_tower.",
            dtype=checkpoint.tensors[f"{merger}{generation.norm}.weight"].dtype,
            config={
                **{key: value for key, value in settings.to_dict().items() if key != "auto_map"},
                "architectures": [f"{generation.model}ForConditionalGeneration"],
                "model_type": OWN + stock,
                FAMILY_KEY: self.spec.name,
                "vision_config": {
                    "model_type": "mgll_qwen2_vl_vision",
                    "tower_config": {},
                    "feature_layer": NEW_LAYER,
                    "merger_width": checkpoint.tensors[f"{merger}{generation.first}.weight"].shape[0],
                    "out_hidden_size": checkpoint.tensors[f"{merger}{generation.second}.weight"].shape[0],
                    **{k: v for k, v in vision.items() if k in TAKEN_OVER},
                },
            },
            image_token_id=settings.image_token_id,
            connector=(merger + generation.norm, merger + generation.first),
            read_at=NEW_LAYER,
            merge=vision["spatial_merge_size"],
            dropped=[Dropped(name=name, reason=NOTHING_TO_READ) for name in deepstack],
            processor=processor_fate(checkpoint.folder),
            notes=notes,
            remarks=_deepstack_notes(deepstack),
        )

    def vision_config(self, swap: Swap, tower: TowerHeader) -> dict[str, Any]:
        """See `PlannedFamily.vision_config`: the merger is part of it."""
        return {**swap.host.config["vision_config"], "tower_config": super().vision_config(swap, tower)}

    def remarks(self, swap: Swap) -> tuple[str, ...]:
        """See `PlannedFamily.remarks`."""
        after = swap.after
        return (
            f"every image is resized to {after.image_size} x {after.image_size} px and becomes "
            f"{after.tokens} visual tokens, since a CLIP tower has a fixed position grid; the tokens' "
            "M-RoPE positions are computed as before",
            "the result takes images only: video input is refused",
        )

    def processor(self, plan: Plan) -> Any | None:
        """Return tokenizer and chat template of the source with the planned preprocessing; None without a tokenizer."""
        from mllm_adapters.families.qwen2_vl.modeling import MgllQwen2VLProcessor

        text = text_side(plan.source)
        if text is None:
            return None
        tokenizer, template, _ = text
        check_placeholder(
            tokenizer, getattr(tokenizer, "image_token", IMAGE_PLACEHOLDER), plan.image_token_id
        )
        generation = GENERATIONS[str(plan.config["model_type"]).removeprefix(OWN)]
        return MgllQwen2VLProcessor(
            self.image_processor(plan),
            tokenizer,
            chat_template=template or read_template(generation.template),
        )

    def image_processor(self, plan: Plan) -> Any:
        """Return an image processor that resizes to squares by the tower's rule and returns patches."""
        from mllm_adapters.families.qwen2_vl.modeling import MgllQwen2VLImageProcessor

        square = super().image_processor(plan)
        alike = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std")
        settings: dict[str, Any] = {
            **{name: getattr(square, name) for name in alike},
            "do_pad": plan.after.resize == "pad",
            "patch_size": plan.after.patch_size,
            "temporal_patch_size": plan.config["vision_config"]["temporal_patch_size"],
            "merge_size": plan.config["vision_config"]["spatial_merge_size"],
        }
        return MgllQwen2VLImageProcessor(**settings)

    def encode_images(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:
        """See `Family.encode_images`: images are passed as patches."""
        from mllm_adapters.families.qwen2_vl.modeling import to_patches

        vision = model.config.vision_config
        patches = to_patches(
            pixels, contract.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        )
        model.get_image_features(patches, _grids(contract, len(pixels)).to(pixels.device))

    def token_order(self, model: Any, contract: VisionContract) -> Tensor | None:
        """See `Family.token_order`: Qwen2.5's own tower passes its patches to the merger window by window."""
        from transformers.vision_utils import get_vision_window_index

        vision = model.config.vision_config
        if not hasattr(vision, "window_size"):
            return None
        windows, _ = get_vision_window_index(
            _grids(contract, 1), vision.spatial_merge_size, vision.window_size, contract.patch_size
        )
        return windows.argsort()


def _grids(contract: VisionContract, pictures: int) -> Tensor:
    """Return frames, rows and columns of patches of each image [images, 3]."""
    return torch.tensor([[1, contract.grid, contract.grid]] * pictures)


def _visual_prefix(checkpoint: Checkpoint, generation: Generation) -> str:
    """Return the prefix in the file: ``visual.`` or ``model.visual.``."""
    end = f"visual.merger.{generation.norm}.weight"
    found = [name for name in checkpoint.tensors if name.endswith(end)]
    if len(found) != 1:
        raise BadDataError(
            f"{checkpoint.folder}: expected one tensor {end}, found {len(found)}: is this the language model only?"
        )
    return found[0].removesuffix(end) + "visual."


def _contract(
    checkpoint: Checkpoint, settings: Any, generation: Generation
) -> tuple[VisionContract, tuple[str, ...]]:
    """Return the vision contract before the swap, and notes for the user."""
    vision = settings.vision_config
    if settings.model_type.startswith(OWN):
        tower, width, layer = vision.tower_config, vision.tower_config.hidden_size, vision.feature_layer
        pixels, notes = host_pixels(checkpoint.folder, tower.image_size)
    else:
        tower, width, layer = vision, getattr(vision, generation.width), -1
        pixels, notes = _dynamic_pixels(checkpoint.folder, USUAL_GRID * tower.patch_size, generation)
    fields = {
        **pixels.model_dump(),
        "width": width,
        "patch_size": tower.patch_size,
        "tokens": (pixels.image_size // tower.patch_size // vision.spatial_merge_size) ** 2,
        "feature_layer": layer,
        "class_token": False,
        "activation": tower.hidden_act,
    }
    return checked(VisionContract, fields, checkpoint.folder / "config.json"), notes


def _dynamic_pixels(folder: Path, size: int, generation: Generation) -> tuple[PixelRule, tuple[str, ...]]:
    """Return the host's pixel rule; size and resize rule are nominal, since it keeps each image's own size."""
    settings, where = image_settings(folder)
    known = settings or {}
    rule = {
        "mean": known.get("image_mean", generation.mean),
        "std": known.get("image_std", generation.std),
        "image_size": size,
        "resize": "squash",
    }
    notes = (
        "the host takes images of any size and keeps their shape; the figures before the swap are for a "
        f"square of {USUAL_GRID} x {USUAL_GRID} patches ({size} px)",
    )
    missing = f"{folder} has no image processor: the published normalization is assumed"
    return checked(PixelRule, rule, where), notes if settings else (*notes, missing)


def _check_merger(
    checkpoint: Checkpoint, merger: str, generation: Generation, before: VisionContract
) -> None:
    """Refuse a merger that is incomplete, or does not fit the tower in config.json.

    Raises:
        UserError: it is incomplete or does not fit.
    """
    for layer in (generation.norm, generation.first, generation.second):
        if f"{merger}{layer}.weight" not in checkpoint.tensors:
            raise BadDataError(
                f"{checkpoint.folder}: tensor {merger}{layer}.weight is missing: complete the download"
            )
    norm = checkpoint.tensors[f"{merger}{generation.norm}.weight"]
    if norm.shape != (before.width,):
        raise MismatchError(
            f"{checkpoint.folder}: config.json describes a tower of width {before.width}, but {norm.name} has shape "
            f"{list(norm.shape)}, expected {[before.width]}: they do not belong together"
        )


def _deepstack_notes(names: list[str]) -> tuple[str, ...]:
    mergers = {match[1] for name in names if (match := DEEPSTACK.search(name))}
    if not mergers:
        return ()
    return (
        f"deepstack is left out: {len(mergers)} mergers that add features from intermediate blocks of "
        "Qwen's own tower to the language model's first layers have no input in the new tower",
    )


QWEN2_VL = Qwen2VL()
