"""Published checkpoints as header-only copies: index and settings as published, shapes from the code, no values."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.builders import DTYPES, sparse_shards
from tests.mllm_adapters import test_llava_full_size, test_qwen2_vl, test_qwen_vl
from tests.mllm_adapters.families import internvl, qwen_vl
from tests.mllm_adapters.test_internvl_sizes import INTERNLM2_7B, projector
from tests.mllm_adapters.test_llava_full_size import LLAMA_7B, MISTRAL_7B, LanguageModel, clip_weights

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        folder: Its folder among the published files.
        family: Registry name of the family that reads it.
        grid: Patches along one side of its swapped tower at the default size.
        shapes: config.json -> tensor name -> shape, as the code of the model makes them.
        dtype: Of its weights, as safetensors spells it.
        rest: Weights of the swapped model, without those of the new ViT-L/14.
        exceptions: Ending of a tensor's name -> its dtype, where that is another one.
    """

    folder: str
    family: str
    grid: int
    shapes: Callable[[Mapping[str, Any]], Shapes]
    dtype: str
    rest: int
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def swapped_weights(self, grid: int) -> int:
        """How many weights the swapped model has, with so many patches along one side."""
        return self.rest + clip_weights(grid**2 + 1)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.dtype].itemsize

    def dtype_of(self, name: str) -> str:
        """The dtype of a tensor."""
        return next((dtype for end, dtype in self.exceptions.items() if name.endswith(end)), self.dtype)


def llava_1_5(_: Mapping[str, Any]) -> Shapes:
    """LLaMA, two projector layers, and the rotary tables that transformers 4.31 saved; no tower."""
    shapes = LLAMA_7B.shapes("model.", "lm_head")
    shapes |= test_llava_full_size.projector(4096, "model.mm_projector.", "0", "2")
    return shapes | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(32)}


def llava_med(_: Mapping[str, Any]) -> Shapes:
    """Mistral, projector and tower."""
    shapes = MISTRAL_7B.shapes("model.", "lm_head")
    shapes |= test_llava_full_size.projector(4096, "model.mm_projector.", "0", "2")
    return shapes | test_llava_full_size.clip("model.vision_tower.vision_tower.vision_model.")


def llava_hf(config: Mapping[str, Any]) -> Shapes:
    """The same in the transformers layout of 2023."""
    lm = LanguageModel(**{**LLAMA_7B.__dict__, "vocabulary": config["text_config"]["vocab_size"]})
    shapes = test_llava_full_size.clip("vision_tower.vision_model.")
    shapes |= test_llava_full_size.projector(4096, "multi_modal_projector.", "linear_1", "linear_2")
    return shapes | lm.shapes("language_model.model.", "language_model.lm_head")


PLACEHOLDER_ROWS = 2 * 64 * 4096
"""What embedding and head of a LLaVA grow by."""

CLIP_448 = clip_weights(32**2 + 1)

PUBLISHED = (
    Published("liuhaotian--llava-v1.5-7b", "llava", 24, llava_1_5, "F16",
              LLAMA_7B.weights + LLAMA_7B.projector + PLACEHOLDER_ROWS, {"inv_freq": "F32"}),
    Published("microsoft--llava-med-v1.5-mistral-7b", "llava-med", 24, llava_med, "BF16",
              MISTRAL_7B.weights + MISTRAL_7B.projector + PLACEHOLDER_ROWS),
    Published("llava-hf--llava-1.5-7b-hf", "llava", 24, llava_hf, "F16",
              LLAMA_7B.weights + LLAMA_7B.projector + PLACEHOLDER_ROWS),
    Published("Qwen--Qwen-VL-Chat", "qwen-vl", 32, lambda config: qwen_vl.published_tensors(dict(config)), "BF16",
              test_qwen_vl.LANGUAGE_MODEL + test_qwen_vl.RESAMPLER + 4096 * 1024),
    Published("Qwen--Qwen2.5-VL-7B-Instruct", "qwen2-vl", 32, test_qwen2_vl.PUBLISHED_SHAPES["qwen2_5_vl"], "BF16",
              test_qwen2_vl.SWAPPED_WEIGHTS["qwen2_5_vl"] - CLIP_448),
    Published("MBZUAI--AIN--Qwen2-VL-7B", "qwen2-vl", 32, test_qwen2_vl.PUBLISHED_SHAPES["qwen2_vl"], "F32",
              test_qwen2_vl.SWAPPED_WEIGHTS["qwen2_vl"] - CLIP_448),
    Published("allenai--olmOCR-7B--Qwen2-VL-7B", "qwen2-vl", 32, test_qwen2_vl.PUBLISHED_SHAPES["qwen2_vl"], "BF16",
              test_qwen2_vl.SWAPPED_WEIGHTS["qwen2_vl"] - CLIP_448),
    Published("nvidia--Cosmos-Reason2-8B--Qwen3-VL-8B", "qwen2-vl", 32, test_qwen2_vl.PUBLISHED_SHAPES["qwen3_vl"],
              "BF16", test_qwen2_vl.SWAPPED_WEIGHTS["qwen3_vl"] - CLIP_448),
    Published("OpenGVLab--InternVL2-8B", "internvl", 32, lambda _: internvl.INTERNVL2_5_8B.tensors(), "BF16",
              INTERNLM2_7B + projector(4096, 4096) + 2 * (92608 - 92553) * 4096),
)  # fmt: skip
"""Those that are read."""


def config_of(folder: Path) -> dict[str, Any]:
    """A published config.json. Two repositories have lines of another program after its end."""
    found: dict[str, Any] = json.JSONDecoder().raw_decode((folder / "config.json").read_text())[0]
    return found


def index_of(folder: Path) -> dict[str, Any]:
    """A published weight index."""
    found: dict[str, Any] = json.loads(next(folder.glob("*.index.json")).read_text())
    return found


def header_only(row: Published, source: Path, folder: Path) -> Path:
    """Write a published checkpoint as it is but for its values.

    Raises:
        AssertionError: the index names other tensors than the code of the model has.
    """
    config, index = config_of(source), index_of(source)
    shapes = row.shapes(config)
    assert set(index["weight_map"]) == set(shapes)
    tensors = {name: (row.dtype_of(name), shape) for name, shape in shapes.items()}
    sparse_shards(folder, config, tensors, index["weight_map"], index["metadata"]["total_size"])
    for file in source.iterdir():
        if not (folder / file.name).exists() and file.name != "SOURCE.txt":
            shutil.copyfile(file, folder / file.name)
    return folder


def names_only(source: Path, folder: Path) -> Path:
    """Write a published checkpoint with tensors of the published names, of no shape: for those that are refused."""
    tensors = dict.fromkeys(index_of(source)["weight_map"], ("F16", ()))
    sparse_shards(folder, config_of(source), tensors, index_of(source)["weight_map"])
    for file in source.iterdir():
        if not (folder / file.name).exists() and file.name != "SOURCE.txt":
            shutil.copyfile(file, folder / file.name)
    return folder
