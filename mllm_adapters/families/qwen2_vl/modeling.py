"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with a CLIP vision tower, and their processor.

Language model, placement of the visual tokens and M-RoPE positions are those of the stock classes; the
vision part is replaced. It takes the patches of Qwen's processors
(transformers/models/qwen2_vl/image_processing_qwen2_vl.py: each patch flattened, patches to merge next to
each other), reassembles the images, and passes the CLIP features to the merger in the same order. The
classes have their own model_types because the stock configurations turn any vision_config into Qwen's own
tower, which would then stay random.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLTextModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextModel,
)
from transformers.image_processing_utils import BatchFeature
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessorKwargs
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures,
    Qwen3VLVisionPatchMerger,
)

from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError

IMAGES_ONLY = "this model does not support video: pass the frames as images"


class ClipVisualConfig(PreTrainedConfig):
    """The vision part: a CLIP tower and the connector to the language model.

    Attributes:
        tower_config: The tower, a ``clip_vision_model``; its image_size fixes the size of all images.
        feature_layer: Index into the tower's hidden states.
        merger_width: Width between the two layers of the merger, as in the language model's checkpoint.
        out_hidden_size: Width of the language model.
        spatial_merge_size: Patches along one side of the square that becomes one visual token.
        temporal_patch_size: How often the processor repeats an image in each patch.
        tokens_per_second: Required by Qwen2.5-VL's positions of videos, which are not supported.
    """

    model_type = "mgll_qwen2_vl_vision"
    base_config_key = "vision_config"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"tower_config": CLIPVisionConfig}

    tower_config: Any = None
    feature_layer: int = -2
    merger_width: int = 5120
    out_hidden_size: int = 3584
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: int = 2


class MgllQwen2VLConfig(Qwen2VLConfig):
    """Qwen2-VL with a CLIP tower."""

    model_type = "mgll_qwen2_vl"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": ClipVisualConfig,
        "text_config": Qwen2VLTextConfig,
    }


class MgllQwen2_5_VLConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL with a CLIP tower."""

    model_type = "mgll_qwen2_5_vl"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": ClipVisualConfig,
        "text_config": Qwen2_5_VLTextConfig,
    }


class MgllQwen3VLConfig(Qwen3VLConfig):
    """Qwen3-VL with a CLIP tower, without deepstack, whose features a CLIP tower does not have."""

    model_type = "mgll_qwen3_vl"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": ClipVisualConfig,
        "text_config": Qwen3VLTextConfig,
    }


def to_patches(images: Tensor, patch_size: int, merge_size: int, repeats: int) -> Tensor:
    """Convert images to the patches of Qwen's processors.

    Args:
        images: Pixels (n, C, H, W).
        patch_size: Side of a patch in pixels.
        merge_size: Patches along one side of the square that becomes one visual token.
        repeats: How often each image is repeated within its patches, like the frames of a video.

    Returns:
        Patches (n · H/P · W/P, C · repeats · P · P), those of a square next to each other.
    """
    number, channels, height, width = images.shape
    rows, columns = height // patch_size // merge_size, width // patch_size // merge_size
    split = images.reshape(number, channels, rows, merge_size, patch_size, columns, merge_size, patch_size)
    patches = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return patches.expand(-1, -1, -1, -1, -1, -1, repeats, -1, -1).flatten(5).flatten(0, 4)


def to_images(patches: Tensor, side: int, patch_size: int, merge_size: int, repeats: int) -> Tensor:
    """Reassemble square images (n, C, S, S) from `to_patches`; of repeated ones the first.

    Args:
        patches: See `to_patches`.
        side: Patches along one side of an image.
        patch_size: See `to_patches`.
        merge_size: See `to_patches`.
        repeats: See `to_patches`.
    """
    squares = side // merge_size
    split = patches.view(
        -1, squares, squares, merge_size, merge_size, patches.shape[1] // (repeats * patch_size**2),
        repeats, patch_size, patch_size,
    )[..., 0, :, :]  # fmt: skip
    return split.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5, 7).flatten(2, 4)


def in_merge_order(features: Tensor, side: int, merge_size: int) -> Tensor:
    """Reorder patch features (n, side · side, C) to (n · side · side, C), those of a square next to each other."""
    squares = side // merge_size
    split = features.view(len(features), squares, merge_size, squares, merge_size, -1)
    return split.permute(0, 1, 3, 2, 4, 5).flatten(0, 4)


class ClipVisual(PreTrainedModel):
    """CLIP tower and merger, called as Qwen's own vision models are.

    Args:
        config: Its configuration.
        merger: From merged patch features to the language model's width.
    """

    config: ClipVisualConfig
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ClipVisualConfig, merger: nn.Module) -> None:
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.vision_tower = CLIPVisionModel._from_config(config.tower_config)
        self.merger = merger
        self.post_init()

    def forward(
        self,
        hidden_states: Tensor,
        grid_thw: Tensor,
        **kwargs: Any,  # noqa: ARG002 (options of the native towers' attention)
    ) -> BaseModelOutputWithDeepstackFeatures:
        """Compute the visual tokens of images.

        Args:
            hidden_states: Patches of the processor, see `to_patches`.
            grid_thw: Frames, rows and columns of patches of each image (n, 3).
            **kwargs: Ignored.

        Returns:
            ``last_hidden_state``, the features in merge order, and ``pooler_output``, the visual tokens.

        Raises:
            UserError: an image does not have the tower's size.
        """
        config, tower = self.config, self.config.tower_config
        side = tower.image_size // tower.patch_size
        for grid in grid_thw.tolist():
            if grid != [1, side, side]:
                raise BadDataError(
                    f"image_grid_thw has an image of {grid} patches, expected {[1, side, side]}: this model "
                    f"takes images of {tower.image_size} x {tower.image_size} px, as made by its own "
                    "processor"
                )
        merge = config.spatial_merge_size
        images = to_images(hidden_states, side, tower.patch_size, merge, config.temporal_patch_size)
        layers = self.vision_tower(images, output_hidden_states=True).hidden_states
        features = in_merge_order(layers[config.feature_layer][:, 1:], side, merge)
        return BaseModelOutputWithDeepstackFeatures(
            last_hidden_state=features, pooler_output=self.merger(features), deepstack_features=[]
        )


def _mlp_merger(kind: Callable[..., Any]) -> Callable[[ClipVisualConfig], nn.Module]:
    """Build Qwen2-VL's or Qwen2.5-VL's merger, with the inner width of the language model's checkpoint."""

    def build(config: ClipVisualConfig) -> nn.Module:
        merger = kind(config.out_hidden_size, config.tower_config.hidden_size, config.spatial_merge_size)
        merger.mlp[0] = nn.Linear(merger.hidden_size, config.merger_width)
        merger.mlp[2] = nn.Linear(config.merger_width, config.out_hidden_size)
        built: nn.Module = merger
        return built

    return build


def _linear_merger(config: ClipVisualConfig) -> nn.Module:
    """Build Qwen3-VL's merger, likewise."""
    merger = Qwen3VLVisionPatchMerger(
        Qwen3VLVisionConfig(
            hidden_size=config.tower_config.hidden_size,
            spatial_merge_size=config.spatial_merge_size,
            out_hidden_size=config.out_hidden_size,
        )
    )
    merger.linear_fc1 = nn.Linear(merger.hidden_size, config.merger_width)
    merger.linear_fc2 = nn.Linear(config.merger_width, config.out_hidden_size)
    return merger


class _WithClip(PreTrainedModel):
    """The inner model of each generation; its own constructor would build Qwen's tower."""

    merger: Callable[[ClipVisualConfig], nn.Module]
    language: type[Any]

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.visual = ClipVisual(config.vision_config, self.merger(config.vision_config))
        self.language_model = self.language._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Refuse videos.

        Raises:
            UserError: always.
        """
        raise UnsupportedCheckpointError(IMAGES_ONLY)


class _WithClipForConditionalGeneration(PreTrainedModel):
    """Inner model and language model head."""

    inner: type[Any]

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.inner(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class MgllQwen2VLModel(_WithClip, Qwen2VLModel):
    """Qwen2-VL with a CLIP tower, without head."""

    config: MgllQwen2VLConfig
    merger = staticmethod(_mlp_merger(PatchMerger))
    language = Qwen2VLTextModel


class MgllQwen2_5_VLModel(_WithClip, Qwen2_5_VLModel):
    """Qwen2.5-VL with a CLIP tower, without head."""

    config: MgllQwen2_5_VLConfig
    merger = staticmethod(_mlp_merger(Qwen2_5_VLPatchMerger))
    language = Qwen2_5_VLTextModel


class MgllQwen3VLModel(_WithClip, Qwen3VLModel):
    """Qwen3-VL with a CLIP tower, without head."""

    config: MgllQwen3VLConfig
    merger = staticmethod(_linear_merger)
    language = Qwen3VLTextModel


class MgllQwen2VLForConditionalGeneration(_WithClipForConditionalGeneration, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with a CLIP tower."""

    config: MgllQwen2VLConfig
    inner = MgllQwen2VLModel


class MgllQwen2_5_VLForConditionalGeneration(
    _WithClipForConditionalGeneration, Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL with a CLIP tower."""

    config: MgllQwen2_5_VLConfig
    inner = MgllQwen2_5_VLModel


class MgllQwen3VLForConditionalGeneration(_WithClipForConditionalGeneration, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with a CLIP tower."""

    config: MgllQwen3VLConfig
    inner = MgllQwen3VLModel


class MgllQwen2VLImageProcessor(LlavaImageProcessor):
    """Resizes images to squares by the tower's own rule, and returns Qwen's patches.

    The stock processor keeps the aspect ratio, even with min_pixels = max_pixels; a CLIP tower has one grid only.
    """

    patch_size = 14
    temporal_patch_size = 2
    merge_size = 2
    valid_kwargs = Qwen2VLImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012 (as in the base class)

    def _preprocess(self, images: list[Tensor], *_: Any, **kwargs: Any) -> BatchFeature:
        patch_size, merge_size, repeats, tensors = (
            kwargs.pop(name) for name in ("patch_size", "merge_size", "temporal_patch_size", "return_tensors")
        )
        squares = super()._preprocess(images, return_tensors=None, **kwargs)["pixel_values"]
        pixels = torch.stack(list(squares))
        rows, columns = (side // patch_size for side in pixels.shape[-2:])
        data = {
            "pixel_values": to_patches(pixels, patch_size, merge_size, repeats),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * len(pixels)),
        }
        return BatchFeature(data, tensor_type=tensors)

    def get_number_of_image_patches(self, *args: Any, **kwargs: Any) -> int:  # noqa: ARG002
        """Return the number of patches of an image, which does not depend on its size."""
        sides = self.crop_size if self.do_center_crop else self.size
        return (sides["height"] // self.patch_size) * (sides["width"] // self.patch_size)


class MgllQwen2VLProcessor(Qwen2VLProcessor):
    """Text and image processor for the models of this module, without video."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Process inputs as the stock processors do.

        Raises:
            UserError: a video is given.
        """
        if videos is not None:
            raise UnsupportedCheckpointError(IMAGES_ONLY)
        batch: BatchFeature = super().__call__(images=images, text=text, **kwargs)
        return batch
