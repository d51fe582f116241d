"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in the transformers layout, with the key prefixes of either age.

Vision contract, merger and positions after transformers 5.23 (models/qwen2_vl, models/qwen2_5_vl, models/qwen3_vl).

A swap keeps everything but the tower and the first half of the merger: the language model with its M-RoPE positions,
the 2 x 2 merging of patches, and the merger's second layer, whose input width is kept (the stock classes tie it to the
tower's). There is no --layout llava: a LLaVA has one-dimensional positions and merges no patches, so it would not be
this model with other eyes. Four times as many visual tokens would stand, behind a projector made of nothing, at
positions where the language model has never seen any.
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
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.texts import read_json
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, PixelRule, checked
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import build_config, read_fields, tower_config
from mllm_adapters.contract import FAMILY_KEY, Dropped, Family, FamilySpec, Plan, Step, Target, VisionContract
from mllm_adapters.families import read_template
from mllm_adapters.planning import REPLACED, after_swap, kept, refit_reader, swap_notes, tower_steps
from mllm_adapters.processing import check_placeholder, has_tokenizer, host_pixels, text_side

USUAL_GRID = 32
"""Patches along one side at which host and result are compared, and which the result gets: Qwen's towers take any.
32 are 448 px at a patch size of 14: 256 visual tokens."""

TAKEN_OVER = ("spatial_merge_size", "temporal_patch_size", "tokens_per_second")
"""Fields of ``vision_config`` that hold for the result too."""

DEEPSTACK = re.compile(r"\bdeepstack_merger_list\.(\d+)\.")

IMAGE_PLACEHOLDER = "<|image_pad|>"

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Generation:
    """What differs between the models of the line.

    Attributes:
        model: Name that the classes of the result begin with.
        width: Field of ``vision_config`` with the width of the tower's features.
        norm: Normalisation in the merger.
        first: First linear layer of the merger.
        second: Second one.
        mean: Mean of the published image processor.
        std: Its standard deviation.
        template: Chat template for checkpoints that come without one.
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
"""model_type of the stock class -> what is special about it."""

OWN = "mgll_"
"""Prefix of a swapped checkpoint's model_type."""


class Fields(BaseModel):
    """What counts in a config.json besides what transformers makes of it."""

    vision_config: dict[str, Any]


class Qwen2VL(Family):
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
        """``transformers`` or None; swapped checkpoints have a model_type of ours."""
        known = str(config.get("model_type")).removeprefix(OWN) in GENERATIONS and "vision_config" in config
        return "transformers" if known else None

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan a swap; see `Family.plan`."""
        config, where = checkpoint.config, f"{checkpoint.folder}/config.json"
        if target not in self.spec.targets:
            raise UserError(f"{checkpoint.folder}: {self.spec.not_llava}; use --layout own")
        if tower is None:
            raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
        read_fields(Fields, config, where)
        stock = str(config["model_type"]).removeprefix(OWN)
        generation = GENERATIONS[stock]
        settings = build_config(config, where)
        prefix = _visual_prefix(checkpoint, generation)
        before, notes = _host(checkpoint, settings, generation)
        merge = settings.vision_config.spatial_merge_size
        # The new tower is read where LLaVA reads a CLIP: its patches before the last block, without class token.
        read = before.model_copy(update={"feature_layer": -2})
        after = after_swap(read, tower, image_size, tokens=lambda grid: (grid // merge) ** 2, multiple=merge)
        kept_steps, dropped = _sort(checkpoint, prefix)
        steps, readers = _merger(kept_steps, f"{prefix}merger.", generation, before, after, checkpoint.folder)
        shapes = {step.name.removeprefix(f"{prefix}merger."): step.shape for step in steps}
        dtype = checkpoint.tensors[f"{prefix}merger.{generation.norm}.weight"].dtype
        return Plan(
            family=self.spec.name,
            layout="transformers",
            source=checkpoint.folder,
            tower=tower.source,
            tower_weights=tower.weights,
            swapped=True,
            steps=(*steps, *tower_steps(tower, f"{prefix}vision_tower.", after, dtype)),
            dropped=tuple(dropped),
            config={
                **{key: value for key, value in settings.to_dict().items() if key != "auto_map"},
                "architectures": [f"{generation.model}ForConditionalGeneration"],
                "model_type": OWN + stock,
                FAMILY_KEY: self.spec.name,
                "vision_config": {
                    "model_type": "mgll_qwen2_vl_vision",
                    "tower_config": tower_config(tower.spec, after),
                    "feature_layer": after.feature_layer,
                    "merger_width": shapes[f"{generation.first}.weight"][0],
                    "out_hidden_size": shapes[f"{generation.second}.weight"][0],
                    **{k: v for k, v in settings.vision_config.to_dict().items() if k in TAKEN_OVER},
                },
            },
            before=before,
            after=after,
            image_token_id=settings.image_token_id,
            processor="the source's tokenizer and chat template, with the new preprocessing"
            if has_tokenizer(checkpoint.folder)
            else None,
            readers=readers,
            notes=(
                *notes,
                *swap_notes(tower, after),
                f"every picture is made {after.image_size} x {after.image_size} px and becomes {after.tokens} visual "
                "tokens, since a CLIP tower has one grid of positions; the tokens' own (M-RoPE) are computed as before",
                "the result takes images only: video input is refused",
                *_deepstack_notes(dropped),
            ),
        )

    def processor(self, plan: Plan) -> Any | None:
        """Tokenizer and chat template of the source with the planned preprocessing; None without a tokenizer."""
        from mllm_adapters.modeling.qwen2_vl import MgllQwen2VLProcessor

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
        """Pictures made square by the tower's rule, as patches."""
        from mllm_adapters.modeling.qwen2_vl import MgllQwen2VLImageProcessor

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

    def look(self, model: Any, pixels: Tensor, contract: VisionContract) -> None:
        """See `Family.look`: pictures go in as patches."""
        from mllm_adapters.modeling.qwen2_vl import to_patches

        vision = model.config.vision_config
        patches = to_patches(
            pixels, contract.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        )
        model.get_image_features(patches, _grids(contract, len(pixels)).to(pixels.device))

    def token_order(self, model: Any, contract: VisionContract) -> Tensor | None:
        """See `Family.token_order`: Qwen2.5's own tower hands the merger its patches window by window."""
        from transformers.vision_utils import get_vision_window_index

        vision = model.config.vision_config
        if not hasattr(vision, "window_size"):
            return None
        windows, _ = get_vision_window_index(
            _grids(contract, 1), vision.spatial_merge_size, vision.window_size, contract.patch_size
        )
        return windows.argsort()


def _grids(contract: VisionContract, pictures: int) -> Tensor:
    """Frames, rows and columns of patches of each picture [pictures, 3]."""
    return torch.tensor([[1, contract.grid, contract.grid]] * pictures)


def _visual_prefix(checkpoint: Checkpoint, generation: Generation) -> str:
    """``visual.`` or ``model.visual.``, as the file has it."""
    end = f"visual.merger.{generation.norm}.weight"
    found = [name for name in checkpoint.tensors if name.endswith(end)]
    if len(found) != 1:
        raise UserError(
            f"{checkpoint.folder}: expected one tensor {end}, found {len(found)}: is this the language model only?"
        )
    return found[0].removesuffix(end) + "visual."


def _host(
    checkpoint: Checkpoint, settings: Any, generation: Generation
) -> tuple[VisionContract, tuple[str, ...]]:
    """The vision contract before the swap, and what the user should know about it."""
    vision = settings.vision_config
    if settings.model_type.startswith(OWN):
        eyes, width, layer = vision.tower_config, vision.tower_config.hidden_size, vision.feature_layer
        pixels, notes = host_pixels(checkpoint.folder, eyes.image_size)
    else:
        eyes, width, layer = vision, getattr(vision, generation.width), -1
        pixels, notes = _dynamic_pixels(checkpoint.folder, USUAL_GRID * eyes.patch_size, generation)
    fields = {
        **pixels.model_dump(),
        "width": width,
        "patch_size": eyes.patch_size,
        "tokens": (pixels.image_size // eyes.patch_size // vision.spatial_merge_size) ** 2,
        "feature_layer": layer,
        "class_token": False,
        "activation": eyes.hidden_act,
    }
    return checked(VisionContract, fields, checkpoint.folder / "config.json"), notes


def _dynamic_pixels(folder: Path, size: int, generation: Generation) -> tuple[PixelRule, tuple[str, ...]]:
    """The host's normalisation; its size and resize rule are stand-ins, since it keeps each picture's own."""
    nested, flat = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings = read_json(nested).get("image_processor") if nested.is_file() else None
    where = nested if settings else flat
    if not settings and flat.is_file():
        settings = read_json(flat)
    known = settings or {}
    rule = {
        "mean": known.get("image_mean", generation.mean),
        "std": known.get("image_std", generation.std),
        "image_size": size,
        "resize": "squash",
    }
    notes = (
        f"the host takes pictures of any size and keeps their shape; what stands here as before is a square of "
        f"{USUAL_GRID} x {USUAL_GRID} patches ({size} px)",
    )
    missing = f"{folder} has no image processor: the published normalisation is assumed"
    return checked(PixelRule, rule, where), notes if settings else (*notes, missing)


def _sort(checkpoint: Checkpoint, prefix: str) -> tuple[list[Step], list[Dropped]]:
    """What the result keeps, and what the old tower takes with it."""
    steps, dropped = [], []
    for header in checkpoint.tensors.values():
        if not header.name.startswith(prefix) or header.name.startswith(f"{prefix}merger."):
            steps.append(kept(header))
        elif DEEPSTACK.search(header.name):
            reason = "reads features of Qwen's own tower between its blocks, which the new one does not have"
            dropped.append(Dropped(name=header.name, reason=reason))
        else:
            dropped.append(Dropped(name=header.name, reason=REPLACED))
    return steps, dropped


def _merger(
    steps: list[Step],
    merger: str,
    generation: Generation,
    before: VisionContract,
    after: VisionContract,
    where: Path,
) -> tuple[list[Step], dict[str, str]]:
    """Fit normalisation and first layer of the merger to the new width; the second layer is kept.

    Raises:
        UserError: a layer is missing, or the merger is not of the tower that config.json describes.
    """
    shapes = {step.name: step.shape for step in steps}
    for layer in (generation.norm, generation.first, generation.second):
        if f"{merger}{layer}.weight" not in shapes:
            raise UserError(f"{where}: tensor {merger}{layer}.weight is missing: complete the download")
    if shapes[f"{merger}{generation.norm}.weight"] != (before.width,):
        found = list(shapes[f"{merger}{generation.norm}.weight"])
        raise UserError(
            f"{where}: config.json describes a tower of width {before.width}, but {merger}{generation.norm}.weight "
            f"has shape {found}, expected {[before.width]}: they do not belong together"
        )
    readers: dict[str, str] = {}
    for layer in (generation.norm, generation.first):
        steps, fate = refit_reader(steps, merger + layer, before, after, where)
        readers |= fate
    return steps, readers


def _deepstack_notes(dropped: list[Dropped]) -> tuple[str, ...]:
    mergers = {match[1] for tensor in dropped if (match := DEEPSTACK.search(tensor.name))}
    if not mergers:
        return ()
    return (
        f"deepstack is left out: {len(mergers)} mergers that put features from between the blocks of Qwen's own tower "
        "into the language model's first layers have nothing to read any more",
    )


QWEN2_VL = Qwen2VL()
